"""Named policies whose bound follows from earlier steps."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from gradkeel.policies.base import Policy, Scope, count
from gradkeel.policies.bounds.published import PublishedEma, PublishedZScore
from gradkeel.policies.bounds.running import Ema, GeometricQuantile, RunningZScore
from gradkeel.policies.bounds.windowed import Quantile, RobustZScore
from gradkeel.policies.clip import Clip
from gradkeel.policies.compose.chain import Warmup
from gradkeel.policies.forms import Hard
from gradkeel.policies.recipes.clips import ClipByGlobalNorm
from gradkeel.policies.recipes.named import NamedPolicy


@dataclass(frozen=True, repr=False)
class AutoClip(NamedPolicy):
    """Clip to a quantile of the last norms.

    Clips a share ``1 - q`` of stationary norms, whatever their distribution. The norm at hand is not in the window.
    The paper's q = 0.1 clips nine steps of ten, which is normalized SGD in all but name. After a fall of the norm the
    bound stays loose until the window holds the new norms. Does not sync the host.

    Formula:
        g <- g * c / max(n, c) with c the q-quantile of the last `window` norms

    Args:
        q: which quantile, between 0 and 1.
        window: how many norms are looked at.
        warmup: how many norms must have been seen before any is clipped.
        patience: how many clipped steps in a row make the window start afresh; None turns that off.
        scope: what is measured and scaled together: unit, tensor, group or global.

    Cost:
        One read of the gradients; a second pass where the norm is above the bound. State of `window` numbers for each
        cell of the scope, sorted each step.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive gradient clipping for source separation networks",
        2020; the window is from its PyTorch package (``warmup=1, patience=None`` is that package).

    Example:
        >>> AutoClip(0.9)
        AutoClip()  # all tensors together
    """

    spec_name: ClassVar[str] = "autoclip"
    q: float = 0.9
    _: KW_ONLY
    window: int = 1000
    warmup: int = 50
    patience: int | None = 100
    scope: Scope = "global"

    @property
    def parts(self) -> Clip:
        bound = Quantile(self.q, window=self.window, warmup=self.warmup, patience=self.patience)
        return Clip(self.scope, bound, Hard())


@dataclass(frozen=True, repr=False)
class QuantileClip(NamedPolicy):
    """Clip to a quantile of norms that is followed with one number of memory.

    Clips a share ``1 - q`` of norms in the long run, stationary or not. After a tenfold rise it takes about
    ``2.3 / (eta * q)`` steps (13 with the defaults), after a tenfold fall ``2.3 / (eta * (1 - q))`` (115). Does not
    sync the host.

    Formula:
        g <- g * c / max(n, c), then c <- c * exp(-eta * (1[n <= c] - q))

    Args:
        q: which quantile, between 0 and 1.
        eta: how fast the bound moves, above 0.
        initial: the first bound; the first norm unless given.
        scope: what is measured and scaled together: unit, tensor, group or global.

    Cost:
        One read of the gradients; a second pass where the norm is above the bound. State of one number for each cell.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", 2021,
        without the noise.

    Example:
        >>> QuantileClip(0.9, scope="tensor")
        QuantileClip(scope='tensor')  # each tensor separately
    """

    spec_name: ClassVar[str] = "quantile"
    q: float = 0.9
    _: KW_ONLY
    eta: float = 0.2
    initial: float | None = None
    scope: Scope = "global"

    @property
    def parts(self) -> Clip:
        return Clip(self.scope, GeometricQuantile(self.q, eta=self.eta, initial=self.initial), Hard())


@dataclass(frozen=True, repr=False)
class ZClip(NamedPolicy):
    """Clip norms that are outliers among the recent ones, the harder the further out they are.

    By default hardened: the z-score is that of the logarithm of raw norms (norms are skewed), an outlier enters the
    averages as if it were just z standard deviations out (so it neither hides the next one nor keeps them from
    following a shift), averages are corrected for their start, and after ``patience`` clips in a row the statistics
    start afresh. Clips 0.8% of stationary log-normal norms at z = 2.5.
    ``reference=True`` is the paper to the digit, with its weakness: after a lasting fourfold rise of the norm it clips
    for thousands of steps. Does not sync the host.

    Formula:
        d = ln n - m; where d > z s: g <- g * exp(m + z^2 s^2 / d) / n,
        with m and s the running mean and standard deviation of ln n (of n itself under reference)

    Args:
        z: how many standard deviations above the mean a norm may be, above 0.
        decay: weight of the past in the running averages, between 0 and 1.
        warmup: how many norms must have been seen before any is clipped.
        patience: how many clipped steps in a row make the statistics start afresh; None turns that off.
        scope: what is measured and scaled together: unit, tensor, group or global.
        reference: the published form instead of the hardened one; it knows no patience.

    Cost:
        One read of the gradients; a second pass where the norm is above the bound. State of five numbers for each
        cell.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Kumar, Owen, Chowdhury, Güra, "ZClip: Adaptive spike mitigation for LLM pre-training", 2025.

    Example:
        >>> ZClip()
        ZClip()  # all tensors together
    """

    spec_name: ClassVar[str] = "zclip"
    z: float = 2.5
    _: KW_ONLY
    decay: float = 0.97
    warmup: int = 25
    patience: int | None = 100
    scope: Scope = "global"
    reference: bool = False

    @property
    def parts(self) -> Clip:
        hardened = RunningZScore(self.z, decay=self.decay, warmup=self.warmup, patience=self.patience)
        bound = PublishedZScore(self.z, self.decay, self.warmup) if self.reference else hardened
        return Clip(self.scope, bound, Hard())


@dataclass(frozen=True, repr=False)
class RobustClip(NamedPolicy):
    """Clip norms that are outliers by median and median absolute deviation of the last ones.

    Up to half of the window may be outliers before they move the bound. Clips a share ``1 - Phi(z)`` of stationary
    log-normal norms: 0.13% at z = 3, about twice that with a window of 128, which only estimates the two. Does not
    sync the host.

    Formula:
        g <- g * c / max(n, c) with c = exp(median(ln n) + z * 1.4826 * MAD(ln n)) of the last `window` norms

    Args:
        z: how many standard deviations above the median a norm may be, above 0.
        window: how many norms are looked at.
        warmup: how many norms must have been seen before any is clipped.
        patience: how many clipped steps in a row make the window start afresh; None turns that off.
        scope: what is measured and scaled together: unit, tensor, group or global.

    Cost:
        One read of the gradients; a second pass where the norm is above the bound. State of `window` numbers for each
        cell of the scope, sorted twice each step.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Hampel, "The influence curve and its role in robust estimation", 1974, on median and MAD; the recipe is
        gradkeel's own.

    Example:
        >>> RobustClip(z=4.0)
        RobustClip(z=4.0)  # all tensors together
    """

    spec_name: ClassVar[str] = "robust"
    z: float = 3.0
    _: KW_ONLY
    window: int = 128
    warmup: int = 32
    patience: int | None = 100
    scope: Scope = "global"

    @property
    def parts(self) -> Clip:
        bound = RobustZScore(self.z, window=self.window, warmup=self.warmup, patience=self.patience)
        return Clip(self.scope, bound, Hard())


@dataclass(frozen=True, repr=False)
class AdaGC(NamedPolicy):
    """Clip each tensor relative to the running average of its own norms, after a warm-up under a global bound.

    By default hardened: the average is the geometric mean of raw norms, corrected for its start, and after
    ``patience`` clips in a row it starts afresh. Clips a share ``1 - Phi(ln(ratio) / s)`` of stationary log-normal
    norms whose logarithm varies by s: 43% at the published ratio of 1.05 and s = 0.3, 1% at a ratio of 2.
    ``reference=True`` is the paper to the digit: it feeds the average with what it has clipped, and so clips about
    70%. Does not sync the host.

    Formula:
        up to step `warmup`: g <- g * min(1, warmup_norm / n) with n the norm of all gradients together;
        then for each tensor, g <- g * c / max(n, c) with c = ratio * (running mean of that tensor's n)

    Args:
        ratio: a tensor's bound as a multiple of its running mean, above 0.
        decay: weight of the past in the running mean, between 0 and 1.
        warmup: how many steps the global bound is in force, at least 2; under reference, one fewer.
        warmup_norm: the global bound of the warm-up, above 0, in the unit of the gradient.
        patience: how many clips of a tensor in a row make its mean start afresh; None turns that off.
        reference: the published form instead of the hardened one; it knows no patience.

    Cost:
        One read of the gradients; a second pass over the tensors above their bounds. State of four numbers for each
        tensor.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Wang et al., "AdaGC: Improving training stability for large language model pretraining", 2025, algorithm 1.

    Example:
        >>> AdaGC(2.0).spec
        'adagc:ratio=2.0'
    """

    spec_name: ClassVar[str] = "adagc"
    _positive = ("warmup_norm",)
    ratio: float = 1.05
    _: KW_ONLY
    decay: float = 0.98
    warmup: int = 100
    warmup_norm: float = 1.0
    patience: int | None = 100
    reference: bool = False

    def __post_init__(self) -> None:
        count("AdaGC", "warmup", self.warmup, least=2)
        super().__post_init__()

    @property
    def parts(self) -> Policy:
        hardened = Ema(self.ratio, decay=self.decay, patience=self.patience)
        if self.reference:
            published = PublishedEma(self.ratio, self.decay, self.warmup, self.warmup_norm)
            return Clip("tensor", published, Hard())
        return Warmup(self.warmup, ClipByGlobalNorm(self.warmup_norm), Clip("tensor", hardened, Hard()))
