"""This module shows a cell's last norms to statistics: those of all cells in tensors, or of one in plain numbers."""

import math
from typing import Protocol

import torch
from torch import Tensor

from gradkeel.norms import combine
from gradkeel.policies.numbers import Number, log
from gradkeel.policies.states import Ring, ascending
from gradkeel.policies.symbols import Symbol


class Window(Protocol):
    """A window holds the numbers that a statistic is taken of."""

    @property
    def number(self) -> Number:
        """The window holds so many numbers."""

    def quantile(self, q: float) -> Number:
        """Return the q-quantile, interpolated linearly as ``torch.quantile`` and ``numpy.quantile`` do by default.

        It is inf for an empty window.
        """

    def mean(self) -> Number:
        """Return the numbers' mean; 0 for an empty window."""

    def deviation(self, center: Number) -> Number:
        """Return the root of the sum of the squared distances from ``center``."""

    def logs(self) -> "Window":
        """Return the window of the logarithms."""

    def distances(self, center: Number) -> "Window":
        """Return the window of the distances from ``center``."""


def window_of(history: Number, seen: Number) -> Window:
    """Return what a ring (a tensor [k, window], or what stands for one cell's `Ring`) holds after ``seen`` values."""
    if isinstance(history, Symbol):
        return WrittenWindow(history.call(plain_window, history, seen, operation="window"))
    number = seen.clamp(max=history.shape[1])
    filled = torch.arange(history.shape[1], device=number.device) < number.unsqueeze(1)
    return TensorWindow(history, filled, number)


def entered(history: Number, seen: Number, value: Number) -> Number:
    """Return the ring with one more value for each cell, at the place ``seen % window``."""
    if isinstance(history, Symbol):
        return history.call(Ring.entered, history, seen, value, operation="entered")
    return history.scatter(1, (seen % history.shape[1]).unsqueeze(1), value.unsqueeze(1))


class TensorWindow:
    """The windows of all cells: ``values`` [k, window] count where ``filled``; ``number`` [k]. No host sync."""

    def __init__(self, values: Tensor, filled: Tensor, number: Tensor) -> None:
        self.values, self.filled, self.number = values, filled, number

    def quantile(self, q: float) -> Tensor:
        ordered = torch.where(self.filled, self.values, math.inf).sort(dim=1).values
        position = q * (self.number - 1).clamp(min=0).to(ordered.dtype)
        below = position.floor()
        places = torch.stack([below, position.ceil()], dim=1).to(torch.int64)
        low, high = ordered.gather(1, places).unbind(1)
        # Equal neighbours, infinite ones among them, are the result themselves.
        return torch.where(low == high, low, low + (high - low) * (position - below))

    def mean(self) -> Tensor:
        return torch.where(self.filled, self.values, 0.0).sum(1) / self.number.clamp(min=1)

    def deviation(self, center: Tensor) -> Tensor:
        """Return [k] of the filled places; the largest is divided out, for its square may be out of range."""
        return combine(torch.where(self.filled, self.distances(center).values, 0.0), 2.0)

    def logs(self) -> "TensorWindow":
        """Return the logarithms; places that are not filled hold 0, which has none, and count as 1."""
        return TensorWindow(torch.where(self.filled, self.values, 1.0).log(), self.filled, self.number)

    def distances(self, center: Tensor) -> "TensorWindow":
        return TensorWindow((self.values - center.unsqueeze(1)).abs(), self.filled, self.number)


def plain_window(ring: Ring, seen: int) -> "PlainWindow":
    """Return what one cell's ring holds after ``seen`` values."""
    return PlainWindow(ring.ordered(min(seen, len(ring.values))))


class PlainWindow:
    """The window of one cell: plain numbers, ascending."""

    def __init__(self, ordered: list[float]) -> None:
        self.ordered = ordered

    def __len__(self) -> int:
        return len(self.ordered)

    def quantile(self, q: float) -> float:
        if not self.ordered:
            return math.inf
        position = q * (len(self.ordered) - 1)
        below = int(position)
        low, high = self.ordered[below], self.ordered[math.ceil(position)]
        return low if low == high else low + (high - low) * (position - below)

    def mean(self) -> float:
        return sum(self.ordered) / max(len(self.ordered), 1)

    def deviation(self, center: float) -> float:
        """Return it by ``math.dist``, which divides the largest out."""
        return math.dist(self.ordered, [center] * len(self.ordered))

    def logs(self) -> "PlainWindow":
        """Return the logarithms, which ascend too."""
        has_zeros = self.ordered and not self.ordered[0] > 0
        return PlainWindow(list(map(log if has_zeros else math.log, self.ordered)))

    def distances(self, center: float) -> "PlainWindow":
        """Return the distances, sorted anew, which takes little time: they fall and then rise."""
        return PlainWindow(ascending([abs(value - center) for value in self.ordered]))


class WrittenWindow:
    """What stands for a `PlainWindow` in a formula that is written down."""

    def __init__(self, window: Symbol) -> None:
        self._window = window

    @property
    def number(self) -> Symbol:
        return self._window.call(len, self._window, operation="length")

    def quantile(self, q: float) -> Symbol:
        return self._window.call(PlainWindow.quantile, self._window, q, operation="quantile")

    def mean(self) -> Symbol:
        return self._window.call(PlainWindow.mean, self._window, operation="mean")

    def deviation(self, center: Number) -> Symbol:
        return self._window.call(PlainWindow.deviation, self._window, center, operation="deviation")

    def logs(self) -> "WrittenWindow":
        return WrittenWindow(self._window.call(PlainWindow.logs, self._window, operation="logs"))

    def distances(self, center: Number) -> "WrittenWindow":
        return WrittenWindow(
            self._window.call(PlainWindow.distances, self._window, center, operation="distances")
        )
