"""A layout never changes from step to step: it knows all ranks' parameters, and this rank's part in each."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradkeel.errors import SelectionError
from gradkeel.norms import Decision, GradientNorms, Needs
from gradkeel.ranks.group import Ranks
from gradkeel.tensors import coordinate, local_part, units_here


class Parameter(NamedTuple):
    """A rank tells this of one of its parameters; it is equal on ranks whose parameters are the same."""

    name: str  # the parameter's; those of one name on several ranks are one parameter
    group: int  # its group's index in the optimizer
    shape: tuple[int, ...]  # of the whole, as far as the rank knows
    is_wide: bool = False  # whether its entries are float64
    is_split: bool = False  # whether its placements cut it into several pieces
    is_alias: bool = False  # whether it was declared a copy of what other ranks hold
    # which entry of ``shard_over`` declares it one of several pieces; None where none does
    entry: int | None = None
    dim: int | None = None  # the dimension along which these pieces lie, where that was told
    mesh: int = -1  # which of its set's meshes it lies on; -1 for a plain tensor
    axes: tuple[int, ...] = ()  # the mesh axes that split it


Holding = tuple[int, int | None, int, tuple[int, ...]]
"""How the ranks of one set hold a parameter: the set, and the parameter's entry, mesh and axes."""


class Manifest(NamedTuple):
    """A manifest says what a rank has; ranks with equal ones need to tell it only once."""

    # each selection's label and policy, and what is done to non-finite gradients
    kinds: tuple[tuple[str, str], ...]
    parameters: tuple[tuple[Parameter, ...], ...]  # each selection's
    # shape and ranks of the meshes on which they lie
    meshes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    unmatched: tuple[str, ...]  # patterns of ``shard_over`` that match nothing here


@dataclass(frozen=True, slots=True, eq=False)
class Census:
    """The census knows, alike on all ranks, which rank has which set of parameters."""

    ranks: Ranks  # who takes part
    sets: Sequence[Manifest]  # the distinct manifests, by their first ranks
    whose: Tensor  # [ranks] which of them each rank has
    # [ranks, entries] which piece each rank has of what its entries of ``shard_over`` declare
    indices: Tensor
    # Few parameters lie in ways of their own, so that what follows is found once for all that lie alike.
    _pieces: dict[tuple[Holding, ...], tuple[list[list[int]], list[list[int]], int]] = field(
        default_factory=dict, init=False
    )
    _holders: dict[object, Tensor] = field(default_factory=dict, init=False)

    def index(self, entry: int | None) -> int:
        """Tell which piece this rank has of what an entry of ``shard_over`` declares; -1 of a whole."""
        return -1 if entry is None else int(self.indices[self.ranks.here, entry])

    def pieces(self, held: tuple[Holding, ...]) -> tuple[list[list[int]], list[list[int]], int]:
        """Return each holding's declared pieces that no earlier one has, and the earlier ones that share some.

        And how many ranks hold something.
        """
        if held not in self._pieces:
            count = sum(len(self._places(one)) for one in held)
            own = [sorted(set(self._index_of(one, self._places(one)).tolist())) for one in held]
            fresh = [sorted(set(found).difference(*own[:i])) for i, found in enumerate(own)]
            shared = [
                [j for j in range(i) if not set(own[j]).isdisjoint(found)] for i, found in enumerate(own)
            ]
            self._pieces[held] = fresh, shared, count
        return self._pieces[held]

    def holders(self, held: tuple[Holding, ...], index: int, where: tuple[int, ...]) -> Tensor:
        """Return [k] places of the ranks that hold the piece of this index and mesh coordinate, in order."""
        key = held, index, where
        if key not in self._holders:
            found, members = [], torch.tensor(self.ranks.members, device="cpu")
            for one in held:
                set_number, _, mesh, axes = one
                places = self._places(one)
                places = places[self._index_of(one, places) == index]
                if len(axes) != len(where):
                    continue
                if mesh >= 0:
                    shape, ranks = self.sets[set_number].meshes[mesh]
                    copies = torch.tensor(ranks, device="cpu").view(shape)
                    for axis, at in zip(axes, where, strict=True):
                        copies = copies[(slice(None),) * axis + (slice(at, at + 1),)]
                    places = places[torch.isin(members[places], copies)]
                found.append(places)
            self._holders[key] = torch.cat(found).unique()
        return self._holders[key]

    def _places(self, one: Holding) -> Tensor:
        return (self.whose == one[0]).nonzero().flatten()

    def _index_of(self, one: Holding, places: Tensor) -> Tensor:
        return torch.full_like(places, -1) if one[1] is None else self.indices[places, one[1]]


class _Whole:
    """One parameter as all ranks together hold it; ``parts``: how each set of parameters, by its number, has it.

    Raises:
        SelectionError: where copies have different shapes, or it cannot be known which units the pieces are of.
    """

    def __init__(self, census: Census, parts: Sequence[tuple[int, Parameter]], unit_dim: int | None) -> None:
        self.name, self.group = parts[0][1].name, parts[0][1].group
        self.has_owner = any(not part.is_alias for _, part in parts)
        owners = [(i, part) for i, part in parts if not (part.is_alias and self.has_owner)]
        self.held: tuple[Holding, ...] = tuple((i, p.entry, p.mesh, p.axes) for i, p in owners)
        self._fresh, shared, holders = census.pieces(self.held)
        self._parts = [part for _, part in owners]
        for part, others in zip(self._parts, shared, strict=True):
            for other in others:
                self._check_copies(self._parts[other].shape, part.shape)
        filled = [
            (len(fresh), part)
            for fresh, part in zip(self._fresh, self._parts, strict=True)
            if 0 not in part.shape
        ]
        self.size = sum(count * math.prod(part.shape) for count, part in filled)
        self.is_split = sum(count for count, _ in filled) > 1 or any(part.is_split for _, part in filled)
        self.is_wide = any(part.is_wide for part in self._parts)
        self.is_plain = all(part.mesh < 0 for part in self._parts)
        # The pieces' numbers: -1 that of a whole.
        self.slots = max((fresh[-1] for fresh in self._fresh if fresh), default=-1) + 2
        self.has_copies = holders > sum(map(len, self._fresh))
        self.units, self._is_stacked = 0, False
        if unit_dim is not None:
            self._count_units(unit_dim)
        self.unit_size = self.size // max(1, self.units)

    def _check_copies(self, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        if one != other:
            raise SelectionError(
                f"ranks have parameters of the name {self.name!r} with the shapes {one} and {other}, so they are no "
                "copies; give them names of their own (attach(model=...), named parameters), or, if they are pieces "
                "of one, say so with attach(shard_over=...)"
            )

    def _count_units(self, unit_dim: int) -> None:
        self._rows = [1 if len(part.shape) <= 1 else part.shape[unit_dim] for part in self._parts]
        self.units = self._rows[0]
        if sum(map(len, self._fresh)) == 1 or all(len(part.shape) <= 1 for part in self._parts):
            return
        if any(part.dim is None for part in self._parts):
            raise SelectionError(
                f"shard_over: {self.name!r} is clipped unit by unit, and its pieces may be of the same units or of "
                f"others; say along which dimension it is split: {{{self.name!r}: (group, {unit_dim})}}"
            )
        self._is_stacked = self._parts[0].dim == unit_dim
        if self._is_stacked:
            self.units = self.first_unit(math.inf)

    def first_unit(self, index: float) -> int:
        """Count the units in the pieces before the one of this index."""
        if not self._is_stacked:
            return 0
        return sum(
            bisect_left(fresh, index) * rows for fresh, rows in zip(self._fresh, self._rows, strict=True)
        )


class Layout:
    """The selection of this number over all ranks, and which of its parameters and units lie on this one.

    Attributes:
        names, groups, sizes: of the n parameters that any rank has, group by group and rank by rank, as one process
            would have them.
        unit_total: how many units they have together.
        here: k, the number of this rank's parameters.
        is_wide: whether any entries are float64.
        is_split: whether other ranks have parts of them, or further ones; copies are none.
        rows: [k] indices of this rank's parameters among the n; None if it has all of them, in the same order.
        units_rows: the same for its units.
        unit_counts: how many units this rank has of each of its k parameters.
        counted: [k] bool: whether this rank is the first that holds this piece, so that it counts; None: all are.
        unit_counted: the same for units.
        filled: [k] bool: whether there are entries on this rank, of no alias; None: there are, everywhere.
        unfilled: [n] bool: whether no rank has any entries; None: there are, everywhere.
        pieces: which piece of each parameter is here; those that count for another rank's are left out.
        slots: [k] int64 where the numbers of copies that must be alike are compared; -1 for parameters without.
        slot_names: for each slot, the parameter's name.
    """

    def __init__(
        self, census: Census, selection: int, needs: Needs, parameters: Sequence[Tensor], device: torch.device
    ) -> None:
        self.needs, self.here = needs, len(parameters)
        parts: dict[str, list[tuple[int, Parameter]]] = {}
        for number, one in enumerate(census.sets):
            for parameter in one.parameters[selection]:
                parts.setdefault(parameter.name, []).append((number, parameter))
        wholes = sorted(
            (_Whole(census, found, needs.unit_dim) for found in parts.values()), key=lambda whole: whole.group
        )
        self.names = tuple(whole.name for whole in wholes)
        self.groups = tuple(whole.group for whole in wholes)
        self.sizes = tuple(whole.size for whole in wholes)
        self._units = tuple(w.units for w in wholes), tuple(w.unit_size for w in wholes)
        self.unit_total = sum(self._units[0])
        self.is_wide = any(whole.is_wide for whole in wholes)
        own = census.sets[int(census.whose[census.ranks.here])].parameters[selection]
        self._place(census, wholes, own, parameters, device)
        here = set(self._positions)
        self.is_split = any(w.is_split for w in wholes) or len(here) < len(wholes)
        self.unfilled = self.unfilled_units = None
        if 0 in self.sizes:
            self.unfilled = torch.tensor(self.sizes, device=device) == 0
            counts = torch.tensor(self._units[0], dtype=torch.int64, device=device)
            self.unfilled_units = self.unfilled.repeat_interleave(counts) if len(counts) else None

    def _place(
        self,
        census: Census,
        wholes: Sequence[_Whole],
        own: Sequence[Parameter],
        parameters: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        """Find out what is here of each whole."""
        position = {whole.name: i for i, whole in enumerate(wholes)}
        first_unit, first_slot, self.slot_names = [0], [0], list[str]()
        for whole in wholes:
            first_unit.append(first_unit[-1] + whole.units)
            compared = whole.slots if whole.is_plain and whole.has_copies else 0
            first_slot.append(first_slot[-1] + compared)
            self.slot_names += [whole.name] * compared
        self.pieces: dict[str, tuple[int, ...]] = {}
        self._holders: list[Tensor] = []
        self._positions, self._elsewhere = list[int](), list[bool]()
        rows, counted, filled, slots = list[Tensor](), list[bool](), list[bool](), list[int]()
        seen: set[int] = set()
        for tensor, parameter in zip(parameters, own, strict=True):
            at, where, index = position[parameter.name], coordinate(tensor), census.index(parameter.entry)
            whole = wholes[at]
            is_owner = where is not None and not (parameter.is_alias and whole.has_owner)
            holders = (
                census.holders(whole.held, index, where)
                if is_owner and where is not None
                else torch.zeros(0, device="cpu")
            )
            if where is not None and not parameter.is_alias:
                self.pieces[parameter.name] = where if index < 0 else (index, *where)
            self._elsewhere.append(where is None)
            has_entries = is_owner and local_part(tensor).numel() > 0
            counted.append(has_entries and at not in seen and int(holders[0]) == census.ranks.here)
            seen.add(at)
            filled.append(has_entries)
            self._holders.append(holders)
            self._positions.append(at)
            is_compared = is_owner and first_slot[at] < first_slot[at + 1]
            slots.append(first_slot[at] + index + 1 if is_compared else -1)
            if self.needs.unit_dim is not None:
                units = units_here(tensor, self.needs.unit_dim)
                first = first_unit[at] + whole.first_unit(index)
                rows.append(_indices(units) + first)
        self.rows = _unless_all(
            torch.tensor(self._positions, dtype=torch.int64, device="cpu"), len(wholes), device
        )
        self.units_rows = _unless_all(torch.cat([_indices(()), *rows]), self.unit_total, device)
        self.unit_counts = tuple(map(len, rows))
        self._unit_counts = torch.tensor(self.unit_counts, dtype=torch.int64, device=device)
        self.counted, self.filled = _unless_true(counted, device), _unless_true(filled, device)
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device) if self.slot_names else None
        self._has_copies = [len(one) > 1 for one in self._holders]

    def units(self, dim: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how many units along ``dim`` each of the n has, and entries a unit; empty where dim is None."""
        return ((), ()) if dim is None else self._units

    def of_units(self, mask: Tensor | None) -> Tensor | None:
        """Return [units] what a [k] mask says of each unit's parameter."""
        if mask is None:
            return None
        # The sum is known, so that the host need not ask for it.
        return mask.repeat_interleave(self._unit_counts, output_size=sum(self.unit_counts))

    def present(self, own: Sequence[bool]) -> tuple[bool, ...]:
        """Tell which of the n have a gradient, as far as this rank knows; those of other ranks count."""
        lacking = {
            position
            for position, here, is_elsewhere in zip(self._positions, own, self._elsewhere, strict=True)
            if not (here or is_elsewhere)
        }
        return tuple(position not in lacking for position in range(len(self.names)))

    def copied(self, own: Sequence[bool]) -> tuple[bool, ...]:
        """Tell which of the pieces that other ranks hold too have a gradient here."""
        return tuple(here for here, has in zip(own, self._has_copies, strict=True) if has)

    def told_present(self, own: Sequence[bool]) -> Tensor:
        """Return [n] uint8: which of the n have a gradient on this rank."""
        result = torch.zeros(len(self.names), dtype=torch.uint8, device="cpu")
        for position, here in zip(self._positions, own, strict=True):
            result[position] |= here
        return result

    def counting(self, present: Tensor, here: int, device: torch.device) -> Tensor:
        """Return [k] bool: whether this rank, the one at ``here``, is the first that has a gradient of this piece.

        ``present`` [ranks, n] is what ranks told.
        """
        counted = [True] * len(self._positions) if self.counted is None else self.counted.tolist()
        for i, (position, holders) in enumerate(zip(self._positions, self._holders, strict=True)):
            having = holders[present[holders, position] > 0]
            if len(holders) > 1 and len(having):
                counted[i] = int(having[0]) == here
        return torch.tensor(counted, dtype=torch.bool, device=device)

    def decision(self, decision: Decision) -> Decision:
        """Return the part of a decision that is about this rank's parameters."""
        coefficients, units = decision.coefficients, decision.unit_coefficients
        if self.rows is not None and coefficients is not None and coefficients.dim():
            coefficients = coefficients.index_select(0, self.rows)
        if self.units_rows is not None and units is not None:
            units = units.index_select(0, self.units_rows)
        return replace(decision, coefficients=coefficients, unit_coefficients=units, bound=None)

    def measured(self, measured: GradientNorms) -> GradientNorms:
        """Return what applying a decision looks at, for this rank's parameters."""
        peaks, norms = measured.peaks, measured.norms
        if self.rows is not None:
            norms = norms.index_select(0, self.rows)
            peaks = None if peaks is None else peaks.index_select(0, self.rows)
        counts = self.unit_counts if measured.unit_counts else ()
        return replace(measured, norms=norms, peaks=peaks, unit_counts=counts)


def _indices(values: Sequence[int]) -> Tensor:
    if isinstance(values, range):
        return torch.arange(values.start, values.stop, values.step, device="cpu")
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _unless_all(indices: Tensor, count: int, device: torch.device) -> Tensor | None:
    """Return the indices; None if they are all of ``count``, in order."""
    return None if torch.equal(indices, torch.arange(count, device="cpu")) else indices.to(device)


def _unless_true(flags: Sequence[bool], device: torch.device) -> Tensor | None:
    """Return the flags; None if all are true."""
    return None if all(flags) else torch.tensor(flags, device=device)
