"""Bounds that follow from the last ``window`` valid norms of a cell; the norm at hand is not among them."""

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from gradkeel.norms import State
from gradkeel.policies.base import between, count, positive
from gradkeel.policies.bounds.base import LEAST_SPREAD, AdaptiveBound
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
        """Check the arguments."""
        super().__post_init__()
        count(type(self).__name__, "window", self.window, least=2)
        if self.warmup > self.window:
            raise ValueError(
                f"{type(self).__name__}(warmup={self.warmup}, window={self.window}): warmup must not be above window, "
                "for no more norms than that are kept"
            )

    @abstractmethod
    def statistic(self, history: Tensor, filled: Tensor, number: Tensor) -> Tensor:
        """[k] the bound; ``history`` [k, window] counts where ``filled`` [k, window], ``number`` [k] entries a row."""

    def start(self, cells: Cells) -> State:
        """An empty ring."""
        return {"history": cells.norms.new_zeros(cells.norms.shape[0], self.window)}

    def learn(self, cells: Cells, state: State, bound: Tensor) -> State:
        """The ring with this step's norms."""
        return self.entered(cells.norms, state)

    def estimate(self, cells: Cells, state: State) -> Tensor:
        """The statistic of what is filled."""
        return self.statistic(state["history"], *self.filled(state))

    def entered(self, values: Tensor, state: State) -> State:
        """The ring with these values [k]."""
        place = (state["seen"] % self.window).unsqueeze(1)
        return {"history": state["history"].scatter(1, place, values.unsqueeze(1))}

    def filled(self, state: State) -> tuple[Tensor, Tensor]:
        """[k, window] which entries of the ring count, and [k] how many."""
        number = state["seen"].clamp(max=self.window)
        return torch.arange(self.window, device=number.device) < number.unsqueeze(1), number


@dataclass(frozen=True)
class Quantile(Windowed):
    """The q-quantile of the last norms, interpolated linearly between neighbours.

    Clips a share ``1 - q`` of stationary norms, whatever their distribution.

    Args:
        q: which quantile, between 0 and 1.
        window: how many norms are looked at.
        warmup: see `AdaptiveBound`.
        patience: see `AdaptiveBound`.
    """

    q: float
    _: KW_ONLY
    window: int = 1000
    warmup: int = 50

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        between("Quantile", "q", self.q, 0, 1)

    def statistic(self, history: Tensor, filled: Tensor, number: Tensor) -> Tensor:
        """[k] the quantile."""
        return quantile(history, filled, number, self.q)


@dataclass(frozen=True)
class ZScore(Windowed):
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

    z: float
    _: KW_ONLY
    warmup: int = 64
    limited: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        positive("ZScore", "z", self.z)
        count("ZScore", "warmup", self.warmup, least=2)

    def learn(self, cells: Cells, state: State, bound: Tensor) -> State:
        """The ring with this step's norms, limited."""
        norms = cells.norms
        if self.limited:
            mean, std = self._moments(state["history"], *self.filled(state))
            reach = torch.where(state["seen"] >= self.warmup, 2 * self.z * std, math.inf)
            norms = torch.clamp(norms, mean - reach, mean + reach)
        return self.entered(norms, state)

    def statistic(self, history: Tensor, filled: Tensor, number: Tensor) -> Tensor:
        """[k] mean + z std."""
        mean, std = self._moments(history, filled, number)
        return mean + self.z * std

    def _moments(self, history: Tensor, filled: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.where(filled, history, 0.0).sum(1) / number.clamp(min=1)
        deviations = torch.where(filled, history - mean.unsqueeze(1), 0.0)
        std = torch.linalg.vector_norm(deviations, dim=1) / (number - 1).clamp(min=1).to(mean.dtype).sqrt()
        # From a spread of nothing, limited values could never widen it.
        return mean, torch.maximum(std, (1e-3 if self.limited else ROUNDING) * mean.abs())


@dataclass(frozen=True)
class RobustZScore(Windowed):
    """``exp(median + z * 1.4826 * MAD)`` of the logarithms of the last norms, MAD the median absolute deviation.

    Half of the window may be outliers before they move it. Clips a share ``1 - Phi(z)`` of stationary log-normal
    norms: 2.3% at z = 2, 0.13% at z = 3; the shorter the window, the more, for it only estimates the two.

    Args:
        z: how many standard deviations above the median, above 0.
        window: how many norms are looked at.
        warmup: see `AdaptiveBound`.
        patience: see `AdaptiveBound`.
    """

    z: float
    _: KW_ONLY
    warmup: int = 32

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        positive("RobustZScore", "z", self.z)

    def statistic(self, history: Tensor, filled: Tensor, number: Tensor) -> Tensor:
        """[k] exp(median + z std), std estimated by the MAD."""
        logs = torch.where(filled, history, 1.0).log()
        median = quantile(logs, filled, number, 0.5)
        deviation = quantile((logs - median.unsqueeze(1)).abs(), filled, number, 0.5)
        return torch.exp(median + self.z * (MAD_TO_STD * deviation).clamp(min=LEAST_SPREAD))


def quantile(values: Tensor, filled: Tensor, number: Tensor, q: float) -> Tensor:
    """[k] q-quantile of the ``number`` filled entries of each row of ``values`` [k, window]; inf for an empty row.

    Interpolates linearly, as ``torch.quantile`` and ``numpy.quantile`` do by default. No host sync.
    """
    ordered = torch.where(filled, values, math.inf).sort(dim=1).values
    position = q * (number - 1).clamp(min=0).to(values.dtype)
    below = position.floor()
    low = ordered.gather(1, below.to(torch.int64).unsqueeze(1)).squeeze(1)
    high = ordered.gather(1, position.ceil().to(torch.int64).unsqueeze(1)).squeeze(1)
    # Equal neighbours, infinite ones among them, are the result themselves.
    return torch.where(low == high, low, low + (high - low) * (position - below))
