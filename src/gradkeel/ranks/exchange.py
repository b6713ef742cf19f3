"""Ranks tell each other in a step one sum over ranks, of a head and a power of each norm.

Each piece of a parameter is counted by one rank, its copies by none, so that powers add up to the whole's. What is not
finite is told by copies too. All ranks decide from the reduced numbers alone, which have the same bits everywhere.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import GradkeelWarning, RankError
from gradkeel.measure import Readings
from gradkeel.measure.powers import wide_dtype
from gradkeel.ranks.group import Ranks
from gradkeel.ranks.layout import Layout
from gradkeel.ranks.powers import kinds_of

(
    _FAILED,  # ranks that have raised, and the sum of their places
    _FAILED_PLACES,
    _GRADIENTS,
    _FOUND_INF,
    _WEIGHT,
    _LOSSES,  # each times its amount, and the amounts
    _AMOUNTS,
    _BAD,  # ranks with a gradient that is not finite, and the sum of their places
    _BAD_PLACES,
    _CHANGED,  # ranks whose copies have gradients where they had none, or none where they had some
) = range(10)
_HEAD = 10

_TOLERANCE = 1e-3  # ranks that compute the same by themselves may differ by rounding


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """A rank tells this besides norms."""

    gradients: int  # how many of its parameters have a gradient
    found_inf: Tensor | None = None  # [] above 0 where its loss scaler saw a non-finite gradient
    weight: Tensor | float | None = None  # [] of its accumulation window
    loss: Tensor | float | None = None  # [] of its share of the batch


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """All ranks know this after an exchange, to the same bits."""

    readings: tuple[Readings, ...]  # each selection's, of whole parameters
    gradients: Tensor  # [] how many gradients there are on all ranks
    found_inf: Tensor  # [] above 0 if any rank's scaler saw a non-finite gradient
    failed: Tensor  # [] bool: some rank raised before the exchange
    weight: Tensor | None  # [] of the window over all data-parallel ranks, where there is one
    loss: Tensor  # [] mean of the ranks' losses, each with its window's weight; NaN if no rank has one
    bad: Tensor  # [2] how many ranks have a gradient that is not finite, and the sum of their places
    # for each parameter, selection after selection, the place of the first rank on which it is not finite; None where
    # that was not asked for
    first_bad: list[int] | None


class Exchange:
    """One collective tells everything that ranks must know of each other in a step; a second tells maxima, if any.

    All of the ``ranks`` must call alike. ``data_parallel`` are those whose windows' weights belong together; all ranks
    unless given.
    """

    def __init__(
        self,
        ranks: Ranks,
        layouts: Sequence[Layout],
        device: torch.device,
        data_parallel: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self.layouts = tuple(layouts)
        # Whether other ranks have parts of these parameters, or further ones; copies are none.
        self.splits = any(layout.is_split for layout in layouts)
        self._device = device
        # A device without float64 leaves the sums to the host.
        self._sums_on = device if wide_dtype(device) == torch.float64 else torch.device("cpu")
        self._zero = torch.zeros((), dtype=torch.float64, device=self._sums_on)
        # Ranks whose windows are of the same items, as those of one tensor-parallel group, count once.
        self._adds_weight = data_parallel is None or ranks.members[0] in data_parallel.members
        self._kinds = [kind for i, layout in enumerate(layouts) for kind in kinds_of(i, layout)]
        # Copies count where their first has no gradient, until ranks find that this has changed.
        self._counted = [layout.counted for layout in layouts]
        self._copied = [layout.copied([True] * layout.here) for layout in layouts]
        self._slots = sum(len(layout.slot_names) for layout in layouts)
        # Copies are compared in the first step, in which the host may be synced.
        self._compares = self._slots > 0
        self._has_maxima = any(kind.sums is None for kind in self._kinds)

    @property
    def _on_host(self) -> bool:
        """Tell whether the host looks at the sums, as it can without waiting for an accelerator; alike on all ranks."""
        return self._device.type == "cpu" or self._compares

    @torch.no_grad()
    def __call__(self, readings: Sequence[Readings], told: Told) -> Agreed:
        """Exchange this rank's numbers for all ranks' combined ones; does not sync the host on an accelerator.

        Raises:
            RankError: if another rank raised before the exchange, where the host can see it.
        """
        head = self._head(readings, told)
        sums = self._sums(head, readings, self._counted)
        if self._on_host:
            self._refuse_failed(sums)
            if float(sums[_CHANGED]) > 0:
                self._count_again(readings)
                sums = self._sums(head, readings, self._counted)
        if self._compares:
            self._compare_copies(sums[-3 * self._slots :].view(3, -1), readings)
            self._compares = False
        maxima = self._maxima(readings) if self._has_maxima else None
        first_bad = None
        if self._device.type == "cpu" and float(sums[_BAD]) > 1:
            first_bad = self._first_bad(readings)
        return Agreed(
            readings=self._whole(sums, maxima, readings),
            gradients=sums[_GRADIENTS].to(self._device),
            found_inf=self._out(sums[_FOUND_INF]),
            failed=sums[_FAILED].to(self._device) > 0,
            weight=None if told.weight is None else self._out(sums[_WEIGHT]),
            loss=self._out(sums[_LOSSES] / sums[_AMOUNTS]),
            bad=sums[_BAD : _BAD_PLACES + 1],
            first_bad=first_bad,
        )

    def fail(self) -> None:
        """Take part in the exchange of a step in which this rank has raised, so that the others need not wait."""
        head = self._zero.new_zeros(_HEAD)
        head[_FAILED].fill_(1.0)
        head[_FAILED_PLACES].fill_(float(self.ranks.here))
        sums = self._sums(head, None, self._counted)
        if self._on_host:
            self._failed(sums, has_failed=True)
        elif self._has_maxima:
            self._maxima(None)

    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Tell which piece of each parameter this rank holds, without those that are declared copies of another's."""
        return {name: piece for layout in self.layouts for name, piece in layout.pieces.items()}

    def where(self, agreed: Agreed, selection: int, position: int) -> int | None:
        """Return the first rank whose piece of a parameter is not finite, as far as it is known; syncs the host."""
        if agreed.first_bad is not None:
            place = agreed.first_bad[sum(len(one.names) for one in self.layouts[:selection]) + position]
            return self.ranks.members[place] if place < len(self.ranks.members) else None
        count, places = agreed.bad.tolist()
        return self.ranks.members[int(places)] if count == 1 else None

    # ---- what this rank sends ----------------------------------------------------------------------------------

    def _head(self, readings: Sequence[Readings], told: Told) -> Tensor:
        """Return [head] this rank's flags and counts."""
        values = [self._zero] * _HEAD
        values[_GRADIENTS] = self._number(told.gradients)
        if told.found_inf is not None:
            values[_FOUND_INF] = self._number(told.found_inf)
        if told.weight is not None and self._adds_weight:
            values[_WEIGHT] = self._number(told.weight)
        if told.loss is not None:
            amount = self._number(1.0 if told.weight is None else told.weight)
            # A rank whose window has no items may have no loss either.
            values[_LOSSES] = torch.where(amount > 0, self._number(told.loss) * amount, 0.0)
            values[_AMOUNTS] = amount
        finite = [one.norms.isfinite().all() for one in readings]
        bad = ~(finite[0] if len(finite) == 1 else torch.stack(finite).all())
        values[_BAD] = self._number(bad)
        values[_BAD_PLACES] = values[_BAD] * self.ranks.here
        if self._copied_here(readings) != self._copied:
            values[_CHANGED] = self._number(1.0)
        return torch.stack(values)

    def _number(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self._sums_on, torch.float64).reshape(())
        return torch.full_like(self._zero, value)

    def _sums(
        self, head: Tensor, readings: Sequence[Readings] | None, counted: Sequence[Tensor | None]
    ) -> Tensor:
        """Return [length] the sum over ranks of what each sends; a rank that has failed sends its head alone."""
        parts = [head]
        for kind in self._kinds:
            if kind.sums is not None and readings is None:
                parts.append(head.new_zeros(kind.count * kind.sums.width))
            elif kind.sums is not None and readings is not None:
                values = self._in(kind.read(readings[kind.selection]))
                parts.append(kind.powers(values, counted[kind.selection]))
        if self._compares:
            parts.append(self._of_copies(readings))
        return self.ranks.added(torch.cat(parts))

    def _maxima(self, readings: Sequence[Readings] | None) -> Tensor:
        """Return [length] the largest of what each rank sends."""
        parts = []
        for kind in self._kinds:
            if kind.sums is None and readings is None:
                parts.append(self._zero.new_full((kind.count,), -math.inf))
            elif kind.sums is None and readings is not None:
                parts.append(kind.maxima(self._in(kind.read(readings[kind.selection]))))
        return self.ranks.largest(torch.cat(parts))

    def _of_copies(self, readings: Sequence[Readings] | None) -> Tensor:
        """Return [3 * slots] of each thing that several ranks have copies of: their number, norms and squares."""
        parts = [self._zero.new_zeros(3, 0)]
        for i, layout in enumerate(self.layouts):
            result = self._zero.new_zeros(3, len(layout.slot_names))
            if layout.slots is not None and readings is not None:
                norms = self._in(readings[i].norms)
                # A copy may have no gradient.
                here = (layout.slots >= 0) & norms.isfinite() & (norms > 0)
                norms = torch.where(here, norms, 0.0)
                result.index_add_(
                    1, layout.slots.clamp(0), torch.stack([here.to(norms), norms, norms * norms])
                )
            parts.append(result)
        return torch.cat(parts, dim=1).flatten()

    # ---- what all ranks know -----------------------------------------------------------------------------------

    def _whole(self, sums: Tensor, maxima: Tensor | None, own: Sequence[Readings]) -> tuple[Readings, ...]:
        """Return each selection's readings, of whole parameters."""
        found: list[dict[str, Tensor]] = [{} for _ in self.layouts]
        at, largest_at = _HEAD, 0
        for kind in self._kinds:
            if kind.sums is not None:
                end = at + kind.count * kind.sums.width
                values = kind.sums.norms(sums[at:end].view(kind.count, kind.sums.width))
                at = end
            else:
                assert maxima is not None, "some are exchanged"
                values = kind.of_all(maxima[largest_at : largest_at + kind.count])
                largest_at += kind.count
            found[kind.selection][kind.name] = self._out(values)
        return tuple(
            _joined(layout.present(one.present), values)
            for layout, one, values in zip(self.layouts, own, found, strict=True)
        )

    def _failed(self, sums: Tensor, *, has_failed: bool) -> list[int]:
        """Return the ranks that have raised; a further collective if there are several, which all ranks enter."""
        count, places = sums[_FAILED : _FAILED_PLACES + 1].tolist()
        if count <= 1:
            return [self.ranks.members[int(places)]] if count else []
        told = self.ranks.gather(self._number(has_failed).reshape(1)).flatten().tolist()
        return [rank for rank, number in zip(self.ranks.members, told, strict=True) if number]

    def _refuse_failed(self, sums: Tensor) -> None:
        raised = self._failed(sums, has_failed=False)
        if raised:
            raise RankError(
                f"rank {', '.join(map(str, raised))} raised an error before this step could be decided (its own "
                "output says which), so no rank makes it"
            )

    def _copied_here(self, readings: Sequence[Readings]) -> list[tuple[bool, ...]]:
        return [layout.copied(one.present) for layout, one in zip(self.layouts, readings, strict=True)]

    def _count_again(self, readings: Sequence[Readings]) -> None:
        """Find out which pieces count here: those of which this rank is the first that has a gradient."""
        self._copied = self._copied_here(readings)
        here = [layout.told_present(one.present) for layout, one in zip(self.layouts, readings, strict=True)]
        present = self.ranks.gather(torch.cat(here).to(self._sums_on)).cpu()
        parts = present.split([len(layout.names) for layout in self.layouts], dim=1)
        self._counted = [
            layout.counting(part, self.ranks.here, self._sums_on)
            for layout, part in zip(self.layouts, parts, strict=True)
        ]

    def _first_bad(self, readings: Sequence[Readings]) -> list[int]:
        """Return each parameter's first rank, by place, on which it is not finite, or the number of ranks."""
        count, parts = len(self.ranks.members), []
        for layout, one in zip(self.layouts, readings, strict=True):
            values = (~one.norms.isfinite()).to(torch.float64) * (count - self.ranks.here)
            if layout.rows is not None:
                values = values.new_zeros(len(layout.names)).scatter_reduce_(0, layout.rows, values, "amax")
            parts.append(values)
        return [count - int(value) for value in self.ranks.largest(torch.cat(parts)).tolist()]

    def _compare_copies(self, told: Tensor, readings: Sequence[Readings]) -> None:
        """Warn where ranks have copies with different gradients; a further collective if it seems so."""
        number, norms, squares = told
        variance = (number * squares - norms * norms) / (norms * norms)
        # Two of n copies that are d apart, and the others between them, have at least the variance d * d / 2n.
        worst = (variance * number).nan_to_num(0.0, 0.0, 0.0)
        slot = int(worst.argmax())
        if not float(worst[slot]) > _TOLERANCE**2 / 3:
            return
        name, own, first = "", self._zero, 0
        for layout, one in zip(self.layouts, readings, strict=True):
            if first <= slot < first + len(layout.slot_names) and layout.slots is not None:
                name = layout.slot_names[slot - first]
                found = one.norms[layout.slots == slot - first]
                own = self._in(found[0]) if len(found) else own
            first += len(layout.slot_names)
        copies = list(
            zip(self.ranks.members, self.ranks.gather(own.reshape(1)).flatten().tolist(), strict=True)
        )
        (one_rank, norm), *others = [(r, value) for r, value in copies if math.isfinite(value) and value > 0]
        for other_rank, other in others:
            if abs(other - norm) > _TOLERANCE * norm:
                warnings.warn(
                    f"ranks {one_rank} and {other_rank} have copies of {name!r}, but gradients of the norms {norm:.6g} "
                    f"and {other:.6g}: exchange its gradient before the step, or, if these are no copies but "
                    "pieces, say so with attach(shard_over=...)",
                    GradkeelWarning,
                    stacklevel=3,
                )
                return

    def _in(self, values: Tensor) -> Tensor:
        return values.to(self._sums_on, torch.float64)

    def _out(self, values: Tensor) -> Tensor:
        return values.to(self._device, wide_dtype(self._device))


def _joined(present: tuple[bool, ...], found: dict[str, Any]) -> Readings:
    peaks = None
    if "highest" in found:
        peaks = torch.stack([-found.pop("lowest"), found.pop("highest")], dim=1)
    return Readings(present, peaks=peaks, **found)
