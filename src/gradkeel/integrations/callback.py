"""What the callbacks of trainers share: a guard for as long as training lasts, what it is told, and what it tells."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradkeel.attaching import attach
from gradkeel.errors import CheckpointError, GradkeelWarning
from gradkeel.explain.autopsy import Autopsy
from gradkeel.guard.guard import Guard
from gradkeel.policies import Policy


class Told:
    """Counts and sums over a run, on the device: nothing here syncs the host.

    Attributes:
        guard: whose steps they are.
        clipped: [] how many steps were clipped so far.
        skipped: [] how many were skipped.
        steps: how many there were.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.steps = 0
        self.clipped = self.skipped = torch.zeros((), device=guard.device)
        self._loss: Tensor | float = 0.0
        self._seen = self._loss_of = guard.step

    def loss(self, loss: Tensor) -> None:
        """Note a micro-batch's share of the coming step's loss; what the user has logged himself stands."""
        if self._loss_of != self.guard.step:
            self._loss, self._loss_of = 0.0, self.guard.step
        if "loss" not in self.guard.logged or self._loss is self.guard.logged["loss"]:
            self._loss = self._loss + loss.detach()
            self.guard.log(loss=self._loss)
            self._loss = self.guard.logged["loss"]

    def look(self) -> bool:
        """Count the step that was made since the last look; False where there was none."""
        if self.guard.step == self._seen:
            return False
        self._seen, report = self.guard.step, self.guard.report
        self.steps += 1
        made = report.stepped_tensor().to(self.skipped.device)
        self.clipped = self.clipped + (report.selections[0].outcome.is_clipped() & made)
        self.skipped = self.skipped + ~made
        return True

    def numbers(self) -> dict[str, Tensor]:
        """Of the last step its norm and coefficient, and over all steps the clipped share and the skipped ones."""
        report, one = self.guard.report, self.clipped.new_ones(())
        main = report.selections[0]
        factors = [part.min() for part in main.outcome.factors]
        coefficient = torch.stack(factors).prod() if factors else one
        made = report.stepped_tensor().to(coefficient.device)
        return {
            "grad_norm": main.measured.total,
            "clip_coefficient": torch.where(made, coefficient, 1.0),
            "clipped_share": self.clipped / max(1, self.steps),
            "skipped_steps": self.skipped,
        }


class TrainerGuard:
    """A callback's guard: attached when training begins, and detached at the end.

    The callbacks' own docstrings describe ``guard``, ``autopsy`` and the arguments.
    """

    def __init__(self, policy: Policy | str | None, *, autopsy: bool = False, **arguments: Any) -> None:
        self._policy, self._has_autopsy, self._arguments = policy, autopsy, arguments
        self._told: Told | None = None
        self._unlisten: Callable[[], Any] | None = None
        self.guard: Guard | None = None
        self.autopsy: Autopsy[Any] | None = None

    def _begin(self, optimizer: Any, model: Any, state: Mapping[str, Any] | None, step: int) -> Told:
        """Attach, and load a checkpoint's state; without one that fits, go on counting from the trainer's step."""
        self._end()  # of an attempt that an error ended
        self.guard = guard = attach(optimizer, self._policy, model=model, **self._arguments)
        try:
            guard.load_state_dict(state or {**guard.state_dict(), "step": step})
        except CheckpointError as error:
            words = f"the checkpoint's guard does not fit, so its policies' statistics begin anew: {error}"
            warnings.warn(words, GradkeelWarning, stacklevel=2)
            guard.load_state_dict({**guard.state_dict(), "step": step})
        self._told = told = Told(guard)
        return told

    def _end(self) -> None:
        """Detach, and close the recorders."""
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        if self.guard is not None:
            self.guard.detach()
