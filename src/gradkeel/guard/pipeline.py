"""One step of a guard, from the gradients to the optimizer's own step: what is read top to bottom here is the order."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkeel.apply.fused import Folding, can_skip_on_device
from gradkeel.apply.skip import Buffers, clear_gradients
from gradkeel.errors import NonFiniteGradientError
from gradkeel.guard import hooks, other_clips, stack
from gradkeel.guard.captured import Captured
from gradkeel.guard.given import Given, Route
from gradkeel.guard.lasting import Lasting
from gradkeel.guard.prescale import prescale
from gradkeel.guard.replay import Replays
from gradkeel.guard.report import Recorder, SkipReason, StepReport
from gradkeel.guard.roster import Roster
from gradkeel.guard.skips import SkipWatch
from gradkeel.guard.step import carry_out, committed, decide_all, judge, measure_all
from gradkeel.guard.turns import Turns
from gradkeel.kernels.arrival import is_capturing
from gradkeel.kernels.graph import Entry
from gradkeel.kernels.native import Table
from gradkeel.measure import Readings
from gradkeel.norms import State, Window
from gradkeel.tensors import Seen

NonFinite = Literal["skip", "raise", "keep"]
Staged = tuple[StepReport, dict[str, State], Tensor | bool]
"""The row of a step under way, the policies' states after it, and whether its gradients are sound."""


class Pipeline:
    """What a `Guard`, which says what its attributes are, does in each step; called by the optimizers' hooks."""

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        roster: Roster,
        buffers: Buffers,
        nonfinite: NonFinite,
        max_consecutive_skips: int,
    ) -> None:
        self.optimizers = tuple(optimizers)
        self._alone = optimizers[0] if len(optimizers) == 1 else None
        self.nonfinite: NonFinite = nonfinite
        self.recorders: list[Recorder] = []
        self.window: Window | None = None
        self.report = StepReport(0, tuple(part.report for part in roster.parts), stepped_or_pending=False)
        self._roster = roster
        self._buffers = buffers
        self._skips = SkipWatch(max_consecutive_skips, buffers.broken)
        self._folding = Folding()
        self._replays = Replays()
        self._lasting = Lasting()
        self._states: dict[str, State] = {}
        self._scalars: dict[str, Tensor | float] = {}
        self._step = 0
        self._staged: Staged | None = None
        self._told: Tensor | None = None  # the verdict of a replayed step, as its row has it
        self._left: list[Seen | None] | None = None
        self._is_again = False  # the step under way: it has raised before, with the same gradients

    def _connect_hooks(self) -> None:
        """From now on the optimizers' steps are guarded."""
        self._canary = other_clips.Canary(next((p for p in self._roster.parameters if p.requires_grad), None))
        calls = hooks.Calls(self._begin, self._evaluate, self._fail, self._finish)
        if len(self.optimizers) == 1:
            self._hooks = [hooks.Hooks(self.optimizers[0], self, calls)]
        else:
            self._hooks = Turns(self.optimizers, self, calls, lambda: self._staged is not None).hooks
        self._first = self._hooks[0]  # of the optimizer that has decided on the step under way

    @abstractmethod
    def connect(self) -> None:
        """Read the optimizers' groups again, if they have changed."""

    def _begin(self, first: int = 0) -> None:
        self._first = self._hooks[first]
        self._is_again = self._left is not None and self._is_called_again(self._left)
        if not self._is_again:
            self._staged = self._told = None
        try:
            self._skips.look()
        except Exception:
            self._roster.fail()
            raise
        self.connect()
        if self._buffers.kept:
            self._buffers.look(self._roster.parameters)

    def _evaluate(self) -> bool:
        """From the gradients to the optimizer's own step: read, exchange, decide, judge, apply, and note the row.

        Returns whether the step is to be made, as far as the host knows.
        """
        roster = self._roster
        if self._is_again and self._staged is not None:
            may_step = self._staged[0].stepped_or_pending
            if isinstance(may_step, Tensor):
                self._first.give("found_inf", (~may_step).float())
            return may_step is not False
        if hooks.only_creates_state(self._first.optimizer, roster.parameters, alone=roster.exchange is None):
            return True
        was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # noqa: FBT003  # a `with` of torch.no_grad() costs a tenth of a small step
        try:
            try:
                self._check()
                given = self._given()
                entry, captured = None, None
                if given is not None:
                    gradients = [parameter.grad for parameter in roster.parameters]
                    entry, captured = self._replays.find(self._alone, roster, gradients, self._states, given)
                found: Sequence[Readings] = ()
                if entry is None:
                    if roster.is_on_cuda and is_capturing(roster.device):  # into a graph of the user's
                        self._states = self._lasting.begun(self._states)
                    found = roster.readings()
                elif captured is None:
                    with entry.slots.active():
                        found = roster.readings()
            except Exception:
                roster.fail()
                raise
            if captured is not None and given is not None:
                self._staged = self._replayed(captured, given, gradients)
            else:
                self._staged = self._launched(found, entry)
        finally:
            torch._C._set_grad_enabled(was_enabled)
        row = self._staged[0]
        if self.recorders:
            hooks.tell(self.recorders, "before_step", row)
        return row.stepped_or_pending is not False

    def _given(self) -> Given | None:
        """What this step is given besides its gradients; None where it is launched in any case."""
        if not self._roster.is_on_cuda:
            return None
        window, loss_scale = self.window, self._first.loss_scale
        if window is not None and window.is_empty() is not False:
            return None
        factor = prescale(loss_scale, 1.0 if window is None else window.factor(), self._roster.device)
        tolerant = self._is_tolerant(loss_scale.found_inf)
        route = Route.HOST
        if self._can_skip_on_device():
            route = self._replays.route(self._roster, self._folding)
        return Given(self._step + 1, factor, self._scalars.get("loss"), loss_scale.found_inf, tolerant, route)

    def _launched(self, found: Sequence[Readings], entry: Entry[Captured] | None) -> Staged:
        """The row of this step from what was read, and the policies' states after it; operation after operation."""
        roster = self._roster
        table = found[roster.here[0]].table if len(roster.here) == 1 else None
        measured = measure_all(
            roster,
            found,
            window=self.window,
            loss_scale=self._first.loss_scale,
            step=self._step + 1,
            loss=self._scalars.get("loss"),
        )
        if measured.agreed_scalars:
            self._scalars |= measured.agreed_scalars
        reports, after = decide_all(roster, measured, self._states)
        row = StepReport(self._step + 1, tuple(reports), measured.prescale, dict(self._scalars))
        tolerant = self._is_tolerant(measured.found_inf)
        finite, may_step = judge(reports, measured.found_inf, self.window, tolerant=tolerant)
        if not measured.has_gradients:
            commit: Tensor | bool = self._abandon(row, SkipReason.NO_GRADIENT)
        elif isinstance(may_step, Tensor) and self._can_skip_on_device():
            self._carry_out(row, entry, table)
            self._first.give("found_inf", (~may_step).float())
            row.stepped_or_pending, commit = may_step, finite
            row.overflowed = partial(self._is_overflow, measured.found_inf)
        elif may_step:
            self._carry_out(row, entry, table)
            commit = not tolerant or bool(finite)
        else:
            why = self._why(measured.found_inf, is_finite=bool(finite), tolerant=tolerant)
            commit = self._abandon(row, why) and bool(finite)
        return row, committed(roster.parts, reports, after, self._states, commit), commit

    def _replayed(self, captured: Captured, given: Given, gradients: Sequence[Tensor | None]) -> Staged:
        """The same by what was captured for these gradients."""
        row = captured.replay(given, self._states)
        report = StepReport(given.step, row.reports, given.prescale, dict(self._scalars))
        if row.found_inf is not None:
            if row.kernel_scale is not None:
                self._first.give("grad_scale", row.kernel_scale)
            else:
                captured.apply(row, gradients)
            self._first.give("found_inf", row.found_inf)
            report.stepped_or_pending = row.may_step
            report.overflowed = partial(self._is_overflow, given.found_inf)
            self._told = row.verdict
            return report, row.states, row.may_step
        may_step, is_finite, is_scaled = row.flags()
        if not may_step:
            why = self._why(given.found_inf, is_finite=is_finite, tolerant=given.tolerant)
            self._abandon(report, why)
        else:
            captured.apply(row, gradients, scales=is_scaled)
        return report, row.states, is_finite

    def _is_tolerant(self, found_inf: Tensor | None) -> bool:
        """Whether a step may be made on non-finite gradients; an overflow of the loss scale is skipped in any case."""
        return self.nonfinite == "keep" and not self._is_overflow(found_inf)

    def _why(self, found_inf: Tensor | None, *, is_finite: bool, tolerant: bool) -> SkipReason:
        if is_finite or tolerant:  # who tolerates would have made the step
            return SkipReason.POLICY
        return SkipReason.LOSS_SCALE if self._is_overflow(found_inf) else SkipReason.NONFINITE

    def _check(self) -> None:
        """Is this the moment to step, and does nobody else clip?"""
        if self.window is not None:
            self.window.check_step()
        else:
            other_clips.warn_of_other_clips(self._canary, clips=self._roster.clips)

    def _can_skip_on_device(self) -> bool:
        """Whether the optimizer's kernel may be left to skip by itself, so that the host need not know."""
        return (
            self.nonfinite == "skip"
            and len(self.optimizers) == 1
            and can_skip_on_device(self.optimizers[0], self._roster.device, self._roster.parameters)
        )

    def _carry_out(self, row: StepReport, entry: Entry[Captured] | None, table: Table | None) -> None:
        """Apply what was decided; with an ``entry`` as the rehearsal of the graphs that will do it."""
        if entry is not None:
            with entry.slots.active():
                carry_out(None, self._roster, row.selections, row.prescale, self._folding)
            entry.is_rehearsed = not entry.slots.missed
            return
        folded = carry_out(self._alone, self._roster, row.selections, row.prescale, self._folding, table)
        if folded is not None:
            self._first.give("grad_scale", folded)

    def _is_overflow(self, found_inf: Tensor | None) -> bool:
        """Whether the loss scaler saw an inf, and lowering its scale may help; syncs the host, as a scaler's step does.

        Asked under ``nonfinite="keep"``, of steps that the host skips, and by who looks at one before it is made.
        """
        loss_scale = self._first.loss_scale
        # The scaler looks at the other optimizers' gradients when they step.
        knows = len(self.optimizers) == 1
        if not loss_scale.present or (knows and (found_inf is None or not bool(found_inf > 0))):
            return False
        scaler, scale = stack.scaler(), loss_scale.scale
        if scaler is not None:
            return self._skips.expects_overflow(scaler.get_scale())
        return self._skips.expects_overflow(None if scale is None else float(scale))

    def _abandon(self, row: StepReport, why: SkipReason) -> bool:
        """Skip this step, as the host knows that it must; returns whether the policies' statistics go on."""
        if self.window is not None and bool(self.window.is_empty()):
            why = SkipReason.EMPTY_WINDOW
        row.stepped_or_pending, row.why = False, why
        row.forget_decisions()
        if self._buffers.kept and self._spoils_buffers(why):
            self._buffers.put_back()
        if why is SkipReason.NONFINITE:
            self._refuse(row)
        elif why is SkipReason.LOSS_SCALE:
            self._skips.overflowed()
        elif why is SkipReason.NO_GRADIENT:
            self._skips.without_gradient(self._roster.parameters, self._roster.model)
        if why is not SkipReason.LOSS_SCALE:  # these are the scaler's to judge
            clear_gradients(self._roster.parameters)
        return why is SkipReason.POLICY

    def _spoils_buffers(self, why: SkipReason) -> bool:
        """Whether what the forward pass put into the model's buffers is to be taken back."""
        if why is SkipReason.LOSS_SCALE:  # the batch may be sound
            return bool(self._buffers.broken())
        return why is SkipReason.POLICY or (why is SkipReason.NONFINITE and self.nonfinite == "skip")

    def _refuse(self, row: StepReport) -> None:
        """Raise, or count and warn of, a non-finite gradient; nothing has been modified yet."""
        if self.nonfinite == "raise":
            raise NonFiniteGradientError(
                f"{self._skips.explained(row.reason or '')}; nothing has been modified"
            )
        self._skips.skipped(row.reason or "")

    def _fail(self) -> None:
        """The optimizer's own step has raised, or a hook before it may; what is applied by then stays so."""
        if self._staged is not None and "grad_scale" not in self._first.own:
            self._left = [None if p.grad is None else Seen(p.grad) for p in self._roster.parameters]

    def _is_called_again(self, left: list[Seen | None]) -> bool:
        """Whether the gradients are as a step has left them that raised."""
        self._left = None
        return all(
            p.grad is None if seen is None else seen.is_tensor(p.grad) and seen.unchanged() is not None
            for p, seen in zip(self._roster.parameters, left, strict=True)
        )

    def _finish(self) -> None:
        """After the optimizer's step, or the last one's: commit, and tell the recorders."""
        self._left = None
        if self._staged is None:
            return
        was_skipped = self._step > 0 and self.report.stepped_or_pending is False
        (self.report, states, is_sound), self._staged = self._staged, None
        self._states = self._lasting.updated(states)
        self._step += 1
        self._scalars = {}
        stepped = self.report.stepped_or_pending
        if was_skipped or stepped is False:
            other_clips.tell_accelerate(stepped=stepped is not False)
        if isinstance(stepped, Tensor):
            self._skips.watch(self.report, stepped, self._first.loss_scale, self._told, self._folding.heard)
            self._told = None
        elif stepped and is_sound:
            self._skips.made()
        if self._buffers.kept and not isinstance(stepped, Tensor):
            self._buffers.note(self._roster.parameters)
        if self.window is not None:
            self.window.closed(stepped=stepped)
        if self.recorders:
            hooks.tell(self.recorders, "record", self.report)
