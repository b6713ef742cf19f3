"""Bounds that follow from the last ``window`` valid norms of a cell; the norm at hand is not among them."""

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass

from gradkeel.norms import State
from gradkeel.policies.base import count
from gradkeel.policies.bounds.base import LEAST_SPREAD, AdaptiveBound
from gradkeel.policies.bounds.window import Window, entered, window_of
from gradkeel.policies.numbers import Memory, Number, exp, maximum, minimum, real, sqrt, where
from gradkeel.policies.scopes import Cells

# Standard deviations of a normal distribution per median absolute deviation.
MAD_TO_STD = 1.4826022185056018
# Values that agree to this share are told apart by rounding only.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Windowed(AdaptiveBound):
    """A bound that is a statistic of the last ``window`` valid norms.

    State, besides `AdaptiveBound`'s: ``history`` [k, window], a ring whose next row is ``seen % window``.
    """

    _: KW_ONLY
    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        count(type(self).__name__, "window", self.window, least=2)
        if self.warmup > self.window:
            raise ValueError(
                f"{type(self).__name__}(warmup={self.warmup}, window={self.window}): warmup must not be above window, "
                "for no more norms than that are kept"
            )

    @abstractmethod
    def statistic(self, window: Window) -> Number:
        """Return [k] the bound that follows from the last norms."""

    def start(self, cells: Cells) -> State:
        return {"history": cells.norms.new_zeros(cells.norms.shape[0], self.window)}

    def learn(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        return {"history": entered(state["history"], state["seen"], cells.norms)}

    def estimate(self, cells: Cells, state: Memory) -> Number:
        return self.statistic(window_of(state["history"], state["seen"]))


@dataclass(frozen=True)
class Quantile(Windowed, on_numbers=True):
    """The q-quantile of the last norms, interpolated linearly between neighbours.

    Clips a share ``1 - q`` of stationary norms, whatever their distribution.

    Args:
        q: which quantile, between 0 and 1.
        window: how many norms are looked at.
        warmup: see `AdaptiveBound`.
        patience: see `AdaptiveBound`.
    """

    _shares = ("q",)
    q: float
    _: KW_ONLY
    window: int = 1000
    warmup: int = 50

    def statistic(self, window: Window) -> Number:
        return window.quantile(self.q)


@dataclass(frozen=True)
class ZScore(Windowed, on_numbers=True):
    """``mean + z * std`` of the last norms, with the unbiased standard deviation.

    Of normally distributed stationary norms a share ``1 - Phi(z)`` is above it; of skewed ones more.

    After the warm-up an outlier enters the window as if it were 2 z standard deviations out: so it does not hide the
    next one, and several in a row still widen the window's spread until they are none.

    Args:
        z: how many standard deviations above the mean, above 0.
        window: how many norms are looked at.
        warmup: see `AdaptiveBound`.
        patience: see `AdaptiveBound`.
        limited: False lets outliers into the window as they are, as OLMo-core does: one of 1000 times the usual norm
            then hides all smaller ones until it leaves the window.
    """

    _positive = ("z",)
    z: float
    _: KW_ONLY
    warmup: int = 64
    limited: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        count("ZScore", "warmup", self.warmup, least=2)

    def learn(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        norms = cells.norms
        if self.limited:
            mean, std = self._moments(window_of(state["history"], state["seen"]))
            reach = where(state["seen"] >= self.warmup, 2 * self.z * std, math.inf)
            norms = minimum(maximum(norms, mean - reach), mean + reach)
        return {"history": entered(state["history"], state["seen"], norms)}

    def statistic(self, window: Window) -> Number:
        mean, std = self._moments(window)
        return mean + self.z * std

    def _moments(self, window: Window) -> tuple[Number, Number]:
        mean = window.mean()
        std = window.deviation(mean) / sqrt(real(maximum(window.number - 1, 1), mean))
        # From a spread of nothing, limited values could never widen it.
        return mean, maximum(std, (1e-3 if self.limited else ROUNDING) * abs(mean))


@dataclass(frozen=True)
class RobustZScore(Windowed, on_numbers=True):
    """``exp(median + z * 1.4826 * MAD)`` of the logarithms of the last norms, MAD the median absolute deviation.

    Half of the window may be outliers before they move it. Clips a share ``1 - Phi(z)`` of stationary log-normal
    norms: 2.3% at z = 2, 0.13% at z = 3; the shorter the window, the more, for it only estimates the two.

    Args:
        z: how many standard deviations above the median, above 0.
        window: how many norms are looked at.
        warmup: see `AdaptiveBound`.
        patience: see `AdaptiveBound`.
    """

    _positive = ("z",)
    z: float
    _: KW_ONLY
    warmup: int = 32

    def statistic(self, window: Window) -> Number:
        logs = window.logs()
        median = logs.quantile(0.5)
        deviation = logs.distances(median).quantile(0.5)
        return exp(median + self.z * maximum(MAD_TO_STD * deviation, LEAST_SPREAD))
