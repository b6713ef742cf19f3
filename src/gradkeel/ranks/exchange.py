"""Puts local norms together across ranks: one collective a step for norms, weights, flags and losses alike.

Each rank gathers every rank's numbers and combines them in the same order, so all come to the same bits. Norms
travel, not their powers: neither can overflow, and any norm type, maxima and sums share the one message.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradkeel.errors import GradkeelWarning, RankError
from gradkeel.measure import Readings
from gradkeel.measure.powers import wide_dtype
from gradkeel.ranks.group import Ranks
from gradkeel.ranks.members import Members

_FAILED, _GRADIENTS, _FOUND_INF, _WEIGHT, _LOSS, _HAS_LOSS = range(6)
_HEAD = 6


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
        self._is_checked = False
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
        if not self._is_checked:
            self._is_checked = True
            self._warn_of_different_copies(gathered)
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

    def _warn_of_different_copies(self, gathered: Tensor) -> None:
        for one in self.members:
            found = one.different_copy(gathered)
            if found is not None:
                name, places, norms = found
                first, second = (self.ranks.members[place] for place in places)
                warnings.warn(
                    f"ranks {first} and {second} have copies of {name!r}, but gradients of the norms {norms[0]:.6g} "
                    f"and {norms[1]:.6g}: exchange its gradient before the step, or, if these are no copies but "
                    "pieces, say so with attach(shard_over=...)",
                    GradkeelWarning,
                    stacklevel=2,
                )
                return

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

    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Which piece of each parameter this rank holds, without those that are declared copies of another's."""
        own = [entry for one in self.members for entry in one.entries[self.ranks.here]]
        return {entry.name: entry.key for entry in own if entry.key is not None}

    def where(self, agreed: Agreed, selection: int, position: int) -> int | None:
        """The first rank whose piece of a parameter is not finite; syncs the host."""
        place = self.members[selection].first_bad_rank(agreed.gathered, position)
        return None if place is None else self.ranks.members[place]
