"""A guarded step as CUDA graphs, which decide and apply, and the row that each replay leaves."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkeel.apply import factors
from gradkeel.apply.fused import Folding, can_fold, kernel_scale
from gradkeel.guard.given import Given, Route
from gradkeel.guard.report import SelectionReport
from gradkeel.guard.roster import Roster
from gradkeel.guard.step import Measured, carry_out, committed, decide_all, judge, norm_while_unchanged
from gradkeel.kernels.graph import Graph, tell_autograd
from gradkeel.kernels.row import Place, packed, read
from gradkeel.measure import true_norms
from gradkeel.norms import State
from gradkeel.policies.states import LazyState

Places = Mapping[str, Place]


class RowState(LazyState):
    """A policy's state as it stands in the row of a step."""

    def __init__(self, words: Tensor, places: Places) -> None:
        self.words = words
        self._places = places

    def __getitem__(self, key: str) -> Tensor:
        return read(self.words, self._places[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)


@dataclasses.dataclass(slots=True, eq=False)
class _Pattern:
    """A selection's report, and where in a row the tensors of another step's stand."""

    report: SelectionReport
    norms: Places
    decision: Places

    def of(
        self, words: Tensor, given: Given, remeasure: Callable[[], Tensor | None] | None
    ) -> SelectionReport:
        """The report of the step whose row this is."""
        old = self.report
        loss = torch.tensor(given.loss, device="cpu") if isinstance(given.loss, float) else given.loss
        new = {"step": given.step, "loss": loss}
        measured = dataclasses.replace(old.measured, **_read(words, self.norms), **new)
        decision = dataclasses.replace(old.decision, **_read(words, self.decision))
        return dataclasses.replace(old, measured=measured, decision=decision, remeasure=remeasure)


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """What one replayed step came to, in its own memory."""

    states: dict[str, State]  # the policies' states after the step
    verdict: Tensor  # [3] int64: whether the step may be made, all is finite, and anything is to be applied
    may_step: Tensor  # [] bool the first of them
    reports: Callable[[], tuple[SelectionReport, ...]]  # makes the selections' reports
    # for each selection what measures it once more, where a clamp was applied
    again: list[Callable[[], Tensor | None] | None]
    # [] float32 what a fused kernel skips by, where it does; written anew in the next step
    found_inf: Tensor | None
    # [] float32 what it divides by, where it may and one factor is for all; likewise
    kernel_scale: Tensor | None

    def flags(self) -> list[bool]:
        """Whether the step may be made, all is finite, and anything is to be applied; waits for the device."""
        return [word != 0 for word in self.verdict.tolist()]


class Captured:
    """The graphs of one list of gradients, and the buffers that they read.

    ``states`` and ``given`` are those of the captured step; without an ``optimizer``, as of several, nothing is folded.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        roster: Roster,
        states: Mapping[str, State],
        given: Given,
        capture: Callable[[Callable[[], Any]], Graph[Any]],
    ) -> None:
        self._roster = roster
        self._may_fold = (
            given.route is Route.FOLDED and optimizer is not None and can_fold(optimizer, roster.parameters)
        )
        self._given = given.buffers(roster.device)
        self._memory, self._places = _remembered(states)
        # What a step begins with, in the form of the rows: memory of its own, which the graph reads.
        self._words: Tensor | None = None
        self._decide = capture(partial(self._decided, applies=given.route is Route.DEVICE))
        decided = self._decide.result
        self._apply = None
        is_left = given.route is not Route.DEVICE and decided.kernel_scale is None
        if is_left and decided.may_scale:  # torch warns of an empty graph
            self._apply = capture(partial(self._applied, decided.reports))

    def _applied(self, reports: Sequence[SelectionReport]) -> None:
        carry_out(None, self._roster, reports, self._given.prescale, Folding())

    def _decided(self, *, applies: bool) -> "_Decided":
        """From the gradients to the row and, with ``applies``, back to the gradients."""
        roster, given = self._roster, self._given
        found = roster.readings()
        norms = [
            true_norms(part.blank, one, given.prescale, step=given.step, loss=given.loss)  # type: ignore[arg-type]
            for part, one in zip(roster.parts, found, strict=True)
        ]
        present = [one.present for one in found]
        measured = Measured(
            given.prescale,
            norms,
            present,
            has_gradients=True,
            found_inf=given.found_inf,
            agreed=None,
            agreed_scalars={},
        )
        before = {
            label: {key: read(self._memory, place) for key, place in places.items()}
            for label, places in self._places.items()
        }
        reports, after = decide_all(roster, measured, before)
        finite, may_step = judge(reports, given.found_inf, None, tolerant=given.tolerant)
        assert isinstance(finite, Tensor), "gradients are on a device"
        if not isinstance(may_step, Tensor):  # where what is not finite is kept, the host knows
            may_step = torch.full_like(finite, may_step)
        states = committed(roster.parts, reports, after, before, finite)
        decided = _Decided(
            roster, reports, states, self._places, finite, may_step, given, may_fold=self._may_fold
        )
        if len(self._memory):
            self._memory.copy_(decided.words.narrow(0, 0, len(self._memory)))
        if applies and decided.may_scale:
            self._applied(reports)
        return decided

    def holds(self, given: Given) -> bool:
        """Whether the policies would look at this step as they did at the captured one."""
        return bool(self._given.step.holds(given.step))

    def replay(self, given: Given, states: Mapping[str, State]) -> Row:
        """Decide on the gradients that the slots point at; does not sync the host."""
        self._given.send(given)
        self._remember(states)
        decided = self._decide.replay()
        words = decided.words.clone()
        self._words = words
        may_step, verdict = read(words, decided.may_step), read(words, decided.verdict)
        again: list[Callable[[], Tensor | None] | None] = [None] * len(decided.patterns)

        def reports() -> tuple[SelectionReport, ...]:
            return tuple(one.of(words, given, own) for one, own in zip(decided.patterns, again, strict=True))

        after: dict[str, State] = {label: RowState(words, places) for label, places in self._places.items()}
        return Row(after, verdict, may_step, reports, again, decided.found_inf, decided.kernel_scale)

    def apply(self, row: Row, gradients: Sequence[Tensor | None], *, scales: bool = True) -> None:
        """Carry the last decision, which is the row's, out on the gradients, if it was not; does not sync the host.

        Unless it ``scales`` anything, as the host may know, they are left alone.
        """
        if scales and self._apply is not None:
            self._apply.replay()
        parts, reports = self._roster.parts, self._decide.result.reports
        clamped = [i for i in self._roster.here if reports[i].decision.clamp is not None]
        if scales:  # who measures after a clamp sees by the version whether there has been another one since
            tell_autograd(gradients, all_of_them=bool(clamped))
        for i in clamped:
            row.again[i] = norm_while_unchanged(parts[i].selection.parameters, reports[i].measured)

    def _remember(self, states: Mapping[str, State]) -> None:
        if not len(self._memory):
            return
        # After a replay that was committed the graph has left them there.
        if not states or not all(
            isinstance(own, RowState) and own.words is self._words for own in states.values()
        ):
            held_by = self._roster.filled(states)
            # By name: a checkpoint's may stand in another order.
            named = {label: {key: held_by[label][key] for key in own} for label, own in self._places.items()}
            self._memory.copy_(_remembered(named)[0])


class _Decided:
    """What the first graph leaves behind: the reports of the captured step, and how a row is read like them."""

    def __init__(
        self,
        roster: Roster,
        reports: Sequence[SelectionReport],
        states: Mapping[str, State],
        order: Mapping[str, Places],
        finite: Tensor,
        may_step: Tensor,
        given: Given,
        *,
        may_fold: bool,
    ) -> None:
        self.reports = reports
        self.found_inf = None if given.route is Route.HOST else (~may_step).float()
        own = [reports[i] for i in roster.here]
        every: list[Tensor | list[float] | float | None] = [
            factors(report.decision, given.prescale) for report in own
        ]
        every += [report.decision.unit_coefficients for report in own]
        has_clamp = any(report.decision.clamp is not None for report in own)
        self.may_scale = has_clamp or any(isinstance(factor, Tensor) for factor in every)
        scaled = torch.zeros_like(finite)
        for factor in every:
            if isinstance(factor, Tensor):
                scaled = scaled | (factor != 1).any()
        for report in own:
            if report.decision.clamp is not None:
                scaled = scaled | report.outcome.is_clipped()
        whole = every[0] if len(own) == 1 and not has_clamp and every[1] is None else None
        self.kernel_scale = None
        if may_fold and isinstance(whole, Tensor) and whole.dim() == 0:
            self.kernel_scale = kernel_scale(whole, roster.device)
        tensors = [states[label][key] for label, places in order.items() for key in places]
        tensors += [may_step, finite, scaled]
        remembered = len(tensors) - 3
        fields = []
        for report in reports:
            held = [_tensors(report.measured), _tensors(report.decision)]
            held[0].pop("loss", None)
            fields.append(held)
            tensors += [tensor for one in held for tensor in one.values()]
        self.words, places = packed(tensors)
        self.may_step = places[remembered]
        self.verdict = Place(torch.Size([3]), torch.int64, self.may_step.first)
        rest = iter(places[remembered + 3 :])
        self.patterns = [
            _Pattern(report, *[{name: next(rest) for name in one} for one in held])
            for report, held in zip(reports, fields, strict=True)
        ]


def _remembered(states: Mapping[str, State]) -> tuple[Tensor, dict[str, dict[str, Place]]]:
    """[w] words of all states, in memory of their own, and where each tensor of theirs stands."""
    tensors = [tensor for state in states.values() for tensor in state.values()]
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device="cpu"), {label: {} for label in states}
    words, places = packed(tensors)
    rest = iter(places)
    return words, {label: {key: next(rest) for key in state} for label, state in states.items()}


def _tensors(of: Any) -> dict[str, Tensor]:
    found = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _read(words: Tensor, places: Places) -> dict[str, Any]:
    return {name: read(words, place) for name, place in places.items()}
