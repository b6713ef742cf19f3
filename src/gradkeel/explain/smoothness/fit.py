"""From pairs of gradient norm and local smoothness to (L0, L1), or to the reason why there is none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.language import count, say
from gradkeel.policies import ClipByGlobalNorm
from gradkeel.policies.base import positive

Interval = tuple[float, float]
_UNKNOWN = (math.nan, math.nan)

FEWEST = 20
"""Pairs below which no relation is claimed."""
LEAST_CORRELATION = 0.5
"""Of the logarithms: below it the norm explains less than a quarter of the smoothness' variation."""
STEEPEST = 2.0
"""Slope in log-log above which ``L0 + L1 * norm``, whose slope is at most 1, is no description."""
RESAMPLES = 200
COVERAGE = 0.9


@dataclass(frozen=True, slots=True)
class SmoothnessFit:
    """``smoothness = L0 + L1 * norm`` fitted to measurements, and how far to trust it.

    Intervals hold 90% of the values that resampled runs give (blocks of neighbouring steps are drawn together, for
    neighbours resemble each other).

    Attributes:
        count: number of pairs that entered.
        L0: smoothness at a vanishing gradient, in the unit of 1 / lr.
        L1: growth of smoothness with the norm, in the unit of 1 / (lr * norm).
        envelope: L0 and L1 of the smallest multiple of the fit that no measurement exceeds.
        correlation: Pearson's r of log smoothness and log norm.
        slope: of the straight line through log smoothness over log norm.
        L0_interval, L1_interval, correlation_interval, slope_interval: of these.
        related: whether an (L0, L1) relation describes the measurements.
        reason: why, in words.
    """

    count: int
    L0: float = math.nan
    L1: float = math.nan
    L0_interval: Interval = _UNKNOWN
    L1_interval: Interval = _UNKNOWN
    envelope: tuple[float, float] = _UNKNOWN
    correlation: float = math.nan
    correlation_interval: Interval = _UNKNOWN
    slope: float = math.nan
    slope_interval: Interval = _UNKNOWN
    related: bool = False
    reason: str = ""

    def without_constants(self, reason: str) -> "SmoothnessFit":
        """The correlation and slope alone, not related for the ``reason`` given."""
        return SmoothnessFit(
            self.count,
            correlation=self.correlation,
            correlation_interval=self.correlation_interval,
            slope=self.slope,
            slope_interval=self.slope_interval,
            reason=reason,
        )

    @property
    def max_step(self) -> float | None:
        """``1 / L1`` of the envelope: no ``lr * bound`` above it is safe at any learning rate; None if not related.

        It is the step's length in the unit of the weights, and does not depend on the learning rate: when you halve
        the learning rate, double the bound.
        """
        return 1.0 / self.envelope[1] if self.related else None

    def safe_bound(self, lr: float) -> float | None:
        """The largest bound on the gradient norm under which clipped gradient descent does not increase the loss.

        ``bound = (1/lr - L0) / L1`` with the envelope's L0 and L1, from ``lr * (L0 + L1 * bound) <= 1``. For plain
        SGD. It is conservative: training often goes well, and faster, with a larger one. None where the measurements
        show no relation, and where no bound helps because ``lr > 1/L0`` (lower the learning rate).

        Raises:
            ValueError: if ``lr`` is no positive number.
        """
        if not lr > 0 or math.isinf(lr):
            raise ValueError(f"safe_bound(lr={lr!r}): lr must be a positive number")
        l0, l1 = self.envelope
        if not self.related or lr * l0 >= 1:
            return None
        return (1.0 / lr - l0) / l1


def fit_smoothness(norms: Sequence[float], smoothness: Sequence[float]) -> SmoothnessFit:
    """Fit ``smoothness = L0 + L1 * norm`` with L0, L1 >= 0 by least squares of the logarithms.

    Logarithms, because measured smoothness scatters by a factor, not by an amount. Resampling is seeded: the same
    pairs give the same result.

    Args:
        norms: gradient norms, above 0, in the order of the steps.
        smoothness: local smoothness at the same steps, above 0.

    Raises:
        ValueError: for sequences of different length, or a value that is not a positive number.

    Example:
        >>> fit = fit_smoothness([float(n) for n in range(1, 31)], [2.0 + 3.0 * n for n in range(1, 31)])
        >>> round(fit.L0, 3), round(fit.L1, 3), fit.related
        (2.0, 3.0, True)
        >>> round(fit.safe_bound(0.1), 3)
        2.667
    """
    n, smooth = _checked("norms", norms), _checked("smoothness", smoothness)
    if n.numel() != smooth.numel():
        raise ValueError(
            f"fit_smoothness: norms and smoothness must have as many values, not {n.numel()} and {smooth.numel()}"
        )
    if n.numel() < 3:
        return SmoothnessFit(n.numel(), reason=_too_few(n.numel()))
    drawn = _resample(n.numel())
    l0, l1 = _fit_rows(n[None], smooth[None])
    many_l0, many_l1 = _fit_rows(n[drawn], smooth[drawn], rounds=2)  # 4% in L0 / L1, well within the interval
    r, slope = _line(n[None].log(), smooth[None].log())
    many_r, many_slope = _line(n[drawn].log(), smooth[drawn].log())
    cover = float((smooth / (l0 + l1 * n)).amax())
    r_interval, slope_interval = _interval(many_r), _interval(many_slope)
    related, reason = _verdict(n.numel(), float(r), r_interval, float(slope))
    return SmoothnessFit(
        count=n.numel(),
        L0=float(l0),
        L1=float(l1),
        L0_interval=_interval(many_l0),
        L1_interval=_interval(many_l1),
        envelope=(cover * float(l0), cover * float(l1)),
        correlation=float(r),
        correlation_interval=r_interval,
        slope=float(slope),
        slope_interval=slope_interval,
        related=related,
        reason=reason,
    )


def theorem_3(L0: float, L1: float) -> tuple[float, ClipByGlobalNorm]:
    """The learning rate and the clipping for which the paper proves that the largest gradient does not matter.

    ``lr = 1 / (10 L0)`` and ``bound = min(1 / lr, 1 / (10 L1 lr))``, for plain gradient descent.

    Args:
        L0: smoothness at a vanishing gradient, above 0.
        L1: growth of smoothness with the gradient norm, above 0.

    Raises:
        ValueError, TypeError: if one is no positive number.

    Source:
        Zhang, He, Sra, Jadbabaie, "Why gradient clipping accelerates training", ICLR 2020, theorem 3.

    Example:
        >>> theorem_3(16.0, 1.0)
        (0.00625, ClipByGlobalNorm(max_norm=16.0)  # all tensors together)
    """
    lr = 1 / (10 * positive("theorem_3", "L0", L0))
    return lr, ClipByGlobalNorm(min(1 / lr, 1 / (10 * positive("theorem_3", "L1", L1) * lr)))


def _checked(name: str, values: Sequence[float]) -> Tensor:
    result = torch.as_tensor(values, dtype=torch.float64, device="cpu").reshape(-1)
    wrong = ~(torch.isfinite(result) & (result > 0))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"fit_smoothness({name}[{i}]={float(result[i])!r}): must be a positive number; leave out measurements that "
            "are not resolved"
        )
    return result


def _measurements(n: int) -> str:
    return count(n, "{n} measurement", "{n} measurements")


def _too_few(n: int, seen: str = "") -> str:
    return say(
        "no (L0, L1) relation can be seen in {measurements}; at least {fewest} are needed{seen}",
        measurements=_measurements(n),
        fewest=FEWEST,
        seen=seen,
    )


def _resample(count: int) -> Tensor:
    """[RESAMPLES, count] indices: circular blocks of neighbours, about as many as their length (cube root rule)."""
    generator = torch.Generator().manual_seed(0)
    length = max(1, round(count ** (1 / 3)))
    starts = torch.randint(
        count, (RESAMPLES, math.ceil(count / length), 1), generator=generator, device="cpu"
    )
    return ((starts + torch.arange(length, device="cpu")) % count).flatten(1)[:, :count]


def _fit_rows(n: Tensor, smoothness: Tensor, *, rounds: int = 4) -> tuple[Tensor, Tensor]:
    """[b] L0 and [b] L1 of each row of [b, count] pairs.

    With a = L0 / L1 the best log L1 is the mean of log smoothness - log(a + n), so a alone is searched: grids in log a,
    each around the best of the one before.
    """
    low, high = (n.amin(1).log() - 7.0), (n.amax(1).log() + 7.0)
    target = smoothness.log()
    for _ in range(rounds):
        grid = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 33, dtype=n.dtype, device="cpu")
        residual = target[:, None] - (grid.exp()[:, :, None] + n[:, None]).log()
        best = residual.var(2, correction=0).argmin(1, keepdim=True)
        width = (high - low) / 32
        centre = grid.gather(1, best)[:, 0]
        low, high = centre - width, centre + width
    # A ratio that no norm comes near is no constant that the pairs could show.
    ratio = torch.where(centre.exp() < 0.01 * n.amin(1), 0.0, centre.exp())
    l1 = (target - (ratio[:, None] + n).log()).mean(1).exp()
    return ratio * l1, l1


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[b] Pearson's r and [b] slope of each row; NaN where x or y does not vary."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    xy, xx, yy = (x * y).mean(1), (x * x).mean(1), (y * y).mean(1)
    return xy / (xx * yy).sqrt(), xy / xx


def _interval(values: Tensor) -> Interval:
    tail = (1 - COVERAGE) / 2
    low, high = torch.nanquantile(values, values.new_tensor([tail, 1 - tail])).tolist()
    return low, high


def _verdict(n: int, r: float, r_interval: Interval, slope: float) -> tuple[bool, str]:
    """Whether there is a relation, and why."""
    low, high = r_interval
    seen = say(
        " (r = {r:.2f}, {low:.2f} to {high:.2f}; slope {slope:.2f}; {measurements})",
        r=r,
        low=low,
        high=high,
        slope=slope,
        measurements=_measurements(n),
    )
    if n < FEWEST:
        return False, _too_few(n, seen)
    if not math.isfinite(r):
        return False, say(
            "no (L0, L1) relation: the gradient norm or the smoothness did not vary ({measurements})",
            measurements=_measurements(n),
        )
    if high < 0:
        return False, say(
            "no (L0, L1) relation: smoothness falls while the gradient norm rises{seen}", seen=seen
        )
    if r < LEAST_CORRELATION or low <= 0:
        return False, say(
            "no (L0, L1) relation: the gradient norm says little about smoothness{seen}", seen=seen
        )
    if slope > STEEPEST:
        return False, say(
            "no (L0, L1) relation: smoothness grows as the norm to the power {slope:.2f}, not 1{seen}",
            slope=slope,
            seen=seen,
        )
    return True, say("smoothness grows with the gradient norm{seen}", seen=seen)
