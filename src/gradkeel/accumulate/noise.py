"""Measures the norms from which the gradient noise scale is estimated."""

from collections.abc import Iterable

from torch import Tensor

from gradkeel.guard.guard import Guard
from gradkeel.noise_scale import NoiseScale
from gradkeel.ranks.total import measure_total

_PENDING = 1000


class NoiseMeter:
    """Keeps each window's weights and norms as they are, and adds them up when the estimate is read.

    Every 1,000 windows they are added up anyway, so that memory stays small; on an accelerator that syncs the host.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._scale = NoiseScale()
        self._open: list[tuple[Tensor | float, Tensor]] = []
        self._closed: list[tuple[list[tuple[Tensor | float, Tensor]], Tensor | None]] = []

    def note(self, weight: Tensor | float, divisor: float, sums: Iterable[Tensor] = ()) -> None:
        """Measure after a micro-batch: its gradient, or the running sum, which are the window's up to ``weight``.

        ``sums`` are wide ones out of a checkpoint, which count as one micro-batch.
        """
        gradients = [*sums, *(p.grad for p in self._guard.parameters if p.grad is not None)]
        self._open.append((weight, self._norm(gradients) * divisor))

    def drop(self) -> None:
        """Forget the open window."""
        self._open = []

    def close(self, sums: Iterable[Tensor] | None, divisor: float) -> None:
        """End the window; ``sums`` are its gradients where the micro-batches were measured one by one."""
        self._closed.append((self._open, None if sums is None else self._norm(list(sums)) * divisor))
        self._open = []
        if len(self._closed) >= _PENDING:
            self.value()

    def value(self) -> NoiseScale:
        """Return the estimate over all closed windows."""
        for window, total in self._closed:
            counts, norms, before = [], [], 0.0
            for weight_so_far, norm in window:
                if float(weight_so_far) > before:  # a micro-batch without items tells nothing
                    counts.append(float(weight_so_far) - before)
                    norms.append(float(norm))
                    before = float(weight_so_far)
            if len(counts) < 2:
                continue
            if total is None:
                self._scale = self._scale.add_running(counts, sum_norms=norms)
            else:
                self._scale = self._scale.add(counts, part_norms=norms, total_norm=float(total))
        self._closed = []
        return self._scale

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return measure_total(gradients, 2.0, self._guard.device)
