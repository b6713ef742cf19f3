"""The last norms of each cell, as statistics see them: of all cells in tensors, or of one cell in plain numbers."""

import math
from typing import Protocol

import torch
from torch import Tensor

from gradkeel.norms import combine
from gradkeel.policies.numbers import Number, log
from gradkeel.policies.states import Ring


class Window(Protocol):
    """Numbers that a statistic is taken of."""

    @property
    def number(self) -> Number:
        """How many there are."""

    def quantile(self, q: float) -> Number:
        """The q-quantile, interpolated linearly as ``torch.quantile`` and ``numpy.quantile`` do by default.

        It is inf where there are none.
        """

    def mean(self) -> Number:
        """Their mean; 0 where there are none."""

    def deviation(self, center: Number) -> Number:
        """The root of the sum of their squared distances from ``center``."""

    def logs(self) -> "Window":
        """Their logarithms."""

    def distances(self, center: Number) -> "Window":
        """Their distances from ``center``."""


def window_of(history: Number, seen: Number) -> Window:
    """What a ring (a tensor [k, window], or a `Ring`) holds after ``seen`` values."""
    if isinstance(history, Ring):
        return PlainWindow(history.ordered(min(seen, len(history.values))))
    number = seen.clamp(max=history.shape[1])
    filled = torch.arange(history.shape[1], device=number.device) < number.unsqueeze(1)
    return TensorWindow(history, filled, number)


def entered(history: Number, seen: Number, value: Number) -> Number:
    """The ring with one more value for each cell, at the place ``seen % window``."""
    if isinstance(history, Ring):
        return history.entered(seen, value)
    return history.scatter(1, (seen % history.shape[1]).unsqueeze(1), value.unsqueeze(1))


class TensorWindow:
    """All cells: ``values`` [k, window] count where ``filled`` [k, window]; ``number`` [k]. No host sync."""

    def __init__(self, values: Tensor, filled: Tensor, number: Tensor) -> None:
        self.values, self.filled, self.number = values, filled, number

    def quantile(self, q: float) -> Tensor:
        """[k] from the sorted rows."""
        ordered = torch.where(self.filled, self.values, math.inf).sort(dim=1).values
        position = q * (self.number - 1).clamp(min=0).to(ordered.dtype)
        below = position.floor()
        places = torch.stack([below, position.ceil()], dim=1).to(torch.int64)
        low, high = ordered.gather(1, places).unbind(1)
        # Equal neighbours, infinite ones among them, are the result themselves.
        return torch.where(low == high, low, low + (high - low) * (position - below))

    def mean(self) -> Tensor:
        """[k] of the filled places."""
        return torch.where(self.filled, self.values, 0.0).sum(1) / self.number.clamp(min=1)

    def deviation(self, center: Tensor) -> Tensor:
        """[k] of the filled places, relative to the largest: its square may be out of range."""
        return combine(torch.where(self.filled, self.distances(center).values, 0.0), 2.0)

    def logs(self) -> "TensorWindow":
        """Zeros, which stand where nothing is filled, are left out."""
        return TensorWindow(torch.where(self.filled, self.values, 1.0).log(), self.filled, self.number)

    def distances(self, center: Tensor) -> "TensorWindow":
        """From one center for each row."""
        return TensorWindow((self.values - center.unsqueeze(1)).abs(), self.filled, self.number)


class PlainWindow:
    """One cell: a list of plain numbers, ascending."""

    def __init__(self, ordered: list[float]) -> None:
        self.ordered, self.number = ordered, len(ordered)

    def quantile(self, q: float) -> float:
        """From the two places next to it."""
        if not self.ordered:
            return math.inf
        position = q * (self.number - 1)
        below = int(position)
        low, high = self.ordered[below], self.ordered[math.ceil(position)]
        return low if low == high else low + (high - low) * (position - below)

    def mean(self) -> float:
        """Of all."""
        return sum(self.ordered) / max(self.number, 1)

    def deviation(self, center: float) -> float:
        """Relative to the largest, as ``math.dist`` does it."""
        return math.dist(self.ordered, [center] * self.number)

    def logs(self) -> "PlainWindow":
        """Ascending too."""
        has_zeros = self.ordered and not self.ordered[0] > 0
        return PlainWindow(list(map(log if has_zeros else math.log, self.ordered)))

    def distances(self, center: float) -> "PlainWindow":
        """Sorted anew, which takes little time: they fall and then rise."""
        return PlainWindow(sorted([abs(value - center) for value in self.ordered]))
