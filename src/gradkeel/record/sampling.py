"""When the weights themselves are measured, and how: their norms before a step, and the norms of its update."""

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.measure.copies import Copies
from gradkeel.measure.powers import read
from gradkeel.record.kept import Sample
from gradkeel.record.lag import Lag
from gradkeel.tensors import is_quantized

FIRST_STEPS = 100
EVERY = 50  # steps; an update costs a copy of the weights and three passes over them
SUSPICION, ALARM = 1.5, 3.0
"""Times the highest norm of the last 20 steps: from there on weights, and also updates, are measured whatever the
interval."""
AFTER_ALARM = 10
RATE_ALARM = 2.0  # times the last learning rate


class Sampling:
    """Chooses steps: each of the first 100, then every 50th, and those at which something jumps.

    That is the learning rate and, on the CPU, the gradient norm: these steps are what one wants to know about later;
    elsewhere the host would have to wait for the norm. What is measured are 2-norms.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=20)
        self._seen = 0
        self._alarmed_until = 0
        self._rate: float | None = None

    def next(self, step: int, total: float | None, rate: float | None = None) -> tuple[bool, bool]:
        """Whether to measure the weights at this step, and whether the update as well; call it once a step.

        The gradients' norm and the learning rate are None where the host would have to wait for them.
        """
        self._seen += 1
        recent, jump = self._recent, 0.0
        if total is not None:
            if recent and total <= SUSPICION * recent[-1]:  # as almost always
                recent.append(total)
            else:
                jump = self._jump(total)
        if rate != self._rate:
            if rate is not None and self._rate is not None and rate > RATE_ALARM * self._rate:
                self._alarmed_until = step + AFTER_ALARM
            self._rate = rate
        if not jump <= ALARM:
            self._alarmed_until = step + AFTER_ALARM
        updates = self._seen <= FIRST_STEPS or step % EVERY == 0 or step <= self._alarmed_until
        return updates or not jump <= SUSPICION, updates

    def _jump(self, total: float) -> float:
        """A norm that is suspiciously above the last, relative to the highest of the last; NaN where not finite."""
        recent = self._recent
        if not math.isfinite(total):
            return math.nan
        highest = max(recent, default=math.inf)  # the last alone says too little
        recent.append(total)
        return total / highest if highest > 0 else 0.0


class BeforeUpdate:
    """The norms of the weights before a step's update, and the weights themselves where the update is wanted."""

    def __init__(
        self,
        names: tuple[str, ...],
        parameters: Sequence[Tensor],
        device: torch.device,
        lag: Lag | None,
        *,
        updates: bool,
    ) -> None:
        self._names, self._parameters, self._device, self._lag = names, parameters, device, lag
        tensors = self._tensors()
        found = read(tensors, 2.0, device)
        self._weights = found.norms
        self._copies = Copies(tensors, found.table) if updates else None

    def _tensors(self) -> list[Tensor]:
        """What is read of each parameter: nothing of a quantized one, whose norm is then 0."""
        return [p.new_empty(0, dtype=torch.float32) if is_quantized(p) else p for p in self._parameters]

    def sample(self) -> Sample:
        """Norms of the weights before the update, and of the update; call it after the optimizer's step."""
        if self._copies is None:
            return Sample(self._names, self._weights, torch.full_like(self._weights, math.nan), self._lag)
        moved = self._copies.distances(self._tensors(), self._device)
        return Sample(self._names, self._weights, moved, self._lag)
