"""The gradient noise scale: up to which size a larger batch pays, from norms of micro-batch gradients alone.

Source: McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training", 2018, appendix A; here for
micro-batches of unequal size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """Estimates summed over accumulation windows; ``add`` and ``add_running`` return the sum with one window more.

    Numerator and denominator are summed over windows before they are divided: the quotient of one window is biased,
    and either of its parts may be negative.

    Attributes:
        noise: sum over windows of the estimates of ``tr(Sigma)``, the variance of one item's gradient.
        signal: sum over windows of the estimates of ``|G|^2``, the squared norm of the expected gradient.
        windows: number of windows.

    Example:
        >>> scale = NoiseScale().add([1, 3], part_norms=[2.0, 3.0], total_norm=4.0)
        >>> scale.noise, scale.signal, scale.value
        (3.0, 0.25, 12.0)
    """

    noise: float = 0.0
    signal: float = 0.0
    windows: int = 0

    @property
    def value(self) -> float | None:
        """``B_simple = tr(Sigma) / |G|^2`` in items; None while the estimate of either is not positive.

        Well below it, a batch twice as large saves nearly half of the steps; well above it, nearly none. A
        diagnostic: it says nothing about which batch generalizes best.
        """
        return self.noise / self.signal if self.noise > 0 and self.signal > 0 else None

    def add(
        self, weights: Sequence[float], *, part_norms: Sequence[float], total_norm: float
    ) -> "NoiseScale":
        """Add a window whose micro-batch gradients were measured one by one.

        With ``s_i`` the SUMMED gradient of the ``b_i`` items of micro-batch i, ``S = sum s_i`` and ``B = sum b_i``:
        ``A = sum |s_i|^2 / b_i``, ``C = |S|^2 / B``, ``tr(Sigma) = (A - C) / (m - 1)``,
        ``|G|^2 = (C - tr(Sigma)) / B``: both unbiased for any sizes, as long as items are independent.

        Args:
            weights: [m] numbers of items b_i, above 0; m at least 2.
            part_norms: [m] norms ``|s_i|``.
            total_norm: norm ``|S|``.

        Raises:
            ValueError: for fewer than two micro-batches, sequences of different length, or a weight not above 0.
        """
        _check("add", weights, part_norms)
        items = math.fsum(weights)
        inner = math.fsum(norm * norm / weight for norm, weight in zip(part_norms, weights, strict=True))
        outer = total_norm * total_norm / items
        noise = (inner - outer) / (len(weights) - 1)
        return self._with(noise, (outer - noise) / items)

    def add_running(self, weights: Sequence[float], *, sum_norms: Sequence[float]) -> "NoiseScale":
        """Add a window of which only the growing ``.grad`` was measured, after each backward.

        ``E |S_k|^2 = B_k^2 |G|^2 + B_k tr(Sigma)`` for the running sum S_k of B_k items, so that ``|S_k|^2 / B_k`` over
        B_k is a straight line with slope ``|G|^2`` and intercept ``tr(Sigma)``, fitted by least squares. Unbiased, and
        noisier than `add`, which sees each part; it costs no copy of the gradients.

        Args:
            weights: [m] numbers of items b_i, above 0; m at least 2.
            sum_norms: [m] norms ``|S_k|`` of the running sums of summed gradients.

        Raises:
            ValueError: as `add`.
        """
        _check("add_running", weights, sum_norms)
        items = list(accumulate(weights))
        heights = [norm * norm / count for norm, count in zip(sum_norms, items, strict=True)]
        centre, level = math.fsum(items) / len(items), math.fsum(heights) / len(items)
        spread = math.fsum((count - centre) ** 2 for count in items)
        slope = math.fsum((count - centre) * y for count, y in zip(items, heights, strict=True)) / spread
        return self._with(level - slope * centre, slope)

    def _with(self, noise: float, signal: float) -> "NoiseScale":
        return NoiseScale(self.noise + noise, self.signal + signal, self.windows + 1)


def _check(method: str, weights: Sequence[float], norms: Sequence[float]) -> None:
    if len(weights) < 2:
        raise ValueError(
            f"NoiseScale.{method}: needs two micro-batches or more, not {len(weights)}; noise is their difference"
        )
    if len(norms) != len(weights):
        raise ValueError(
            f"NoiseScale.{method}: weights and norms must be as many, not {len(weights)} and {len(norms)}"
        )
    for i, weight in enumerate(weights):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(
                f"NoiseScale.{method}(weights[{i}]={weight!r}): every weight must be a positive number"
            )
