"""What the callbacks of trainers share: how a guard goes on from a checkpoint, what it is told, and what it tells."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import CheckpointError, GradkeelWarning
from gradkeel.guard.guard import Guard


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
        self.clipped = self.clipped + report.selections[0].outcome.is_clipped()
        self.skipped = self.skipped + ~report.stepped_tensor().to(self.skipped.device).bool()
        return True

    def numbers(self) -> dict[str, Tensor]:
        """Of the last step its norm and coefficient, and over all steps the clipped share and the skipped ones."""
        main = self.guard.report.selections[0]
        factors = [part.min() for part in main.outcome.factors]
        one = self.clipped.new_ones(())
        return {
            "grad_norm": main.measured.total,
            "clip_coefficient": torch.stack(factors).prod() if factors else one,
            "clipped_share": self.clipped / max(1, self.steps),
            "skipped_steps": self.skipped,
        }


def go_on(guard: Guard, state: Mapping[str, Any] | None, step: int) -> None:
    """Load the guard's state out of a checkpoint; without one that fits, go on counting from the trainer's step."""
    if state is not None:
        try:
            guard.load_state_dict(state)
        except CheckpointError as error:
            warnings.warn(
                f"the checkpoint's guard does not fit, so its policies' statistics begin anew: {error}",
                GradkeelWarning,
                stacklevel=2,
            )
        else:
            return
    guard.load_state_dict({**guard.state_dict(), "step": step})
