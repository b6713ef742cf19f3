"""Collects the norms from which the gradient noise scale is estimated."""

from torch import Tensor

from gradkeel.noise_scale import NoiseScale

_PENDING = 1000


class NoiseMeter:
    """Keeps each window's weights and norms as they are, and adds them up when the estimate is read.

    Every 1,000 windows they are added up anyway, so that memory stays small; on an accelerator that syncs the host.
    """

    def __init__(self) -> None:
        self._scale = NoiseScale()
        self._open: list[tuple[Tensor | float, Tensor]] = []
        self._closed: list[tuple[list[tuple[Tensor | float, Tensor]], Tensor | None]] = []

    def add(self, weight_so_far: Tensor | float, norm: Tensor) -> None:
        """Take a micro-batch: the window's weight up to it, and the norm of its gradient or of the running sum."""
        self._open.append((weight_so_far, norm))

    def drop(self) -> None:
        """Forget the open window."""
        self._open = []

    def close(self, total_norm: Tensor | None) -> None:
        """End the window; ``total_norm`` is its sum's where the micro-batches were measured one by one."""
        self._closed.append((self._open, total_norm))
        self._open = []
        if len(self._closed) >= _PENDING:
            self.value()

    def value(self) -> NoiseScale:
        """The estimate over all closed windows."""
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
