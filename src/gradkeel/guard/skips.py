"""Counts skipped steps: warns at the first, gives up after too many in a row."""

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from gradkeel.errors import SkippedStepWarning, TooManySkipsError
from gradkeel.guard.report import StepReport
from gradkeel.kernels.arrival import Arrival, is_capturing, to_host


class SkipWatch:
    """Warns of the first skip and raises after more than ``limit`` in a row.

    Where the device skips by itself, the verdict is copied to the host without waiting for it and looked at in a
    later step, so that the warning comes a little late and the host is never synced.

    Args:
        limit: more skips in a row than this raise.
        broken: tells the names of the model's buffers that hold a NaN, as a forward pass leaves it behind; asked at
            each skip until there are some.
    """

    def __init__(self, limit: int, broken: Callable[[], Sequence[str]] = tuple) -> None:
        self._limit = limit
        self._broken: Callable[[], Sequence[str]] = broken
        self._warned = False
        self._history: list[str] = []
        self._arriving: list[tuple[StepReport, Tensor, Arrival]] = []

    @property
    def consecutive(self) -> int:
        """How many steps in a row were skipped for a non-finite gradient."""
        return len(self._history)

    def made(self) -> None:
        """A step was made: forget the skips before it."""
        self._history.clear()

    def resume(self, count: int) -> None:
        """Take up the count of a checkpoint."""
        self._history = ["(before the checkpoint)"] * count

    def skipped(self, reason: str) -> None:
        """A step was skipped for ``reason``; warn once, raise if it is one too many."""
        self._history.append(reason)
        if len(self._history) > self._limit:
            history = "\n  ".join(self._history)
            self._history.clear()
            raise TooManySkipsError(
                f"more than max_consecutive_skips={self._limit} steps in a row had a non-finite gradient; the "
                f"parameters may be non-finite already:\n  {history}\nrestart from a checkpoint, with a lower learning "
                "rate or bound"
            )
        broken = self._broken()
        if self._warned and not broken:
            return
        words = f"{reason}; the step was skipped, and parameters and optimizer state are unchanged"
        if broken:
            self._broken = tuple
            names = (
                " and ".join(map(repr, broken))
                if len(broken) < 4
                else f"{broken[0]!r} and {len(broken) - 1} more"
            )
            words += (
                f", but the model's buffers {names} hold a NaN, which the forward pass has left there: the model will "
                "give NaN in evaluation until they are reset or loaded"
            )
        self._warned = True
        warnings.warn(
            f"{words} (later skips are silent: see guard.report.reason)", SkippedStepWarning, stacklevel=2
        )

    def watch(self, report: StepReport, stepped: Tensor) -> None:
        """Take note of a verdict that only the device knows yet.

        A step that is being captured has none: it is not made now.
        """
        if not is_capturing(stepped.device):
            flag = to_host(stepped)
            self._arriving.append((report, flag, Arrival(stepped.device)))

    def look(self) -> None:
        """Judge the verdicts that have arrived, without waiting for any."""
        if not self._arriving or is_capturing(self._arriving[0][0].stepped_tensor().device):
            return  # asking would break the capture
        while self._arriving and self._arriving[0][2].is_there():
            report, flag, _ = self._arriving.pop(0)
            if bool(flag):
                self.made()
            else:
                self.skipped(report.reason or "a gradient was not finite")
