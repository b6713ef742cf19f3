"""The guard: holds what outlives a step, and runs the pipeline around one optimizer's step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradkeel.apply.fused import Folding, can_skip_on_device
from gradkeel.apply.skip import Snapshot, clear_gradients, moves_between_closures
from gradkeel.errors import AttachError, CheckpointError, NonFiniteGradientError
from gradkeel.guard import hooks, other_clips
from gradkeel.guard.checkpoint import check_state
from gradkeel.guard.prescale import LossScale, put_back, set_attribute, take_loss_scale
from gradkeel.guard.report import Recorder, SkipReason, StepReport
from gradkeel.guard.roster import Roster
from gradkeel.guard.skips import SkipWatch
from gradkeel.guard.step import carry_out, committed, decide_all, judge, measure_all
from gradkeel.norms import Decision, State, Window
from gradkeel.policies import Policy
from gradkeel.ranks.declared import Sharing
from gradkeel.selection import Exclude

NonFinite = Literal["skip", "raise", "keep"]
_VERSION = 1


class Guard:
    """Measures, clips and guards every step of one optimizer; made by `gradkeel.attach`.

    Attributes:
        optimizer: the torch optimizer.
        policy: the main policy, or None where gradients are only measured.
        nonfinite: what happens to a step with a NaN or inf gradient: "skip", "raise" or "keep".
        report: the last step's `StepReport`; before the first step one with ``step == 0``.
        recorders: who is told of each step.
        window: the accumulation window that gradients belong to; None where each step's gradients are complete.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        policy: Policy | None,
        *,
        model: nn.Module | None,
        exclude: Iterable[Exclude],
        nonfinite: NonFinite,
        max_consecutive_skips: int,
        sharing: Sharing,
        summarize: Callable[["Guard"], str],
    ) -> None:
        self.optimizer = optimizer
        self.policy = policy
        self.nonfinite: NonFinite = nonfinite
        self.recorders: list[Recorder] = []
        self.window: Window | None = None
        self._summarize = summarize
        self._states: dict[str, State] = {}
        self._scalars: dict[str, Tensor | float] = {}
        self._step = 0
        self._skips = SkipWatch(max_consecutive_skips)
        self._folding = Folding()
        self._roster = Roster(optimizer, policy, model=model, exclude=exclude, sharing=sharing)
        nothing = tuple(part.report for part in self._roster.parts)
        self.report = StepReport(0, nothing, stepped_or_pending=False)
        self._staged: tuple[StepReport, dict[str, State]] | None = None
        self._loss_scale = LossScale()
        self._own_attributes: dict[str, Tensor] = {}
        self._snapshot: Snapshot | None = None
        self._is_detached = False
        # Only now, when nothing can fail any more, for an optimizer must not be left without a guard.
        old: Guard | None = getattr(optimizer, hooks.MARK, None)
        if old is not None:
            self._follow(old)
        self._canary = other_clips.Canary(next((p for p in self.parameters if p.requires_grad), None))
        self._hooks = hooks.Hooks(optimizer, self, self._begin, self._evaluate, self._finish)

    # ---- what is guarded ---------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters of the optimizer, in the order of ``report.selections``."""
        return self._roster.names

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All parameters of the optimizer, in the order of ``names``."""
        return self._roster.parameters

    @property
    def device(self) -> torch.device:
        """Where norms are put together."""
        return self._roster.device

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks hold parts of the parameters, or further ones."""
        return self._roster.exchange is not None and self._roster.exchange.splits

    @property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Which piece of each parameter lies on this rank; those that count for another rank are left out."""
        return self._roster.pieces()

    @property
    def model(self) -> nn.Module | None:
        """The model that names the parameters, where ``attach`` was given one."""
        return self._roster.model

    @property
    def step(self) -> int:
        """How many steps the guard has seen, skipped ones included."""
        return self._step

    @property
    def policy_spec(self) -> str:
        """The main policy as a spec string, or its repr where it has none."""
        try:
            return "none" if self.policy is None else self.policy.spec
        except TypeError:
            return repr(self.policy)

    def connect(self) -> None:
        """Read the optimizer's groups and who shares them again, if they have changed; its ranks must do so alike.

        Raises:
            AttachError: the guard is detached, so that nobody would divide what an accumulator sums up.
        """
        if self._is_detached:
            raise AttachError(
                "this guard was detached, perhaps by another attach() to its optimizer; make an Accumulator for the "
                "new guard"
            )
        if self._roster.is_current(self.window):
            return
        # Statistics of other tensors, or another policy's, do not fit any more.
        before = self._roster.owners()
        self._roster.read(self.window)
        for label, owner in self._roster.owners().items():
            if before.get(label) != owner:
                self._states.pop(label, None)

    def __repr__(self) -> str:
        """What is guarded by what, and what is excluded."""
        head = f"Guard({type(self.optimizer).__name__}, step {self._step}, nonfinite={self.nonfinite!r})"
        return "\n".join([head, *self._roster.lines()])

    # ---- one step ----------------------------------------------------------------------------------------------

    def log(self, **scalars: Tensor | float) -> None:
        """Note numbers of the coming step, such as ``loss=...`` and ``lr=...``; call it before ``optimizer.step()``.

        Tensors stay on their device; the host is not synced. They go into ``report.scalars`` and the record, and a
        policy that looks at the loss reads ``loss``.
        """
        for name, value in scalars.items():
            self._scalars[name] = value.detach() if isinstance(value, Tensor) else float(value)

    @property
    def logged(self) -> dict[str, Tensor | float]:
        """What `log` was told for the coming step; what is taken out of it counts as never told."""
        return self._scalars

    def _begin(self) -> None:
        self._staged = None
        self._snapshot = Snapshot(self.optimizer) if moves_between_closures(self.optimizer) else None
        try:
            self._skips.look()
        except Exception:
            self._roster.fail()
            raise
        self.connect()
        self._loss_scale = take_loss_scale(self.optimizer, self._own_attributes)
        self._own_attributes = {}

    def _evaluate(self) -> None:
        """From the gradients to the optimizer's own step: read, exchange, decide, judge, apply, and note the row."""
        roster, scaled = self._roster, self._loss_scale.present
        if hooks.only_creates_state(self.optimizer, roster.parameters, alone=roster.exchange is None):
            return
        with torch.no_grad():
            try:
                self._check()
                if self._snapshot is not None and self._snapshot.is_wanted:
                    clear_gradients(roster.parameters)  # an earlier evaluation of this step was abandoned
                    return
                found = roster.readings()
            except Exception:
                roster.fail()
                raise
            measured = measure_all(
                roster,
                found,
                window=self.window,
                loss_scale=self._loss_scale,
                step=self._step + 1,
                loss=self._scalars.get("loss"),
            )
            self._scalars |= measured.agreed_scalars
            reports, after = decide_all(roster, measured, self._states)
            row = StepReport(self._step + 1, tuple(reports), measured.prescale, dict(self._scalars))
            # Under a loss scale an overflow is normal, and skipped whatever was asked for.
            tolerant = self.nonfinite == "keep" and not scaled
            finite, may_step = judge(reports, measured.found_inf, self.window, tolerant=tolerant)
            if not measured.has_gradients:
                commit: Tensor | bool = self._abandon(row, SkipReason.NO_GRADIENT)
            elif isinstance(may_step, Tensor) and self._can_skip_on_device():
                self._carry_out(row)
                self._set_attribute("found_inf", (~may_step).float())
                row.stepped_or_pending, commit = may_step, finite
            elif may_step:
                self._carry_out(row)
                commit = not tolerant or bool(finite)
            else:
                why = self._reason_to_skip(is_finite=bool(finite), tolerant=tolerant)
                commit = self._abandon(row, why) and bool(finite)
            self._staged = row, committed(roster.parts, reports, after, self._states, commit)
        hooks.tell(self.recorders, "before_step", row)

    def _check(self) -> None:
        """Is this the moment to step, and does nobody else clip?"""
        if self.window is not None:
            self.window.check_step()
        else:
            other_clips.warn_of_other_clips(self._canary)

    def _can_skip_on_device(self) -> bool:
        """Whether the optimizer's kernel may be left to skip by itself, so that the host need not know."""
        return self.nonfinite == "skip" and can_skip_on_device(
            self.optimizer, self.device, self._roster.parameters
        )

    def _carry_out(self, row: StepReport) -> None:
        folded = carry_out(self.optimizer, self._roster, row.selections, row.prescale, self._folding)
        if folded is not None:
            self._set_attribute("grad_scale", folded)

    def _set_attribute(self, name: str, value: Tensor) -> None:
        """Set what a fused kernel reads, and remember it: a step that raises leaves it behind."""
        set_attribute(self.optimizer, name, value)
        self._own_attributes[name] = value

    def _reason_to_skip(self, *, is_finite: bool, tolerant: bool) -> SkipReason:
        if is_finite or tolerant:  # who tolerates would have made the step
            return SkipReason.POLICY
        return SkipReason.LOSS_SCALE if self._loss_scale.present else SkipReason.NONFINITE

    def _abandon(self, row: StepReport, why: SkipReason) -> bool:
        """Skip this step, as the host knows that it must; returns whether the policies' statistics go on."""
        if self.window is not None and bool(self.window.is_empty()):
            why = SkipReason.EMPTY_WINDOW
        for selection in row.selections:  # nothing is applied; the bound stays, for the report
            selection.decision = Decision(bound=selection.decision.bound)
        row.stepped_or_pending, row.why = False, why
        if why is SkipReason.NONFINITE:
            self._refuse(row)
        clear_gradients(self._roster.parameters)
        if self._snapshot is not None:
            self._snapshot.is_wanted = True
        return why is SkipReason.POLICY

    def _refuse(self, row: StepReport) -> None:
        """Raise, or count and warn of, a non-finite gradient; nothing has been modified yet."""
        try:
            if self.nonfinite == "raise":
                raise NonFiniteGradientError(f"{row.reason}; nothing has been modified")
            self._skips.skipped(row.reason or "")
        except Exception:
            if self._snapshot is not None:
                self._snapshot.restore()
            raise

    def _finish(self) -> None:
        """After the optimizer's step: commit, leave no attribute behind, tell the recorders."""
        put_back(self.optimizer, self._loss_scale)
        self._own_attributes = {}
        if self._staged is None:
            return
        was_skipped = self._step > 0 and self.report.stepped_or_pending is False
        (self.report, self._states), self._staged = self._staged, None
        self._step += 1
        self._scalars = {}
        if self._snapshot is not None and self._snapshot.is_wanted:
            self._snapshot.restore()
        self._snapshot = None
        stepped = self.report.stepped_or_pending
        if was_skipped or stepped is False:
            other_clips.tell_accelerate(stepped=stepped is not False)
        if isinstance(stepped, Tensor):
            if not self._loss_scale.present:
                self._skips.watch(self.report, stepped)
        elif stepped:
            self._skips.made()
        if self.window is not None:
            self.window.closed(stepped=stepped)
        hooks.tell(self.recorders, "record", self.report)

    # ---- life ----------------------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Print what the record tells so far, as ``gradkeel explain`` does; needs ``attach(..., record=path)``."""
        print(self._summarize(self))  # noqa: T201  # what the caller asked for

    def _follow(self, old: "Guard") -> None:
        """Take over from another guard of this optimizer: its step and, under the same policies, its statistics."""
        if old.window is not None:
            old.window.drop()
        try:
            self.load_state_dict(old.state_dict())
        except CheckpointError:
            self._step = old.step
        old.detach()

    def detach(self) -> None:
        """Take the guard off the optimizer, leaving no hook and no attribute, and close the recorders."""
        if self._is_detached:
            return
        self._is_detached = True
        self._hooks.remove()
        self._canary.remove()
        for recorder in self.recorders:
            recorder.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a checkpoint: step, skips in a row, and the policies' states.

        Loadable with ``torch.load(weights_only=True)``, and `Stateful` for ``torch.distributed.checkpoint``.
        """
        return {
            "version": _VERSION,
            "step": self._step,
            "consecutive_skips": self._skips.consecutive,
            **self._roster.fingerprint(),
            "states": {
                label: {key: value.detach().clone() for key, value in state.items()}
                for label, state in self._roster.filled(self._states).items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that ``state_dict`` gave; nothing is changed if it does not fit.

        Raises:
            CheckpointError: for a state of other policies (unless neither remembers anything), of other numbers of
                parameters, or of another version.
        """
        own = self._roster.filled(self._states)
        check_state(state, version=_VERSION, states=own, **self._roster.fingerprint())
        self._states = {
            label: {key: value.to(self.device) for key, value in values.items()}
            for label, values in state["states"].items()
        }
        self._step = int(state["step"])
        self._skips.resume(int(state["consecutive_skips"]))
