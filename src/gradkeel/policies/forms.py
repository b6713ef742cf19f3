"""What happens to a cell above its bound. ``n`` is its norm, ``c`` its bound."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch

from gradkeel.policies.base import positive
from gradkeel.policies.clip import Form
from gradkeel.policies.numbers import Number, constant, divide, minimum, where

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Hard(Form, on_numbers=True):
    """``c / max(n + eps, c)``: exactly 1 up to the bound; above it the clipped norm is the bound.

    ``eps=1e-6`` reproduces ``torch.nn.utils.clip_grad_norm_``, which scales slightly too much.
    """

    clamps: ClassVar[bool] = True
    eps: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.eps, Real) or self.eps != 0.0:
            positive("Hard", "eps", self.eps)

    def coefficient(self, norms: Number, bound: Number) -> Number:
        """Return [k] coefficients in (0, 1]."""
        # Above 1 up to the bound, however far; an infinite bound (none yet) makes it inf.
        return minimum(divide(bound, norms + self.eps if self.eps else norms), 1.0)


@dataclass(frozen=True)
class Smooth(Form, on_numbers=True):
    """``c / (c + n)``: between half of and all of the hard coefficient, and smooth in ``n``."""

    def coefficient(self, norms: Number, bound: Number) -> Number:
        """Return [k] coefficients in (0, 1)."""
        return 1.0 / (1.0 + divide(norms, bound))


@dataclass(frozen=True)
class Rescale(Form, on_numbers=True):
    """``c / n``: the norm always becomes the bound, so small gradients grow; the one form that may exceed 1."""

    def coefficient(self, norms: Number, bound: Number) -> Number:
        """Return [k] coefficients above 0; 1 where there is no bound yet."""
        # No coefficient is larger than single precision holds; the smallest norms grow by that much.
        return where(bound == math.inf, 1.0, minimum(divide(bound, norms), LARGEST))


@dataclass(frozen=True)
class SkipAbove(Form, on_numbers=True):
    """No optimizer step at all when any cell is above its bound; nothing is scaled."""

    asks_to_skip: ClassVar[bool] = True

    def coefficient(self, norms: Number, bound: Number) -> Number:
        """Return [1] one."""
        return constant(1.0, norms)
