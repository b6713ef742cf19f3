"""Which steps of a guard are replayed, and which are launched.

What a step does is what `gradkeel.guard.step` says; here it is only captured. A step is replayed where all gradients
are plain, Triton's kernels read them, no ranks exchange anything, and the policies are gradkeel's own and look at
nothing that only the host knows, such as the number of the step. Everything else is launched one by one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkeel.apply.fused import Folding
from gradkeel.guard.captured import Captured
from gradkeel.guard.given import Given, Route
from gradkeel.guard.roster import Roster
from gradkeel.kernels.graph import Entry, Graphs, can_capture
from gradkeel.norms import State


class Replays:
    """What of a guard's steps was captured."""

    def __init__(self) -> None:
        self._graphs: Graphs[Captured] | None = None
        self._parts: object = None
        self._with_weights = self._may_fold = False

    def route(self, roster: Roster, folding: Folding) -> Route:
        """Who multiplies the gradients where the optimizer's kernel skips: it does both where that pays."""
        self._look_at(roster)
        return Route.FOLDED if self._may_fold and folding.is_worth(roster.device) else Route.DEVICE

    def _look_at(self, roster: Roster) -> None:
        if roster.parts is self._parts:
            return
        self._parts = roster.parts
        self._graphs = Graphs(roster.device) if can_replay(roster) else None
        self._with_weights = any(part.needs.weights for part in roster.parts)
        self._may_fold = len(roster.here) == 1 and all(p.dtype == torch.float32 for p in roster.parameters)

    def find(
        self,
        optimizer: Optimizer | None,
        roster: Roster,
        gradients: Sequence[Tensor | None],
        states: Mapping[str, State],
        given: Given,
    ) -> tuple[Entry[Captured] | None, Captured | None]:
        """The entry of the parameters' gradients, and what is to be replayed for it.

        Without the first the step is launched; without the second too, as a rehearsal.
        """
        self._look_at(roster)
        if self._graphs is None or not any(gradient is not None for gradient in gradients):
            return None, None
        tensors = [*gradients, *roster.parameters] if self._with_weights else gradients
        entry = self._graphs.of(given.kind(), tensors)
        if entry is None:
            return None, None
        if entry.captured is not None and not entry.captured.holds(given):
            entry.captured, entry.is_rehearsed = None, False
        if entry.captured is None and entry.is_rehearsed:
            held = {label: state for label, state in roster.filled(states).items() if state}
            self._graphs.capture(entry, lambda capture: Captured(optimizer, roster, held, given, capture))
        return entry, entry.captured


def can_replay(roster: Roster) -> bool:
    """Whether steps on these parameters may be captured at all."""
    if roster.exchange is not None or not can_capture(roster.device):
        return False
    needs = [part.needs for part in roster.parts if part.selection.parameters]
    return all(need.norm_type in (1.0, 2.0) for need in needs) and all(part.is_own for part in roster.parts)
