"""One selection over all ranks: what each of them sends, and what it comes to."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.measure import Readings
from gradkeel.norms import Needs
from gradkeel.ranks.local import Locally, indices_unless_all
from gradkeel.ranks.merge import Entry, Merge, Placed, Whole

_TOLERANCE = 1e-3  # ranks that compute the same by themselves may differ by rounding


class Members:
    """What all ranks' entries of one selection come to, and where in the gathered numbers each part stands.

    Args:
        entries: rank by rank, the entries in the order of their rank's parameters.
        needs: what is measured.

    Attributes:
        entries: rank by rank, as given.
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
        self.entries = entries
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

    def different_copy(self, gathered: Tensor) -> tuple[str, tuple[int, int], tuple[float, float]] | None:
        """A parameter of which two ranks, given by their places, have copies with other gradients; syncs the host."""
        values = gathered.tolist()
        for whole in self.wholes:
            for copies in whole.copies(self._norms_start):
                held = [(rank, values[place]) for rank, place in copies if math.isfinite(values[place])]
                held = [(rank, value) for rank, value in held if value > 0]  # a copy may have no gradient
                for rank, value in held[1:]:
                    if abs(value - held[0][1]) > _TOLERANCE * held[0][1]:
                        return whole.name, (held[0][0], rank), (held[0][1], value)
        return None

    def locally(self, here: int, device: torch.device) -> "Locally":
        """What concerns the parameters of the rank at place ``here``."""
        position = {whole.name: i for i, whole in enumerate(self.wholes)}
        first = [0]
        for whole in self.wholes:
            first.append(first[-1] + whole.units)
        own = [(position[entry.name], entry) for entry in self.entries[here]]
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
