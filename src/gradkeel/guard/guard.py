"""The guard: what outlives a step, and what a user asks of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradkeel.apply.skip import Buffers
from gradkeel.errors import AttachError, CheckpointError
from gradkeel.guard import hooks
from gradkeel.guard.checkpoint import check_state
from gradkeel.guard.pipeline import NonFinite, Pipeline
from gradkeel.guard.replay import Replays
from gradkeel.guard.report import Recorder
from gradkeel.guard.roster import Roster
from gradkeel.policies import Policy
from gradkeel.ranks.declared import Sharing
from gradkeel.ranks.group import Ranks
from gradkeel.selection import Exclude

_VERSION = 1


class Guard(Pipeline):
    """Measures, clips and guards every step of one optimizer, or of several as one; made by `gradkeel.attach`.

    Attributes:
        optimizers: the torch optimizers.
        policy: the main policy, or None where gradients are only measured.
        nonfinite: what happens to a step with a NaN or inf gradient: "skip", "raise" or "keep".
        report: the last step's `StepReport`; before the first step one with ``step == 0``.
        recorders: who is told of each step.
        window: the accumulation window that gradients belong to; None where each step's gradients are complete.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        policy: Policy | None,
        *,
        model: nn.Module | None,
        exclude: Iterable[Exclude],
        nonfinite: NonFinite,
        max_consecutive_skips: int,
        sharing: Sharing,
        summarize: Callable[["Guard"], str],
    ) -> None:
        roster = Roster(optimizers, policy, model=model, exclude=exclude, sharing=sharing)
        super().__init__(
            optimizers, roster, Buffers(model, roster.parameters), nonfinite, max_consecutive_skips
        )
        self.policy = policy
        self._summarize = summarize
        self._is_detached = False
        self._closed: list[Recorder] = []  # of the recorders
        # Only now, when nothing can fail any more, for an optimizer must not be left without a guard.
        for old in {id(own): own for one in optimizers if (own := getattr(one, hooks.MARK, None))}.values():
            self._follow(old)
        self._connect_hooks()

    # ---- what is guarded ---------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer; the first of several."""
        return self.optimizers[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters of the optimizers, in the order of ``report.selections``."""
        return self._roster.names

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All parameters of the optimizers, in the order of ``names``."""
        return self._roster.parameters

    @property
    def device(self) -> torch.device:
        """Where norms are put together."""
        return self._roster.device

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that train together, which decide alike; None for one process."""
        return self._roster.ranks

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
                self._lasting.forget(label)

    def __repr__(self) -> str:
        """What is guarded by what, and what is excluded."""
        kinds = " + ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        head = f"Guard({kinds}, step {self._step}, nonfinite={self.nonfinite!r})"
        return "\n".join([head, *self._roster.lines()])

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied or pickled, alone or as part of something: a guard lives in its optimizers' steps."""
        raise TypeError(
            "a Guard cannot be copied or pickled, for it belongs to the steps of its optimizer; save "
            "guard.state_dict() instead, then attach() to the other optimizer and call load_state_dict() on the new "
            "guard. An object that is copied or saved as a whole must not hold the guard"
        )

    def log(self, **scalars: Tensor | float) -> None:
        """Note numbers of the coming step, such as ``loss=...`` and ``lr=...``; call it before ``optimizer.step()``.

        Tensors are copied, for a running loss may change before the step, and stay on their device; the host is not
        synced. They go into ``report.scalars`` and the record, and a policy that looks at the loss reads ``loss``.

        Raises:
            ValueError: for a tensor that is not one real number.
            TypeError: for what is no number.
        """
        for name, value in scalars.items():
            if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
                raise ValueError(
                    f"guard.log({name}=...): wants one real number, not a tensor of shape {tuple(value.shape)} and "
                    f"{value.dtype}; log its mean"
                )
            try:
                self._scalars[name] = value.detach().clone() if isinstance(value, Tensor) else float(value)
            except (TypeError, ValueError):
                raise TypeError(
                    f"guard.log({name}={value!r}): wants one real number, not {type(value).__name__}"
                ) from None

    @property
    def logged(self) -> dict[str, Tensor | float]:
        """What `log` was told for the coming step; what is taken out of it counts as never told."""
        return self._scalars

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
        """Take the guard off the optimizer, leaving no hook and no attribute, and close the recorders, each once.

        What Ctrl-C leaves undone another call does.
        """
        self._is_detached = True
        for hooked in self._hooks:
            hooked.remove()
        self._canary.remove()
        self._replays = Replays()  # their memory goes
        for recorder in self.recorders:
            bound = getattr(recorder, "guard", None)
            # Attached anew meanwhile, it is the other guard's to close.
            is_anothers = isinstance(bound, Guard) and bound is not self
            if is_anothers or any(recorder is own for own in self._closed):
                continue
            self._closed.append(recorder)
            try:
                recorder.close()
            except KeyboardInterrupt:
                self._closed.remove(recorder)
                raise

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
                parameters or groups, of another version, or with a NaN or inf where none can be.
        """
        check_state(
            state,
            version=_VERSION,
            states=self._roster.filled({}),
            finite={part.label for part in self._roster.parts if part.is_own},
            **self._roster.fingerprint(),
        )
        self._states = self._lasting.updated(
            {
                label: {key: value.to(self.device, copy=True) for key, value in values.items()}
                for label, values in state["states"].items()
            }
        )
        self._step = int(state["step"])
        self._skips.resume(int(state["consecutive_skips"]))
