"""Puts local norms together across ranks: one collective a step for norms, weights, flags and losses alike.

Each rank gathers every rank's numbers and combines them in the same order, so all come to the same bits. Norms
travel, not their powers: neither can overflow, and any norm type, maxima and sums share the one message.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradkeel.errors import RankError
from gradkeel.measure.local import Locally, indices_unless_all
from gradkeel.measure.merge import Entry, Merge, Placed, Whole
from gradkeel.measure.powers import wide_dtype
from gradkeel.measure.ranks import Ranks
from gradkeel.norms import Needs

_FAILED, _GRADIENTS, _FOUND_INF, _WEIGHT, _LOSS, _HAS_LOSS = range(6)
_HEAD = 6


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """The norms of a selection's stored gradients, without prescale: one rank's, or all ranks' together.

    Attributes:
        present: which of the parameters have a gradient.
        norms, units, peaks: as in `gradkeel.norms.GradientNorms`; n parameters, u units.
        weights, unit_weights: of the parameters themselves, where asked for.
    """

    present: tuple[bool, ...]
    norms: Tensor
    units: Tensor | None = None
    peaks: Tensor | None = None
    weights: Tensor | None = None
    unit_weights: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What a rank tells besides norms.

    Attributes:
        gradients: how many of its parameters have a gradient.
        found_inf: [] above 0 where its loss scaler saw a non-finite gradient.
        weight: [] of its accumulation window.
        loss: [] of its share of the batch.
    """

    gradients: int
    found_inf: Tensor | None = None
    weight: Tensor | float | None = None
    loss: Tensor | float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """What all ranks know after an exchange, to the same bits.

    Attributes:
        readings: each selection's, of whole parameters.
        gradients: [] how many gradients there are on all ranks.
        found_inf: [] above 0 if any rank's scaler saw a non-finite gradient.
        failed: [] bool: some rank raised before the exchange.
        weight: [] of the window over all data-parallel ranks, where there is one.
        loss: [] mean of the ranks' losses, each with its window's weight; NaN if no rank has one.
        gathered: every rank's numbers as they came.
    """

    readings: tuple[Readings, ...]
    gradients: Tensor
    found_inf: Tensor
    failed: Tensor
    weight: Tensor | None
    loss: Tensor
    gathered: Tensor


class Members:
    """What all ranks' entries of one selection come to, and where in the gathered numbers each part stands.

    Args:
        entries: rank by rank, the entries in the order of their rank's parameters.
        needs: what is measured.

    Attributes:
        wholes: the parameters that any rank has, group by group and rank by rank, as one process would have them.
        lengths: by kind of number, how many each rank sends.
    """

    def __init__(self, entries: Sequence[Sequence[Entry]], needs: Needs) -> None:
        self.needs = needs
        placed: dict[str, list[Placed]] = {}
        for rank, own in enumerate(entries):
            row = 0
            for position, entry in enumerate(own):
                placed.setdefault(entry.name, []).append(Placed(entry, rank, position, row))
                row += len(entry.rows)
        wholes = [Whole(parts, needs.unit_dim) for parts in placed.values()]
        self.wholes = tuple(sorted(wholes, key=lambda whole: whole.group))
        self._entries = entries
        parameters = [len(own) for own in entries]
        units = [sum(len(entry.rows) for entry in own) for own in entries]
        self.lengths = {"norms": parameters}
        if needs.weights:
            self.lengths["weights"] = parameters
        if needs.unit_dim is not None:
            self.lengths["units"] = units
            if needs.weights:
                self.lengths["unit_weights"] = units
        if needs.peaks:
            self.lengths |= {"lowest": parameters, "highest": parameters}

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(whole.name for whole in self.wholes)

    @property
    def groups(self) -> tuple[int, ...]:
        """Their groups' indices in the optimizer."""
        return tuple(whole.group for whole in self.wholes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their numbers of entries."""
        return tuple(whole.size for whole in self.wholes)

    def units(self, dim: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many units along ``dim`` each has, and how many entries a unit; empty where dim is None."""
        if dim is None:
            return (), ()
        return tuple(w.units for w in self.wholes), tuple(w.unit_size for w in self.wholes)

    def place(self, starts: dict[str, list[int]], device: torch.device) -> None:
        """Take note of where in the gathered numbers each rank's begin, by kind."""
        self._merges: dict[str, Merge] = {}
        for kind, own in starts.items():
            if kind in ("units", "unit_weights"):
                first, blocks = 0, []
                for whole in self.wholes:
                    blocks += list(whole.unit_blocks(first, own))
                    first += whole.units
            else:
                blocks = [([i], whole.cells(own)) for i, whole in enumerate(self.wholes)]
            self._merges[kind] = Merge(blocks, device)
        self._norms_start = starts["norms"]

    def pack(self, readings: Readings) -> list[Tensor]:
        """This rank's numbers, in the order of ``lengths``."""
        parts = [readings.norms, readings.weights, readings.units, readings.unit_weights]
        if readings.peaks is not None:
            parts += [-readings.peaks[:, 0], readings.peaks[:, 1]]
        return [part for part in parts if part is not None]

    def unpack(self, gathered: Tensor, present: tuple[bool, ...]) -> Readings:
        """All ranks' numbers, combined; ``present`` tells of this rank's gradients."""
        found = {
            kind: merge(gathered, math.inf if kind in ("lowest", "highest") else self.needs.norm_type)
            for kind, merge in self._merges.items()
        }
        peaks = torch.stack([-found["lowest"], found["highest"]], dim=1) if self.needs.peaks else None
        return Readings(
            present,
            found["norms"],
            found.get("units"),
            peaks,
            found.get("weights"),
            found.get("unit_weights"),
        )

    def first_bad_rank(self, gathered: Tensor, position: int) -> int | None:
        """Which rank's piece of a parameter is not finite, as a place in the group; syncs the host."""
        for rank, place in self.wholes[position].holders(self._norms_start):
            if not math.isfinite(float(gathered[place])):
                return rank
        return None

    def locally(self, here: int, device: torch.device) -> "Locally":
        """What concerns the parameters of the rank at place ``here``."""
        position = {whole.name: i for i, whole in enumerate(self.wholes)}
        first = [0]
        for whole in self.wholes:
            first.append(first[-1] + whole.units)
        own = [(position[entry.name], entry) for entry in self._entries[here]]
        rows = [i for i, _ in own]
        units = [first[i] + row for i, entry in own for row in self.wholes[i].rows_of(entry)]
        everywhere = set(range(len(self.wholes)))
        return Locally(
            indices_unless_all(rows, len(self.wholes), device),
            indices_unless_all(units, first[-1], device),
            tuple(len(entry.rows) for _, entry in own),
            tuple(rows),
            frozenset(everywhere - set(rows)),
        )


class Exchange:
    """One collective for everything that ranks must know of each other in a step.

    Args:
        ranks: who takes part; all of them must call alike.
        members: each selection's parameters over all ranks.
        device: where norms are put together.
        data_parallel: the ranks whose windows' weights and losses belong together; all ranks unless given.

    Attributes:
        local: for each selection, which of its parameters are on this rank.
        splits: whether other ranks have parts of these parameters, or further ones; copies are none.
    """

    def __init__(
        self,
        ranks: Ranks,
        members: Sequence[Members],
        device: torch.device,
        data_parallel: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self.members = tuple(members)
        self._device = device
        count = len(ranks.members)
        lengths = [_HEAD] * count
        starts: list[dict[str, list[int]]] = []
        for one in self.members:
            starts.append({})
            for kind, own in one.lengths.items():
                starts[-1][kind] = list(lengths)
                lengths = [length + more for length, more in zip(lengths, own, strict=True)]
        self._own_length, self._length = lengths[ranks.here], max(lengths)
        for one, own_starts in zip(self.members, starts, strict=True):
            absolute = {
                kind: [rank * self._length + start for rank, start in enumerate(own)]
                for kind, own in own_starts.items()
            }
            one.place(absolute, device)
        self.splits = any(whole.is_split for one in self.members for whole in one.wholes)
        self.local = tuple(one.locally(ranks.here, device) for one in self.members)
        self.splits = self.splits or any(one.elsewhere for one in self.local)
        shared = ranks.members if data_parallel is None else data_parallel.members
        self._shares = torch.tensor([ranks.members.index(rank) for rank in shared], device=device)

    @torch.no_grad()
    def __call__(self, readings: Sequence[Readings], told: Told) -> Agreed:
        """Exchange this rank's numbers for all ranks' combined ones; does not sync the host on an accelerator.

        Raises:
            RankError: if another rank raised before the exchange, where the host can see it.
        """
        packed = [part for one, own in zip(self.members, readings, strict=True) for part in one.pack(own)]
        table = self._gather([self._head(told), *packed])
        gathered = table.flatten()
        shares = table[self._shares]
        failed = table[:, _FAILED] > 0
        if self._device.type == "cpu" and bool(failed.any()):
            raised = [self.ranks.members[i] for i in failed.nonzero().flatten().tolist()]
            raise RankError(
                f"rank {', '.join(map(str, raised))} raised an error before this step could be decided (its own "
                "output says which), so no rank makes it"
            )
        weight = None if told.weight is None else shares[:, _WEIGHT].sum()
        amounts = shares[:, _HAS_LOSS] * (1.0 if weight is None else shares[:, _WEIGHT])
        losses = torch.where(amounts > 0, shares[:, _LOSS] * amounts, 0.0)
        return Agreed(
            readings=tuple(
                one.unpack(gathered, local.present_of(own.present))
                for one, local, own in zip(self.members, self.local, readings, strict=True)
            ),
            gradients=table[:, _GRADIENTS].sum(),
            found_inf=table[:, _FOUND_INF].amax(),
            failed=failed.any(),
            weight=weight,
            loss=losses.sum() / amounts.sum(),
            gathered=gathered,
        )

    def fail(self) -> None:
        """Take part in the exchange of a step in which this rank has raised, so that the others need not wait."""
        head = torch.zeros(_HEAD, dtype=wide_dtype(self._device), device=self._device)
        head[_FAILED].fill_(1.0)
        self._gather([head])

    def _gather(self, parts: Sequence[Tensor]) -> Tensor:
        """[ranks, length] all ranks' numbers."""
        missing = self._length - sum(part.numel() for part in parts)
        return self.ranks.gather(torch.cat([*parts, parts[0].new_zeros(missing)]))

    def _head(self, told: Told) -> Tensor:
        number = partial(torch.full, (1,), dtype=wide_dtype(self._device), device=self._device)
        values: list[Tensor | float | None] = [0.0] * _HEAD
        values[_GRADIENTS] = float(told.gradients)
        values[_FOUND_INF] = told.found_inf
        values[_WEIGHT] = told.weight
        values[_LOSS] = told.loss
        values[_HAS_LOSS] = float(told.loss is not None)
        return torch.cat(
            [
                value.detach().to(self._device, wide_dtype(self._device)).reshape(1)
                if isinstance(value, Tensor)
                else number(fill_value=0.0 if value is None else value)
                for value in values
            ]
        )

    def where(self, agreed: Agreed, selection: int, position: int) -> int | None:
        """The first rank whose piece of a parameter is not finite; syncs the host."""
        place = self.members[selection].first_bad_rank(agreed.gathered, position)
        return None if place is None else self.ranks.members[place]
