"""The steps of a guard whose gradients lie on one CUDA device, as two graphs: one decides, one applies.

What a step does is what `gradkeel.guard.step` says; here it is only captured. A step is replayed where all gradients
are plain, Triton's kernels read them, no ranks exchange anything, and the policies are gradkeel's own and look at
nothing that only the host knows, such as the number of the step. Everything else is launched one by one.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkeel.apply import factors
from gradkeel.apply.fused import Folding, can_fold, kernel_scale
from gradkeel.guard.report import SelectionReport
from gradkeel.guard.roster import Roster
from gradkeel.guard.step import Measured, carry_out, committed, decide_all, judge, norm_while_unchanged
from gradkeel.kernels.graph import Entry, Graph, Graphs, can_capture, tell_autograd
from gradkeel.kernels.row import Place, packed, read
from gradkeel.measure import true_norms
from gradkeel.norms import State
from gradkeel.policies.states import LazyState

Places = Mapping[str, Place]


@dataclasses.dataclass(slots=True, eq=False)
class Given:
    """What one step is given besides its gradients.

    Attributes:
        step: its number.
        prescale: [] what turns the stored gradients into the true ones.
        loss: [] the loss, where it was logged.
        found_inf: [] above 0 where a loss scaler saw a non-finite gradient.
        tolerant: whether a step may be made on non-finite gradients.
    """

    step: Any
    prescale: Tensor | float
    loss: Tensor | float | None
    found_inf: Tensor | None
    tolerant: bool

    def kind(self) -> tuple[bool, ...]:
        """What a graph depends on: which of the numbers there are, and what is done."""
        return self.has_prescale(), self.loss is not None, self.found_inf is not None, self.tolerant

    def has_prescale(self) -> bool:
        """Whether there is anything to multiply by."""
        return isinstance(self.prescale, Tensor) or self.prescale != 1.0

    def buffers(self, device: torch.device) -> "Given":
        """[] float64 memory for the numbers that there are."""
        new = torch.zeros(3, dtype=torch.float64, device=device).unbind()
        return Given(
            Watched(self.step),
            new[0] if self.has_prescale() else 1.0,
            None if self.loss is None else new[1],
            None if self.found_inf is None else new[2],
            self.tolerant,
        )

    def send(self, given: "Given") -> None:
        """Write another step's numbers into these buffers; does not sync the host."""
        pairs = ((self.prescale, given.prescale), (self.loss, given.loss), (self.found_inf, given.found_inf))
        for buffer, value in pairs:
            if isinstance(value, Tensor) and isinstance(buffer, Tensor):
                buffer.copy_(value.reshape(()), non_blocking=True)
            elif isinstance(buffer, Tensor) and isinstance(value, float):
                buffer.fill_(value)


class Watched:
    """Stands for the number of a step that is captured: a graph holds as long as comparisons with it come out alike.

    Whoever wants more of it than to compare it cannot be captured.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._found: list[tuple[Callable[[Any, Any], Any], object, object]] = []

    def holds(self, step: int) -> bool:
        """Whether all that was found of the captured step is so of this one."""
        return all(compare(step, other) == found for compare, other, found in self._found)

    def _compared(self, compare: Callable[[Any, Any], Any], other: object) -> Any:
        found = compare(self._step, other)
        self._found.append((compare, other, found))
        return found

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("a policy computes with the number of the step, which the host alone knows")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        """As a number."""
        return self._compared(operator.eq, other)

    def __lt__(self, other: object) -> Any:
        """As a number."""
        return self._compared(operator.lt, other)

    def __le__(self, other: object) -> Any:
        """As a number."""
        return self._compared(operator.le, other)

    def __gt__(self, other: object) -> Any:
        """As a number."""
        return self._compared(operator.gt, other)

    def __ge__(self, other: object) -> Any:
        """As a number."""
        return self._compared(operator.ge, other)

    __bool__ = __int__ = __float__ = __index__ = __str__ = __format__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = _refuse


class RowState(LazyState):
    """A policy's state as it stands in the row of a step."""

    def __init__(self, words: Tensor, places: Places) -> None:
        self.words = words
        self._places = places

    def __getitem__(self, key: str) -> Tensor:
        """The tensor of this name."""
        return read(self.words, self._places[key])

    def __iter__(self) -> Iterator[str]:
        """The names."""
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
        new = {"step": given.step, "loss": None if given.loss is None else torch.as_tensor(given.loss)}
        measured = dataclasses.replace(old.measured, **_read(words, self.norms), **new)
        decision = dataclasses.replace(old.decision, **_read(words, self.decision))
        return dataclasses.replace(old, measured=measured, decision=decision, remeasure=remeasure)


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """What one replayed step came to, in its own memory.

    Attributes:
        states: the policies' states after the step.
        verdict: [3] float64 words: whether the step may be made, all is finite, and anything is to be applied.
        may_step: [] bool the first of them.
        is_scaled: [] bool the last of them.
        reports: makes the selections' reports.
        again: for each selection what measures it once more, where a clamp was applied.
        found_inf: [] float32 what a fused kernel skips by; written anew in the next step.
        kernel_scale: [] float32 what a fused kernel may divide by, where one factor is for all; likewise.
    """

    states: dict[str, State]
    verdict: Tensor
    may_step: Tensor
    is_scaled: Tensor
    reports: Callable[[], tuple[SelectionReport, ...]]
    again: list[Callable[[], Tensor | None] | None]
    found_inf: Tensor
    kernel_scale: Tensor | None

    def flags(self) -> list[bool]:
        """Whether the step may be made, all is finite, and anything is to be applied; waits for the device."""
        return [word != 0 for word in self.verdict.view(torch.int64).tolist()]


class Captured:
    """Both graphs of one list of gradients, and the buffers that they read.

    Args:
        capture: captures a body.

    Attributes:
        folds: whether the factor may go into the optimizer's kernel.
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
        self._given = given.buffers(roster.device)
        self._memory, self._places = _remembered(states)
        # What a step begins with, in the form of the rows: memory of its own, which the graph reads.
        self._words: Tensor | None = None
        self._decide = capture(self._decided)
        decided = self._decide.result
        self._apply = None
        if decided.may_scale:  # torch warns of an empty graph
            self._apply = capture(
                lambda: carry_out(None, roster, decided.reports, self._given.prescale, Folding())
            )
        self.folds = (
            optimizer is not None
            and decided.kernel_scale is not None
            and can_fold(optimizer, roster.parameters)
        )

    def _decided(self) -> "_Decided":
        """From the gradients to the row; nothing is applied."""
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
        states = committed(roster.parts, reports, after, before, finite)
        return _Decided(roster, reports, states, self._places, finite, may_step, given.prescale)

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
        again: list[Callable[[], Tensor | None] | None] = [None] * len(decided.patterns)

        def reports() -> tuple[SelectionReport, ...]:
            return tuple(one.of(words, given, own) for one, own in zip(decided.patterns, again, strict=True))

        first = decided.flags[0].first
        may_step, is_scaled = read(words, decided.flags[0]), read(words, decided.flags[2])
        after: dict[str, State] = {label: RowState(words, places) for label, places in self._places.items()}
        return Row(
            after,
            words[first : first + len(decided.flags)],
            may_step,
            is_scaled,
            reports,
            again,
            decided.found_inf,
            decided.kernel_scale,
        )

    def apply(self, row: Row) -> None:
        """Carry the last decision, which is the row's, out on the gradients; does not sync the host."""
        if self._apply is None:
            return
        self._apply.replay()
        parts, reports = self._roster.parts, self._decide.result.reports
        tell_autograd(self._roster.parameters)
        for i in self._roster.here:
            if reports[i].decision.clamp is not None:
                row.again[i] = norm_while_unchanged(parts[i].selection.parameters, reports[i].measured)

    def _remember(self, states: Mapping[str, State]) -> None:
        if not len(self._memory):
            return
        held = next(iter(states.values()), None)
        if isinstance(held, RowState) and held.words is self._words:
            self._memory.copy_(held.words[: len(self._memory)])
        else:
            held_by = self._roster.filled(states)
            self._memory.copy_(_remembered({label: held_by[label] for label in self._places})[0])


class _Decided:
    """What the first graph leaves behind: the reports of the captured step, and how a row is read like them."""

    def __init__(
        self,
        roster: Roster,
        reports: Sequence[SelectionReport],
        states: Mapping[str, State],
        order: Mapping[str, Places],
        finite: Tensor | bool,
        may_step: Tensor | bool,
        prescale: Tensor | float,
    ) -> None:
        self.reports = reports
        assert isinstance(finite, Tensor), "gradients are on a device"
        assert isinstance(may_step, Tensor), "and so is the verdict on them"
        self.found_inf = (~may_step).float()
        own = [reports[i] for i in roster.here]
        every: list[Tensor | float | None] = [factors(report.decision, prescale) for report in own]
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
        whole = every[0] if len(own) == 1 and own[0].decision.unit_coefficients is None else None
        is_one = isinstance(whole, Tensor) and whole.dim() == 0 and own[0].decision.clamp is None
        self.kernel_scale = kernel_scale(whole, roster.device) if is_one and whole is not None else None  # []
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
        self.flags = places[remembered : remembered + 3]
        rest = iter(places[remembered + 3 :])
        self.patterns = [
            _Pattern(report, *[{name: next(rest) for name in one} for one in held])
            for report, held in zip(reports, fields, strict=True)
        ]


class Replays:
    """What of a guard's steps was captured."""

    def __init__(self) -> None:
        self._graphs: Graphs[Captured] | None = None
        self._parts: object = None
        self._with_weights = False

    def find(
        self, optimizer: Optimizer | None, roster: Roster, states: Mapping[str, State], given: Given
    ) -> tuple[Entry[Captured] | None, Captured | None]:
        """The entry of the gradients that there are, and what is to be replayed for it.

        Without the first the step is launched; without the second too, as a rehearsal.
        """
        if roster.parts is not self._parts:
            self._parts = roster.parts
            self._graphs = Graphs(roster.device) if can_replay(roster) else None
            self._with_weights = any(part.needs.weights for part in roster.parts)
        tensors = [parameter.grad for parameter in roster.parameters]
        if self._graphs is None or not any(tensor is not None for tensor in tensors):
            return None, None
        if self._with_weights:
            tensors += roster.parameters
        entry = self._graphs.of(given.kind(), tensors)
        if entry is None:
            return None, None
        if entry.captured is not None and not entry.captured.holds(given):
            entry.captured, entry.is_rehearsed = None, False
        if entry.captured is None and entry.is_rehearsed:
            held = {label: state for label, state in roster.filled(states).items() if state}
            self._graphs.capture(entry, lambda capture: Captured(optimizer, roster, held, given, capture))
        return entry, entry.captured


def rehearsing(entry: Entry[Captured] | None) -> AbstractContextManager[None]:
    """Meanwhile kernels find the entry's gradients as they will when they are replayed."""
    return nullcontext() if entry is None else entry.slots.active()


def can_replay(roster: Roster) -> bool:
    """Whether steps on these parameters may be captured at all."""
    if roster.exchange is not None or not can_capture(roster.device):
        return False
    needs = [part.needs for part in roster.parts if part.selection.parameters]
    return all(need.norm_type in (1.0, 2.0) for need in needs) and all(
        part.policy is None or _is_own(part.policy) for part in roster.parts
    )


def _is_own(value: object) -> bool:
    """Whether a policy is made of gradkeel's own parts, which decide by tensors alone."""
    if value is None or isinstance(value, int | float | str):
        return True
    if isinstance(value, tuple | list):
        return all(map(_is_own, value))
    if isinstance(value, Mapping):
        return all(map(_is_own, value.values()))
    return type(value).__module__.startswith("gradkeel.") and all(map(_is_own, _parts(value)))


def _parts(value: Any) -> list[object]:
    return (
        [getattr(value, field.name) for field in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else []
    )


def _remembered(states: Mapping[str, State]) -> tuple[Tensor, dict[str, dict[str, Place]]]:
    """[w] words of all states, in memory of their own, and where each tensor of theirs stands."""
    tensors = [tensor for state in states.values() for tensor in state.values()]
    if not tensors:
        return torch.zeros(0, dtype=torch.float64), {label: {} for label in states}
    words, places = packed(tensors)
    rest = iter(places)
    return words, {label: {key: next(rest) for key in state} for label, state in states.items()}


def _tensors(of: Any) -> dict[str, Tensor]:
    found = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _read(words: Tensor, places: Places) -> dict[str, Any]:
    return {name: read(words, place) for name, place in places.items()}
