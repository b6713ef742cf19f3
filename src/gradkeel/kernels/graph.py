"""Work on one CUDA device that is launched once, captured once, and from then on replayed by one call of the host's.

The same tensors come at other addresses in each step; kernels find them through `Slots`, so that a graph never has to
be captured again. What is asked of a body: that it reads and writes these tensors by kernels that know slots, gets what
else changes from step to step in buffers, and leaves what comes of it in tensors. Whether that holds is found out in a
rehearsal, which is an ordinary run.
"""

import gc
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gradkeel.errors import GradkeelWarning
from gradkeel.kernels import triton_host
from gradkeel.kernels.addresses import Slots
from gradkeel.kernels.arrival import is_capturing

VARIABLE = "GRADKEEL_GRAPHS"
"""Environment variable: ``off`` launches every operation."""

T = TypeVar("T")

_KEPT = 4
_ATTEMPTS = 2
_TRIED = 16
"""Lists of tensors that are given a graph in the life of one `Graphs`: who has more has another in each step."""


class UnfitError(Exception):
    """Raised by a body that cannot be captured, as is known beforehand: it is launched, and nobody warned."""


class Graph(Generic[T]):
    """One capture of a body.

    Attributes:
        result: what the body returned; its tensors are written anew by each replay.
    """

    def __init__(self, body: Callable[[], T], device: torch.device, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        # Not torch.cuda.graph, which collects garbage, empties the cache and waits for the device. Garbage that is
        # collected meanwhile may be another graph, whose end would break the capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(side):
                self._graph.capture_begin(pool=pool, capture_error_mode="relaxed")
                try:
                    self.result = body()
                finally:
                    self._graph.capture_end()
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream(device).wait_stream(side)

    def replay(self) -> T:
        """Launch it on the current stream; does not sync the host."""
        self._graph.replay()
        return self.result


class Entry(Generic[T]):
    """One list of tensors, what was captured for them, and how often that has failed."""

    def __init__(self, key: Hashable, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        self.key = key
        self.slots = Slots(tensors, device)
        self.captured: T | None = None
        self.is_rehearsed = False  # only then it may be captured
        self.failures = 0


class Graphs(Generic[T]):
    """What was captured for the lists of tensors that were seen last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._entries: list[Entry[T]] = []
        self._tried = 0

    def of(self, key: Hashable, tensors: Sequence[Tensor | None]) -> Entry[T] | None:
        """The entry of these tensors, their addresses sent; None where they are to be launched.

        ``key`` is what else a graph depends on.
        """
        if is_capturing(self.device):
            return None  # in somebody else's graph
        # Addresses on their way are waited for on one stream alone.
        key = key, torch.cuda.current_stream(self.device).cuda_stream
        for entry in self._entries:
            if entry.key == key and entry.slots.refresh(tensors):
                if entry is not self._entries[0]:
                    self._entries.remove(entry)
                    self._entries.insert(0, entry)
                return None if entry.slots.missed else entry
        if self._tried >= _TRIED:
            return None
        self._tried += 1
        entry = Entry[T](key, tensors, self.device)
        self._entries = [entry, *self._entries[: _KEPT - 1]]
        return None if entry.slots.missed else entry

    def capture(self, entry: Entry[T], bodies: Callable[[Callable[..., Graph[Any]]], T]) -> bool:
        """Capture what belongs to a rehearsed entry; whether that was possible. Else it is launched for ever.

        ``bodies`` makes what is kept; what it is given captures one body and returns its `Graph`.
        """
        if entry.failures:
            torch.cuda.empty_cache()  # it may have wanted memory, and is given none that torch keeps for others
        # Shared by these graphs alone: it goes with the last of them, and cannot be captured into again.
        pool = torch.cuda.graph_pool_handle()
        try:
            with entry.slots.active():
                entry.captured = bodies(lambda body: Graph(body, self.device, pool))
        except UnfitError:
            entry.slots.missed = True
        except Exception as error:  # noqa: BLE001  # whatever a body or a driver raises: training goes on
            entry.failures += 1
            if entry.failures < _ATTEMPTS:  # what CUDA loads at its first use may have been in the way
                return False
            entry.slots.missed = True
            warnings.warn(
                f"the step cannot be captured in a CUDA graph, and its operations are launched one by one: "
                f"{type(error).__name__}: {error}",
                GradkeelWarning,
                stacklevel=2,
            )
        return not entry.slots.missed


def can_capture(device: torch.device) -> bool:
    """Whether bodies can be captured on a device: CUDA, with kernels that know slots."""
    if device.type != "cuda" or os.environ.get(VARIABLE, "").lower() in {"off", "0", "no", "false"}:
        return False
    kernels = triton_host.kernels(device)
    return kernels is not None and kernels.fault is None


def tell_autograd(gradients: Sequence[Tensor | None], *, all_of_them: bool = False) -> None:
    """Count a replay's writes up in the gradients' versions: of those that autograd may have saved, or of all.

    To count up all would take the host longer than the rest of a replay.
    """
    written = [own for own in gradients if own is not None and (all_of_them or own.requires_grad)]
    if written:
        torch.autograd.graph.increment_version(written)
