"""Bounds that do not look at norms, and the three clips that are made of them."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from gradkeel.policies.base import Clip, HostBound, NamedPolicy, positive
from gradkeel.policies.forms import Hard


@dataclass(frozen=True)
class Constant(HostBound):
    """The same bound at every step.

    Args:
        highest: the largest norm (or entry) allowed, above 0.
        lowest: the smallest entry allowed, for the value scope; ``-highest`` unless given.
    """

    highest: float
    lowest: float | None = None

    def at(self, step: int) -> tuple[float, float]:
        """The two limits."""
        return (-self.highest if self.lowest is None else self.lowest, self.highest)


@dataclass(frozen=True)
class Schedule(HostBound):
    """A bound that follows the step's number: ``bound(step)``, steps counted from 1.

    Args:
        function: from step to a positive number.
    """

    function: Callable[[int], float]

    def at(self, step: int) -> tuple[float, float]:
        """The function's value, checked."""
        limit = positive("Schedule", f"function({step})", self.function(step))
        return (-limit, limit)


@dataclass(frozen=True, repr=False)
class ClipByValue(NamedPolicy):
    """Clamp every entry of every gradient into ``[min, max]``; ``min`` is ``-max`` unless given.

    ``g <- clamp(g, min, max)``. Changes the gradient's direction: (0.8, 89) becomes (0.8, 1) under ``max=1``.
    The counterpart of ``torch.nn.utils.clip_grad_value_`` and Paddle's ``ClipGradByValue``. Does not sync the host.

    Args:
        max: highest value of an entry.
        min: lowest value of an entry.

    Raises:
        ValueError: for limits that are not numbers in ascending order.

    Example:
        >>> ClipByValue(1.0)
        ClipByValue(max=1.0)  # each entry separately
    """

    spec_name: ClassVar[str] = "value"
    max: float
    _: KW_ONLY
    min: float | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.min is None:
            positive("ClipByValue", "max", self.max)
            return
        for name, value in (("min", self.min), ("max", self.max)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"ClipByValue({name}={value!r}): {name} must be a number, not {type(value).__name__}")
        if not (self.min <= self.max and math.isfinite(self.min) and math.isfinite(self.max)):
            raise ValueError(
                f"ClipByValue(min={self.min!r}, max={self.max!r}): min must not be above max, and both must be finite"
            )

    @property
    def parts(self) -> Clip:
        """Scope value, constant bound, hard form."""
        return Clip("value", Constant(float(self.max), self.min), Hard())

    @property
    def spec(self) -> str:
        """``value:MAX`` or ``value:MIN,MAX``."""
        return f"value:{self.max}" if self.min is None else f"value:{self.min},{self.max}"


@dataclass(frozen=True, repr=False)
class ClipByNorm(NamedPolicy):
    """Scale each parameter's gradient, separately, so that its own 2-norm is at most ``max_norm``.

    For each tensor ``g <- g * max_norm / max(||g||, max_norm)``. The counterpart of Paddle's ``ClipGradByNorm`` and
    Keras' ``clipnorm``. It is NOT torch's ``clip_grad_norm_``, which takes all tensors together: that is
    `ClipByGlobalNorm`. Does not sync the host.

    Args:
        max_norm: largest norm of one tensor's gradient, above 0, in the unit of the gradient.

    Raises:
        ValueError, TypeError: if ``max_norm`` is no positive number.

    Example:
        >>> ClipByNorm(1.0)
        ClipByNorm(max_norm=1.0)  # each tensor separately
    """

    spec_name: ClassVar[str] = "norm"
    max_norm: float

    def __post_init__(self) -> None:
        """Check the bound."""
        positive("ClipByNorm", "max_norm", self.max_norm)

    @property
    def parts(self) -> Clip:
        """Scope tensor, constant bound, hard form."""
        return Clip("tensor", Constant(float(self.max_norm)), Hard())


@dataclass(frozen=True, repr=False)
class ClipByGlobalNorm(NamedPolicy):
    """Scale all gradients by one number so that their norm, taken together, is at most ``max_norm``.

    ``g <- g * c / max(n + eps, c)`` with ``n`` the norm of all gradients as one vector (the root of the SUM of
    squares) and ``c = max_norm``. The counterpart of ``torch.nn.utils.clip_grad_norm_`` (``eps=1e-6`` reproduces it)
    and of Paddle's ``ClipGradByGlobalNorm``. Does not sync the host.

    Args:
        max_norm: largest norm of all gradients together, above 0, in the unit of the gradient.
        norm_type: the p of the p-norm, above 0; ``math.inf`` is the largest absolute entry.
        eps: added to the norm in the denominator; 0 is exact.

    Raises:
        ValueError, TypeError: if an argument is no positive number (``eps`` may be 0).

    Source:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013, algorithm 1.

    Example:
        >>> ClipByGlobalNorm(1.0)
        ClipByGlobalNorm(max_norm=1.0)  # all tensors together
    """

    spec_name: ClassVar[str] = "global-norm"
    max_norm: float
    norm_type: float = 2.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        positive("ClipByGlobalNorm", "max_norm", self.max_norm)
        positive("ClipByGlobalNorm", "norm_type", self.norm_type, infinite=True)
        if self.eps != 0.0:
            positive("ClipByGlobalNorm", "eps", self.eps)

    @property
    def parts(self) -> Clip:
        """Scope global, constant bound, hard form."""
        return Clip("global", Constant(float(self.max_norm)), Hard(eps=self.eps), float(self.norm_type))
