"""Ranks put together powers of norms, which add up without leaving float64's range, and maxima."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.measure import Readings
from gradkeel.norms import combine
from gradkeel.ranks.layout import Layout

_POWERS = 900  # powers between 2^-900 and 2^900 add up in float64, for any number of ranks


WIDE = (torch.float64, torch.complex128)
"""Whose norms can leave the range in which float64 holds their squares."""


class PowerSums:
    """Turns norms of parts into numbers that add up, and their sums into norms of wholes.

    These are the norms' p-th powers. Where they can leave float64's range, each part has one number for each range of
    norms that it might be in, relative to that range's centre, so that ranks need not agree on a scale first: ``width``
    numbers for each norm. Without float64 entries on any rank norms lie between 2^-150 and 2^150. p is finite.
    """

    def __init__(self, norm_type: float, *, is_wide: bool) -> None:
        self._p = norm_type
        self._low, high = (-1075.0, 1024.0) if is_wide else (-150.0, 150.0)
        # Norms of an order up to 1 have powers as small as they are.
        self.width = 1 if norm_type <= 1 else math.ceil((high - self._low) * norm_type / (2 * _POWERS))
        self._step = (high - self._low) / self.width
        self._scales = [2.0 ** (self._low + (i + 0.5) * self._step) for i in range(self.width)]
        self._on: dict[torch.device, Tensor] = {}

    def of(self, norms: Tensor) -> Tensor:
        """Return [k, width] what is to be added up, of the norms [k] of parts."""
        if self.width == 1:
            return self._power(norms).unsqueeze(1)
        place = ((norms.log2() - self._low) / self._step).floor().nan_to_num(nan=0.0)
        which = place.clamp(0, self.width - 1).unsqueeze(1) == torch.arange(self.width, device=norms.device)
        return torch.where(which, self._power(norms.unsqueeze(1) / self._scales_on(norms)), 0.0)

    def norms(self, sums: Tensor) -> Tensor:
        """Return [n] norms of the wholes from the sums [n, width]."""
        if self.width == 1:
            return self._root(sums.squeeze(1))
        return combine(self._root(sums) * self._scales_on(sums), self._p)

    def _power(self, values: Tensor) -> Tensor:
        if self._p == 2.0:
            return values * values
        return values if self._p in (0.0, 1.0) else values.pow(self._p)

    def _root(self, values: Tensor) -> Tensor:
        if self._p == 2.0:
            return values.sqrt()
        return values if self._p in (0.0, 1.0) else values.pow(1.0 / self._p)

    def _scales_on(self, like: Tensor) -> Tensor:
        if like.device not in self._on:
            self._on[like.device] = torch.tensor(self._scales, dtype=like.dtype, device=like.device)
        return self._on[like.device]


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One kind of numbers of one selection."""

    selection: int  # the selection's index
    layout: Layout  # the selection's
    name: str  # the field of `Readings` that has them; "lowest" and "highest" are those of its peaks
    count: int  # how many all ranks have together
    of_units: bool  # whether they are those of units
    sums: PowerSums | None  # how they add up; None where the largest counts

    def read(self, readings: Readings) -> Tensor:
        """Return [k] this rank's numbers."""
        if self.name in ("lowest", "highest"):
            assert readings.peaks is not None, "the policy needs them"
            return -readings.peaks[:, 0] if self.name == "lowest" else readings.peaks[:, 1]
        return getattr(readings, self.name)

    def powers(self, values: Tensor, counted: Tensor | None) -> Tensor:
        """Return [count * width] this rank's share of the sums, of its values [k]."""
        assert self.sums is not None, "they add up"
        powers = self.sums.of(values)
        counted = self.layout.of_units(counted) if self.of_units else counted
        if counted is not None:
            powers = torch.where((counted | ~values.isfinite()).unsqueeze(1), powers, 0.0)
        if self._rows is not None:
            powers = powers.new_zeros(self.count, powers.shape[1]).index_add_(0, self._rows, powers)
        return powers.flatten()

    def maxima(self, values: Tensor) -> Tensor:
        """Return [count] this rank's share of the largest, of its values [k]; -inf of what it does not hold."""
        filled = self.layout.of_units(self.layout.filled) if self.of_units else self.layout.filled
        if filled is not None:
            values = torch.where(filled, values, -math.inf)
        if self._rows is None:
            return values
        return values.new_full((self.count,), -math.inf).scatter_reduce_(0, self._rows, values, "amax")

    def of_all(self, largest: Tensor) -> Tensor:
        """Return [count] the largest of all ranks' values; 0 of what no rank holds."""
        unfilled = self.layout.unfilled_units if self.of_units else self.layout.unfilled
        return largest if unfilled is None else largest.masked_fill(unfilled, 0.0)

    @property
    def _rows(self) -> Tensor | None:
        return self.layout.units_rows if self.of_units else self.layout.rows


def kinds_of(selection: int, layout: Layout) -> Iterator[Kind]:
    """Return what ranks exchange of a selection."""
    needs = layout.needs
    sums = None if math.isinf(needs.norm_type) else PowerSums(needs.norm_type, is_wide=layout.is_wide)
    for name in ("norms", "weights") if needs.weights else ("norms",):
        yield Kind(selection, layout, name, len(layout.names), of_units=False, sums=sums)
    if needs.unit_dim is not None:
        for name in ("units", "unit_weights") if needs.weights else ("units",):
            yield Kind(selection, layout, name, layout.unit_total, of_units=True, sums=sums)
    if needs.peaks:
        for name in ("lowest", "highest"):
            yield Kind(selection, layout, name, len(layout.names), of_units=False, sums=None)
