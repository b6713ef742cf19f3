"""Named policies that scale what is above a bound, where the bound looks at one step alone."""

import math
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import ClassVar

from gradkeel.policies.base import positive, spec_value
from gradkeel.policies.bounds.fixed import Constant, ParameterRatio, RootMeanSquare
from gradkeel.policies.clip import Clip
from gradkeel.policies.forms import Hard
from gradkeel.policies.recipes.named import NamedPolicy


@dataclass(frozen=True, repr=False)
class ClipByValue(NamedPolicy):
    """Clamp every entry of every gradient into ``[min, max]``; ``min`` is ``-max`` unless given.

    Changes the gradient's direction: (0.8, 89) becomes (0.8, 1) under ``max=1``. The counterpart of
    ``torch.nn.utils.clip_grad_value_`` and Paddle's ``ClipGradByValue``. Does not sync the host.

    Formula:
        g <- clamp(g, min, max)

    Args:
        max: highest value of an entry, in the unit of the gradient.
        min: lowest value of an entry.

    Cost:
        One read for the largest entries, and a second pass over the gradients that have to be clamped. No state.

    Raises:
        ValueError, TypeError: for limits that are not numbers in ascending order.

    Source:
        Mikolov, "Statistical language models based on neural networks", 2012.

    Example:
        >>> ClipByValue(1.0)
        ClipByValue(max=1.0)  # each entry separately
    """

    spec_name: ClassVar[str] = "value"
    max: float
    _: KW_ONLY
    min: float | None = None

    def __post_init__(self) -> None:
        if self.min is None:
            positive("ClipByValue", "max", self.max)
            return
        for name, value in (("min", self.min), ("max", self.max)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(
                    f"ClipByValue({name}={value!r}): {name} must be a number, not {type(value).__name__}"
                )
        if not (self.min <= self.max and math.isfinite(self.min) and math.isfinite(self.max)):
            raise ValueError(
                f"ClipByValue(min={self.min!r}, max={self.max!r}): min must not be above max, and both must be finite"
            )

    @property
    def parts(self) -> Clip:
        return Clip("value", Constant(float(self.max), self.min), Hard())

    @property
    def spec(self) -> str:
        """``value:MAX`` or ``value:MIN,MAX``."""
        limits = [self.max] if self.min is None else [self.min, self.max]
        return f"value:{','.join(spec_value(float(limit)) for limit in limits)}"


@dataclass(frozen=True, repr=False)
class ClipByNorm(NamedPolicy):
    """Scale each parameter's gradient, separately, so that its own 2-norm is at most ``max_norm``.

    The counterpart of Paddle's ``ClipGradByNorm`` and Keras' ``clipnorm``. It is NOT torch's ``clip_grad_norm_``,
    which takes all tensors together: that is `ClipByGlobalNorm`. Does not sync the host.

    Formula:
        for each tensor, g <- g * c / max(n, c) with n = ||g||_2 and c = max_norm

    Args:
        max_norm: largest norm of one tensor's gradient, above 0, in the unit of the gradient.

    Cost:
        One read of the gradients; a second pass over those above the bound. No state.

    Raises:
        ValueError, TypeError: if ``max_norm`` is no positive number.

    Source:
        Paddle, ``paddle.nn.ClipGradByNorm``; Keras, ``clipnorm``.

    Example:
        >>> ClipByNorm(1.0)
        ClipByNorm(max_norm=1.0)  # each tensor separately
    """

    spec_name: ClassVar[str] = "norm"
    _positive = ("max_norm",)
    max_norm: float

    @property
    def parts(self) -> Clip:
        return Clip("tensor", Constant(float(self.max_norm)), Hard())


@dataclass(frozen=True, repr=False)
class ClipByGlobalNorm(NamedPolicy):
    """Scale all gradients by one number so that their norm, taken together, is at most ``max_norm``.

    n is the norm of all gradients as one vector: for the 2-norm, the root of the SUM of squares. The counterpart of
    ``torch.nn.utils.clip_grad_norm_`` (``eps=1e-6`` reproduces it) and of Paddle's ``ClipGradByGlobalNorm``. Does not
    sync the host.

    Formula:
        g <- g * c / max(n + eps, c) with n the norm of all gradients together and c = max_norm

    Args:
        max_norm: largest norm of all gradients together, above 0, in the unit of the gradient.
        norm_type: the p of the p-norm, above 0; ``math.inf`` or "inf" is the largest absolute entry.
        eps: added to the norm in the denominator; 0 is exact.

    Cost:
        One read of the gradients; a second pass only where the norm is above the bound. No state.

    Raises:
        ValueError, TypeError: if an argument is no positive number (``eps`` may be 0).

    Source:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013, algorithm 1.

    Example:
        >>> ClipByGlobalNorm(1.0)
        ClipByGlobalNorm(max_norm=1.0)  # all tensors together
    """

    spec_name: ClassVar[str] = "global-norm"
    _positive = ("max_norm",)
    max_norm: float
    norm_type: float = 2.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        if str(self.norm_type) == "inf":  # the word stands for it in torch's functions
            object.__setattr__(self, "norm_type", math.inf)
        super().__post_init__()

    @property
    def parts(self) -> Clip:
        return Clip("global", Constant(float(self.max_norm)), Hard(eps=self.eps), self.norm_type)


@dataclass(frozen=True, repr=False)
class AdaptiveGradientClip(NamedPolicy):
    """Bound each unit's gradient to a share of the unit's own weights (AGC).

    A unit is a slice of a tensor along ``unit_dim``: an output row of a linear layer, a filter of a convolution. A
    tensor with at most one dimension is one unit. No layer is left out by itself: the paper leaves out the last one
    (``exclude=["head.*"]`` in ``attach``). Does not sync the host.

    Formula:
        for each unit, g <- g * c / max(n, c) with c = ratio * max(||w||, floor)

    Args:
        ratio: largest gradient norm as a share of the weights' norm, above 0.
        unit_dim: the dimension that counts units; 0 in torch's layout, 1 for transposed convolutions.
        floor: the weights' norm counts as at least this much, so that weights that start at zero can move.

    Cost:
        One read of the gradients and one of the weights; a second pass over the tensors above the bound. No state.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization", 2021.

    Example:
        >>> AdaptiveGradientClip(0.01)
        AdaptiveGradientClip()  # each output unit separately
    """

    spec_name: ClassVar[str] = "agc"
    ratio: float = 0.01
    _: KW_ONLY
    unit_dim: int = 0
    floor: float = 1e-3

    @property
    def parts(self) -> Clip:
        return Clip("unit", ParameterRatio(self.ratio, self.floor), Hard(), unit_dim=self.unit_dim)


@dataclass(frozen=True, repr=False)
class BlockRms(NamedPolicy):
    """Scale each parameter's gradient, separately, so that the root mean square of its entries is at most ``max_rms``.

    One bound serves tensors of all sizes, where `ClipByNorm` bounds large ones more tightly. Does not sync the host.

    Formula:
        for each tensor of m entries, g <- g / max(1, rms / c) with rms = ||g||_2 / sqrt(m) and c = max_rms

    Args:
        max_rms: largest root mean square of one tensor's entries, above 0, in the unit of the gradient.

    Cost:
        One read of the gradients; a second pass over those above the bound. No state.

    Raises:
        ValueError, TypeError: if ``max_rms`` is no positive number.

    Source:
        optax, ``clip_by_block_rms``, after Shazeer, Stern, "Adafactor: Adaptive learning rates with sublinear memory
        cost", 2018, who clip updates so.

    Example:
        >>> BlockRms(1.0)
        BlockRms(max_rms=1.0)  # each tensor separately
    """

    spec_name: ClassVar[str] = "block-rms"
    _positive = ("max_rms",)
    max_rms: float

    @property
    def parts(self) -> Clip:
        return Clip("tensor", RootMeanSquare(self.max_rms), Hard())
