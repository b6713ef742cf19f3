"""When the weights themselves are measured, and how: their norms before a step, and the norms of its update."""

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.measure.placement import entries_to_read
from gradkeel.measure.powers import tensor_norms
from gradkeel.norms import GradientNorms
from gradkeel.record.rows import Sample

FIRST_STEPS = 100
INTERVAL = 50
ALARM = 3.0  # times the largest norm of the last 64 steps; such steps are looked at whatever the interval
AFTER_ALARM = 10


class Sampling:
    """Chooses steps: each of the first 100, then every 50th; on the CPU also those around a jump of the norm.

    A jump is seen without waiting only where norms are on the host, which is why an accelerator has the interval
    alone. What is measured are 2-norms.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=64)
        self._seen = 0
        self._alarmed_until = 0

    def wants(self, measured: GradientNorms) -> bool:
        """Whether to measure the weights at this step; call it once a step."""
        self._seen += 1
        step = measured.step
        if measured.total.device.type == "cpu":
            total = float(measured.total)
            if self._recent and not total <= ALARM * max(self._recent):
                self._alarmed_until = step + AFTER_ALARM
            if math.isfinite(total):
                self._recent.append(total)
        return self._seen <= FIRST_STEPS or step % INTERVAL == 0 or step <= self._alarmed_until


class BeforeUpdate:
    """The weights as they were before a step's update."""

    @torch.no_grad()
    def __init__(self, names: tuple[str, ...], parameters: Sequence[Tensor], device: torch.device) -> None:
        self._names, self._parameters, self._device = names, parameters, device
        self._before = [entries_to_read(parameter).clone() for parameter in parameters]

    @torch.no_grad()
    def sample(self) -> Sample:
        """Norms of the weights before the update, and of the update; call it after the optimizer's step."""
        updates = [
            entries_to_read(parameter) - before
            for parameter, before in zip(self._parameters, self._before, strict=True)
        ]
        return Sample(
            self._names,
            tensor_norms(self._before, 2.0, self._device),
            tensor_norms(updates, 2.0, self._device),
        )
