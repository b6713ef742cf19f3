"""Counts skipped steps: warns at the first, gives up after too many in a row."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradkeel.errors import SkippedStepWarning, TooManySkipsError
from gradkeel.guard.prescale import LossScale
from gradkeel.guard.report import SkipReason, StepReport
from gradkeel.kernels.arrival import Arrival, is_capturing, to_host

LONGEST_RUN = 30  # of overflows: a loss scale of 2**30 is halved to 1 in as many steps
LONGEST_RUN_BELOW_1 = 3  # there the gradients themselves leave float16's range


class _Pending(NamedTuple):
    """A verdict on its way to the host, and what the loss scaler says of it."""

    report: StepReport
    there: Tensor
    told: Tensor | None
    heard: Callable[[bool], None] | None
    arrival: Arrival

    def scaler(self) -> tuple[bool, float | None]:
        """Whether the loss scaler saw an inf, and its scale, if it is known; to be asked once they have arrived."""
        if self.told is None:
            return False, None
        found_inf, scale = self.told.tolist()
        return found_inf > 0, None if math.isnan(scale) else scale


class SkipWatch:
    """Warns of the first skip and raises after more than ``limit`` in a row.

    Where the device skips by itself, the verdict is copied to the host without waiting for it and looked at in a
    later step, so that the warning comes a little late and the host is not synced, but to say why one was skipped.
    ``broken`` tells the names of the model's buffers that hold a NaN, as a forward pass leaves it behind; it is asked
    at each skip until there are some.
    """

    def __init__(self, limit: int, broken: Callable[[], Sequence[str]] = tuple) -> None:
        self._limit = limit
        self._broken: Callable[[], Sequence[str]] = broken
        self._warned = False
        self._overflows = 0  # of the loss scale, in a row
        self._empty = 0  # steps in a row without a gradient
        self._history: list[str] = []
        self._arriving: list[_Pending] = []

    @property
    def consecutive(self) -> int:
        """How many steps in a row were skipped for a non-finite gradient."""
        return len(self._history)

    def made(self) -> None:
        """A step was made: forget the skips before it."""
        self._history.clear()
        self._overflows = self._empty = 0

    def expects_overflow(self, scale: float | None) -> bool:
        """Whether a non-finite gradient may be the loss scale's fault: not too small, and not fallen for too long."""
        return self._overflows < (LONGEST_RUN if scale is None or scale >= 1.0 else LONGEST_RUN_BELOW_1)

    def overflowed(self) -> None:
        """The loss scale was too large, and a scaler will lower it: neither warned of nor counted as a skip."""
        self._overflows += 1

    def without_gradient(self, parameters: Sequence[Tensor], model: nn.Module | None) -> None:
        """A step was skipped because there was no gradient; warn at the third in a row, once."""
        self._empty += 1
        if self._empty == 3:
            warnings.warn(
                f"3 steps in a row were skipped because no parameter of the optimizer has a gradient: "
                f"{_why_no_gradient(parameters, model)} (later "
                "ones are silent: see guard.report.reason)",
                SkippedStepWarning,
                stacklevel=2,
            )

    def resume(self, count: int) -> None:
        """Take up the count of a checkpoint."""
        self._history = ["(before the checkpoint)"] * count

    def skipped(self, reason: str) -> None:
        """A step was skipped for ``reason``; warn once, raise if it is one too many."""
        reason = self.explained(reason)
        self._history.append(reason)
        if len(self._history) > self._limit:
            history = "\n  ".join(self._history)
            self._history.clear()
            raise TooManySkipsError(
                f"more steps in a row than max_consecutive_skips={self._limit} had a non-finite gradient; the "
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

    def explained(self, reason: str) -> str:
        """The reason, and why it is not taken for the loss scale's fault, where it has been."""
        if not self._overflows:
            return reason
        times = "once" if self._overflows == 1 else f"{self._overflows} times in a row"
        return f"{reason}, and the loss scale, which has overflowed {times}, is not to blame"

    def watch(
        self,
        report: StepReport,
        stepped: Tensor,
        loss_scale: LossScale,
        verdict: Tensor | None = None,
        heard: Callable[[bool], None] | None = None,
    ) -> None:
        """Take note of ``stepped``, [] bool, which only the device knows yet, with what the loss scaler says of it.

        Or of ``verdict``, [3] int64: whether the step was made, all was finite, and anything was scaled, the last of
        which ``heard`` is told, once it has arrived. A step that is being captured has none: it is not made now.
        """
        report.overflowed = told = None  # the scaler changes its numbers now
        if is_capturing(stepped.device):
            return
        if loss_scale.found_inf is not None:
            unknown = torch.full_like(loss_scale.found_inf, math.nan)
            given = (loss_scale.found_inf, unknown if loss_scale.scale is None else loss_scale.scale)
            told = to_host(torch.stack([one.to(stepped.device, torch.float32) for one in given]))
        there = to_host(stepped if verdict is None else verdict)
        pending = _Pending(report, there, told, heard, Arrival(stepped.device))
        self._arriving.append(pending)
        if told is not None:
            report.overflowed = partial(self._is_overflow, pending)

    def _is_overflow(self, pending: _Pending) -> bool:
        """Whether the loss scale is to blame, as far as the steps before it are known; waits for the device."""
        pending.arrival.wait()
        found_inf, scale = pending.scaler()
        return found_inf and self.expects_overflow(scale)

    def look(self) -> None:
        """Judge the verdicts that have arrived, without waiting for any."""
        if not self._arriving or is_capturing(self._arriving[0].report.stepped_tensor().device):
            return  # asking would break the capture
        while self._arriving and self._arriving[0].arrival.is_there():
            pending = self._arriving.pop(0)
            report, there = pending.report, pending.there
            stepped, *_, scaled = there.tolist() if there.dim() else (bool(there), None)
            if pending.heard is not None and scaled is not None:
                pending.heard(bool(scaled))
            is_overflow = not stepped and self._is_overflow(pending)
            # Said once and for all: later steps count otherwise.
            report.why, report.overflowed = SkipReason.LOSS_SCALE if is_overflow else None, None
            if stepped:
                self.made()
                continue
            report.forget_decisions()
            if is_overflow:
                self.overflowed()
            elif report.skip_reason is not SkipReason.POLICY:
                self.skipped(report.reason or "a gradient was not finite")


def _why_no_gradient(parameters: Sequence[Tensor], model: nn.Module | None) -> str:
    if not any(parameter.requires_grad for parameter in parameters):
        return "all of them are frozen (requires_grad=False)"
    own = set(map(id, parameters))
    if model is not None and any(p.grad is not None and id(p) not in own for p in model.parameters()):
        return (
            "the model's parameters are others by now (load_state_dict(assign=True) and some wrappers replace them); "
            "build the optimizer, and attach, after that"
        )
    return "backward() reaches none of them (were they replaced after the optimizer was built?)"
