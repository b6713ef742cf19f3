"""Named policies that scale every gradient, not only those above a bound."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from gradkeel.policies.base import Scope
from gradkeel.policies.bounds.fixed import Constant, Smoothness
from gradkeel.policies.clip import Clip
from gradkeel.policies.forms import Rescale, Smooth
from gradkeel.policies.recipes.named import NamedPolicy


@dataclass(frozen=True, repr=False)
class SmoothClip(NamedPolicy):
    """Scale gradients by ``c / (c + n)``, which bounds the norm by ``max_norm`` without a kink.

    Every gradient is scaled, small ones a little: between half of and all of what `ClipByGlobalNorm` leaves. Does not
    sync the host.

    Formula:
        g <- g * c / (c + n) with n the norm of the scope and c = max_norm

    Args:
        max_norm: the norm that large gradients approach, above 0, in the unit of the gradient.
        scope: what is scaled together: unit, tensor, group or global.

    Cost:
        One read of the gradients and always a second pass. No state.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Zhang, He, Sra, Jadbabaie, "Why gradient clipping accelerates training", 2020: their clipped
        gradient descent in smooth form.

    Example:
        >>> SmoothClip(1.0)
        SmoothClip(max_norm=1.0)  # all tensors together
    """

    spec_name: ClassVar[str] = "smooth"
    _positive = ("max_norm",)
    max_norm: float
    _: KW_ONLY
    scope: Scope = "global"

    @property
    def parts(self) -> Clip:
        return Clip(self.scope, Constant(float(self.max_norm)), Smooth())


@dataclass(frozen=True, repr=False)
class Normalize(NamedPolicy):
    """Scale gradients so that their norm always is ``norm``; small gradients grow.

    The only policy besides `SmoothnessStep` whose coefficient may exceed 1. The step length no longer falls as the
    gradient vanishes, so the learning rate has to. Does not sync the host.

    Formula:
        g <- g * c / n with n the norm of the scope and c = norm

    Args:
        norm: the norm after scaling, above 0, in the unit of the gradient.
        scope: what is scaled together: unit, tensor, group or global.

    Cost:
        One read of the gradients and always a second pass. No state.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Hazan, Levy, Shalev-Shwartz, "Beyond convexity: Stochastic quasi-convex optimization", 2015.

    Example:
        >>> Normalize(0.5)
        Normalize(norm=0.5)  # all tensors together
    """

    spec_name: ClassVar[str] = "normalize"
    _positive = ("norm",)
    norm: float = 1.0
    _: KW_ONLY
    scope: Scope = "global"

    @property
    def parts(self) -> Clip:
        return Clip(self.scope, Constant(float(self.norm)), Rescale())


@dataclass(frozen=True, repr=False)
class SmoothnessStep(NamedPolicy):
    """Make the step ``1 / (L0 + L1 n)`` long, the best one under (L0, L1)-smoothness.

    For plain SGD, whose learning rate is then a share of the best step: 1 takes all of it, and the theory's
    guarantees want 0.1. The coefficient exceeds 1 where ``L0 + L1 n`` is below 1. L0 and L1 can be measured:
    ``gradkeel smoothness``. Does not sync the host.

    Formula:
        g <- g / (L0 + L1 n) with n the norm of all gradients together

    Args:
        L0: curvature where the gradient vanishes, above 0.
        L1: growth of the curvature with the gradient norm, above 0.

    Cost:
        One read of the gradients and always a second pass. No state.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Zhang, He, Sra, Jadbabaie, "Why gradient clipping accelerates training", 2020.

    Example:
        >>> SmoothnessStep(16.0, 1.0)
        SmoothnessStep(L0=16.0, L1=1.0)  # all tensors together
    """

    spec_name: ClassVar[str] = "smoothness-step"
    L0: float
    L1: float

    @property
    def parts(self) -> Clip:
        return Clip("global", Smoothness(self.L0, self.L1), Rescale())
