"""Bounds that follow from running averages of a cell's norms, in constant memory.

The averages are of the logarithms of raw norms, for norms are skewed: one that is 1000 times too large moves an
average of norms by 1000 times as much as an ordinary one, and hides the next spike; it moves an average of logarithms
by ten times as much. Early averages are corrected for the weight that they still lack.
"""

import math
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import torch

from gradkeel.norms import State
from gradkeel.policies.base import positive
from gradkeel.policies.bounds.base import LEAST_SPREAD, AdaptiveBound, Bound
from gradkeel.policies.numbers import (
    Memory,
    Number,
    divide,
    exp,
    expm1,
    log,
    maximum,
    minimum,
    real,
    sqrt,
    where,
)
from gradkeel.policies.scopes import Cells


def share(seen: Number, decay: float, like: Number) -> Number:
    """Return [k] the newest value's weight in the bias-corrected exponential average of ``seen + 1``: 1, then falling.

    ``(1 - decay) / (1 - decay^(seen + 1))``: what dividing the average by its own weight comes to.
    """
    missing = -expm1(real(seen + 1, like) * math.log(decay))
    return minimum((1 - decay) / missing, 1.0)  # the first is 1, but for rounding


@lru_cache(maxsize=64)
def limited_variance(z: float) -> float:
    """Return the variance of a standard normal value limited to +-z, by which a variance of limited values is divided.

    Source:
        Huber, "Robust estimation of a location parameter", 1964, proposal 2.
    """
    inside = math.erf(z / math.sqrt(2))
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return inside - 2 * z * density + z * z * (1 - inside)


@dataclass(frozen=True)
class Ema(AdaptiveBound, on_numbers=True):
    """``ratio`` times the running geometric mean of the cell's own norms: ``ratio * exp(EMA(log n))``.

    Clips a share ``1 - Phi(ln(ratio) / s)`` of stationary log-normal norms whose logarithm has the standard deviation
    s: at s = 0.3, 43% for a ratio of 1.05 and 1% for a ratio of 2.

    State, besides `AdaptiveBound`'s: ``log_mean`` [k].

    Args:
        ratio: the bound as a multiple of the mean, above 0.
        decay: weight of the past in the average, between 0 and 1; 0.98 remembers about 50 steps.
        warmup: see `AdaptiveBound`.
        patience: see `AdaptiveBound`.
    """

    _positive, _shares = ("ratio",), ("decay",)
    ratio: float
    _: KW_ONLY
    decay: float = 0.98

    def start(self, cells: Cells) -> State:
        return {"log_mean": torch.zeros_like(cells.norms)}

    def learn(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        mean = state["log_mean"]
        return {"log_mean": mean + (log(cells.norms) - mean) * share(state["seen"], self.decay, mean)}

    def estimate(self, cells: Cells, state: Memory) -> Number:
        return self.ratio * exp(state["log_mean"])


@dataclass(frozen=True)
class RunningZScore(AdaptiveBound, on_numbers=True):
    """``exp(m + z s)`` with the running mean m and standard deviation s of the logarithm of norms.

    What is above it is clipped the harder the further it is out: a norm ``d = ln n - m`` standard deviations away is
    clipped to ``exp(m + z^2 s^2 / d)``, which is the bound at ``d = z s`` and nears the mean beyond.
    Clips a share ``1 - Phi(z)`` of stationary log-normal norms, 0.6% at z = 2.5, and somewhat more (0.8%) because the
    averages only estimate the two.

    After the warm-up an outlier enters the averages as if it were z standard deviations out: it widens s by 8% at
    z = 2.5 and so does not hide the next one, and 30 in a row widen it tenfold, so that a lasting shift is accepted.

    State, besides `AdaptiveBound`'s: ``log_mean`` [k], ``log_variance`` [k].

    Args:
        z: how many standard deviations above the mean, above 0.
        decay: weight of the past in the averages, between 0 and 1; 0.97 remembers about 33 steps.
        warmup: see `AdaptiveBound`.
        patience: see `AdaptiveBound`.
    """

    _positive, _shares = ("z",), ("decay",)
    z: float
    _: KW_ONLY
    decay: float = 0.97
    warmup: int = 25

    def start(self, cells: Cells) -> State:
        return {"log_mean": torch.zeros_like(cells.norms), "log_variance": torch.zeros_like(cells.norms)}

    def learn(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        """Update the averages by a weighted form of Welford's formula, whose variance cannot go negative."""
        mean, variance = state["log_mean"], state["log_variance"]
        weight = share(state["seen"], self.decay, mean)
        delta = log(cells.norms) - mean
        warm, margin = state["seen"] >= self.warmup, self._margin(state)
        limited = where(warm, minimum(maximum(delta, -margin), margin), delta)
        square = limited * limited
        square = where(warm, square / limited_variance(self.z), square)
        return {
            "log_mean": mean + weight * limited,
            "log_variance": (1 - weight) * (variance + weight * square),
        }

    def _margin(self, state: Memory) -> Number:
        return self.z * maximum(sqrt(state["log_variance"]), LEAST_SPREAD)

    def estimate(self, cells: Cells, state: Memory) -> Number:
        margin = self._margin(state)
        distance = maximum(log(cells.norms) - state["log_mean"], margin)
        return exp(state["log_mean"] + divide(margin * margin, distance))


@dataclass(frozen=True)
class GeometricQuantile(Bound, on_numbers=True):
    """The q-quantile of norms, followed by multiplication: ``c <- c * exp(-eta * (1[n <= c] - q))``.

    Clips a share ``1 - q`` of norms in the long run, whatever their distribution, stationary or not: each norm above
    the bound raises it, so it finds its way after any shift (tenfold within ``2.3 / (eta * q)`` steps).

    State: ``quantile`` [k].

    Args:
        q: which quantile, between 0 and 1.
        eta: how fast it moves: by ``eta * q`` upwards and ``eta * (1 - q)`` downwards a step, in logarithms.
        initial: the first bound; the first valid norm unless given.

    Source:
        Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", 2021.
    """

    _positive, _shares = ("eta",), ("q",)
    q: float
    _: KW_ONLY
    eta: float = 0.2
    initial: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial is not None:
            positive("GeometricQuantile", "initial", self.initial)

    def init(self, cells: Cells) -> State:
        """Return the first bound; inf where it is not given."""
        return {"quantile": torch.full_like(cells.norms, math.inf if self.initial is None else self.initial)}

    def bound(self, cells: Cells, state: Memory) -> Number:
        return state["quantile"]

    def update(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        """Move the quantile towards this step's norms; the first norm becomes the quantile."""
        fallen, risen = (bound * math.exp(self.eta * (self.q - below)) for below in (1, 0))
        moved = where(cells.norms <= bound, fallen, risen)
        return {"quantile": where(bound == math.inf, cells.norms, moved)}
