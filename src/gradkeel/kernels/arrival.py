"""Numbers on their way from an accelerator of any kind to the host, and streams: their order, and captures."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Elsewhere a copy to the host is waited for: it is not known to be right without.
_ASYNCHRONOUS = {"cuda", "xpu"}


class Arrival:
    """Tells when the copies to the host that were begun before it on the device's current stream are there."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if is_asynchronous(device):
            self._event = torch.Event(device.type)
            self._event.record(current_stream(device))

    def is_there(self) -> bool:
        """Whether they are; does not wait. Not to be asked while the stream is being captured."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Wait until they are."""
        if self._event is not None:
            self._event.synchronize()


def is_asynchronous(device: torch.device) -> bool:
    """Whether copies from this device to the host need not be waited for."""
    return device.type in _ASYNCHRONOUS


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, in pinned memory where torch pins it; to be read when an `Arrival` says so."""
    return tensor.to("cpu", non_blocking=is_asynchronous(tensor.device))


def current_stream(device: torch.device) -> Any:
    """The device's current stream; None where its work is done in order in any case."""
    return torch.accelerator.current_stream(device) if is_asynchronous(device) else None


@contextmanager
def in_order_with(stream: Any, device: torch.device) -> Iterator[None]:
    """What is launched inside, on whatever stream, comes after what this one has, and before what it will have."""
    own = current_stream(device)
    if own != stream:
        own.wait_stream(stream)
    try:
        yield
    finally:
        if own != stream:
            stream.wait_stream(own)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device's current stream goes into a graph, and is not run now."""
    module: Any = getattr(torch, device.type, None)
    ask = getattr(module, "is_current_stream_capturing", None)
    return ask is not None and module.is_initialized() and bool(ask())
