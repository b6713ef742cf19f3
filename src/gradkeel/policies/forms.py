"""What happens to a cell above its bound. ``n`` is its norm, ``c`` its bound."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradkeel.policies.base import positive
from gradkeel.policies.clip import Form


@dataclass(frozen=True)
class Hard(Form):
    """``c / max(n + eps, c)``: exactly 1 up to the bound; above it the clipped norm is the bound.

    ``eps=1e-6`` reproduces ``torch.nn.utils.clip_grad_norm_``, which scales slightly too much.
    """

    clamps: ClassVar[bool] = True
    eps: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a negative epsilon."""
        if self.eps != 0.0:
            positive("Hard", "eps", self.eps)

    def coefficient(self, norms: Tensor, bound: Tensor) -> Tensor:
        """[k] coefficients in (0, 1]."""
        # Above 1 up to the bound, however far; an infinite bound (none yet) makes it inf.
        return (bound / (norms + self.eps if self.eps else norms)).clamp(max=1.0)


@dataclass(frozen=True)
class Smooth(Form):
    """``c / (c + n)``: between half of and all of the hard coefficient, and smooth in ``n``."""

    def coefficient(self, norms: Tensor, bound: Tensor) -> Tensor:
        """[k] coefficients in (0, 1)."""
        return 1.0 / (1.0 + norms / bound)


@dataclass(frozen=True)
class Rescale(Form):
    """``c / n``: the norm always becomes the bound, so small gradients grow; the one form that may exceed 1."""

    def coefficient(self, norms: Tensor, bound: Tensor) -> Tensor:
        """[k] coefficients above 0; 1 where there is no bound yet."""
        # No coefficient is larger than single precision holds; the smallest norms grow by that much.
        grown = (bound / norms).clamp(max=torch.finfo(torch.float32).max)
        return torch.where(torch.isinf(bound), torch.ones_like(norms), grown)


@dataclass(frozen=True)
class SkipAbove(Form):
    """No optimizer step at all when any cell is above its bound; nothing is scaled."""

    asks_to_skip: ClassVar[bool] = True

    def coefficient(self, norms: Tensor, bound: Tensor) -> Tensor:
        """[k] ones."""
        return torch.ones_like(norms)
