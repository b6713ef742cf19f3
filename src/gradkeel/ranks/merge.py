"""Puts together what ranks have measured of the same parameters: copies count once, parts add up as powers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.errors import SelectionError
from gradkeel.norms import combine


@dataclass(frozen=True, slots=True)
class Entry:
    """What one rank tells of one of its parameters.

    Attributes:
        name: the parameter's; entries of one name on several ranks are one parameter.
        group: its group's index in the optimizer.
        shape: of the whole, as far as this rank knows.
        key: which piece is here; equal keys are copies. None is a copy of what other ranks hold.
        row_key: of which units; pieces with equal row keys hold parts of the same units.
        rows: indices of these units in the whole.
        size: number of entries here.
        index: place among the pieces of a parameter that was declared to be split; None for others.
        split_dim: the dimension along which it is split, where that was told.
    """

    name: str
    group: int
    shape: tuple[int, ...]
    key: tuple[int, ...] | None = ()
    row_key: tuple[int, ...] = ()
    rows: Sequence[int] = ()
    size: int = 0
    index: int | None = None
    split_dim: int | None = None


Cells = Mapping[tuple[int, ...], Sequence[int]]
"""For each piece of one thing, where in the gathered numbers its first unit's stands, copy after copy."""


class Merge:
    """Combines gathered numbers into those of whole parameters or units, with one table of indices made beforehand.

    Args:
        blocks: for each run of units that lie alike: their indices in the result, and their cells.
        device: of the gathered numbers.
    """

    def __init__(self, blocks: Sequence[tuple[Sequence[int], Cells]], device: torch.device) -> None:
        tables: dict[tuple[int, int], list[Tensor]] = {}
        targets: dict[tuple[int, int], list[Tensor]] = {}
        for rows, cells in blocks:
            copies = max(len(places) for places in cells.values())
            # A piece with fewer copies repeats one: the largest of them is the same.
            starts = [[*places, *[places[0]] * (copies - len(places))] for places in cells.values()]
            shape = (len(starts), copies)
            tables.setdefault(shape, []).append(
                torch.tensor(starts) + torch.arange(len(rows)).reshape(-1, 1, 1)
            )
            targets.setdefault(shape, []).append(torch.tensor(list(rows), dtype=torch.int64))
        self._tables = [torch.cat(parts).to(device) for parts in tables.values()]
        order = torch.cat([torch.cat(parts) for parts in targets.values()]) if targets else torch.zeros(0)
        in_order = torch.equal(order, torch.arange(len(order)))
        self._order = None if in_order else torch.argsort(order).to(device)

    def __call__(self, gathered: Tensor, norm_type: float) -> Tensor:
        """[m] norms of the wholes from the gathered numbers [cells]; does not sync the host."""
        parts = [self._combined(gathered[table], norm_type) for table in self._tables]
        if not parts:
            return gathered.new_zeros(0)
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values if self._order is None else values.index_select(0, self._order)

    @staticmethod
    def _combined(values: Tensor, norm_type: float) -> Tensor:
        """[m] from [m, pieces, copies]."""
        pieces = values.squeeze(2) if values.shape[2] == 1 else values.amax(2)
        return pieces.squeeze(1) if pieces.shape[1] == 1 else combine(pieces, norm_type)


@dataclass(frozen=True, slots=True)
class Placed:
    """An entry on its rank: where its norm stands among its rank's, and where the first of its units."""

    entry: Entry
    rank: int
    position: int
    row: int


class Whole:
    """One parameter as all ranks together hold it.

    Args:
        placed: its entries, rank by rank.
        unit_dim: the dimension that counts units; None where nobody looks at units.

    Attributes:
        name: the parameter's.
        group: its group's index in the optimizer.
        size: number of entries of the whole.
        units: how many units the whole has.
        unit_size: how many entries a unit has.

    Raises:
        SelectionError: where copies have different shapes, or it cannot be known which units the pieces are of.
    """

    def __init__(self, placed: Sequence[Placed], unit_dim: int | None) -> None:
        self.name, self.group = placed[0].entry.name, placed[0].entry.group
        owners = [p for p in placed if p.entry.key is not None] or list(placed)
        # An empty piece says nothing, and would be a 0 among the lowest and highest entries.
        self._owners = [p for p in owners if p.entry.size] or owners
        self._check_copies(owners)
        parts = {p.entry.index: p.entry for p in owners}
        self._first_unit: dict[int | None, int] = {}
        self.size = self.units = 0
        for index in sorted(parts, key=lambda i: -1 if i is None else i):
            part = parts[index]
            self.size += math.prod(part.shape)
            if unit_dim is not None:
                self._count_units(part, unit_dim, alone=len(parts) == 1)
        self.unit_size = self.size // max(1, self.units)

    def _check_copies(self, owners: Sequence[Placed]) -> None:
        shapes: dict[tuple[int, ...] | None, tuple[int, ...]] = {}
        for p in owners:
            shape = shapes.setdefault(p.entry.key, p.entry.shape)
            if shape != p.entry.shape:
                raise SelectionError(
                    f"ranks have parameters of the name {self.name!r} with the shapes {shape} and {p.entry.shape}, so "
                    "they are no copies; give them names of their own (attach(model=...), named parameters), or, if "
                    "they are pieces of one, say so with attach(shard_over=...)"
                )

    def _count_units(self, part: Entry, unit_dim: int, *, alone: bool) -> None:
        if len(part.shape) <= 1 or alone:
            self._first_unit[part.index] = 0
            self.units = 1 if len(part.shape) <= 1 else part.shape[unit_dim]
            return
        if part.split_dim is None:
            raise SelectionError(
                f"shard_over: {self.name!r} is clipped unit by unit, and its pieces may be of the same units or of "
                f"others; say along which dimension it is split: {{{self.name!r}: (group, {unit_dim})}}"
            )
        beside = part.split_dim == unit_dim
        self._first_unit[part.index] = self.units if beside else 0
        self.units = part.shape[unit_dim] + (self.units if beside else 0)

    @property
    def is_split(self) -> bool:
        """Whether it lies in more than one piece."""
        return len({p.entry.key for p in self._owners}) > 1

    def rows_of(self, entry: Entry) -> list[int]:
        """Indices, in the whole, of the units that an entry has."""
        first = self._first_unit.get(entry.index, 0)
        return [first + row for row in entry.rows]

    def cells(self, starts: Sequence[int]) -> Cells:
        """Where its pieces' numbers stand, if each rank's first stands at ``starts``."""
        return _by_key([(p.entry.key or (), starts[p.rank] + p.position) for p in self._owners])

    def unit_blocks(self, first: int, starts: Sequence[int]) -> Iterator[tuple[list[int], Cells]]:
        """For each run of units that lie alike: their indices, counted from ``first``, and where the numbers stand."""
        runs: dict[tuple[object, ...], list[Placed]] = {}
        for p in self._owners:
            offset = self._first_unit.get(p.entry.index, 0)
            runs.setdefault((offset, p.entry.row_key), []).append(p)
        for members in runs.values():
            rows = [first + row for row in self.rows_of(members[0].entry)]
            if rows:
                yield rows, _by_key([(p.entry.key or (), starts[p.rank] + p.row) for p in members])

    def copies(self, starts: Sequence[int]) -> list[list[tuple[int, int]]]:
        """The holders, as in `holders`, of each piece that more than one rank has."""
        by_key: dict[tuple[int, ...] | None, list[tuple[int, int]]] = {}
        for p in self._owners:
            by_key.setdefault(p.entry.key, []).append((p.rank, starts[p.rank] + p.position))
        return [places for places in by_key.values() if len(places) > 1]

    def holders(self, starts: Sequence[int]) -> list[tuple[int, int]]:
        """Each rank that holds some of it, as a place in the group, and where its norm stands."""
        return [(p.rank, starts[p.rank] + p.position) for p in self._owners]


def _by_key(places: Sequence[tuple[tuple[int, ...], int]]) -> dict[tuple[int, ...], list[int]]:
    result: dict[tuple[int, ...], list[int]] = {}
    for key, place in places:
        result.setdefault(key, []).append(place)
    return result
