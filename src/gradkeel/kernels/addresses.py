"""Where tensors lie, on the device: kernels read addresses from a buffer that never moves, so a graph may hold them."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradkeel.kernels import native
from gradkeel.kernels.arrival import Arrival

_RING = 4
_PLAIN = {Tensor, nn.Parameter, type(None)}


class Addresses:
    """So many addresses on a device, sent from pinned memory to ``buffer``, always the same; the host is not synced."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.buffer = torch.zeros(count, dtype=torch.int64, device=device)
        pinned = torch.zeros(
            _RING, count, dtype=torch.int64, pin_memory=device.type != "cpu", device="cpu"
        ).unbind()
        self._ring: list[tuple[Tensor, Arrival | None]] = [(one, None) for one in pinned]

    def send(self, found: Tensor) -> None:
        """Send [count] int64 addresses of the host's, on the current stream."""
        pinned, arrival = self._ring.pop(0)
        if arrival is not None:
            arrival.wait()  # of several sendings ago: it has long happened
        pinned.copy_(found)
        self.buffer.copy_(pinned, non_blocking=True)
        self._ring.append((pinned, Arrival(self.buffer.device)))


class Slots:
    """The same k tensors or None, step after step, at whatever addresses: what a graph reads that is captured once.

    Attributes:
        count: how many there are, and one more: slot 0 is that of no tensor.
        missed: whether anything was wanted of a tensor that has no slot, which a replay would look for in vain.
        layouts: what kernels keep of them.
    """

    def __init__(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        self.count = 1 + len(tensors)
        self._found = torch.zeros(self.count, dtype=torch.int64, device="cpu")
        self._addresses = Addresses(self.count, device)
        self._description = _described(tensors, self._found[1:])
        self.missed = self._description is None or any(t is not None and t.device != device for t in tensors)
        self.layouts: dict[object, Any] = {}
        self._addresses.send(self._found)
        self._is_sent = True

    @property
    def buffer(self) -> Tensor:
        """[count] int64 their addresses, on the device; 0 for a tensor that is not there."""
        return self._addresses.buffer

    def refresh(self, tensors: Sequence[Tensor | None]) -> bool:
        """Send where these tensors lie, if they moved; False where they are not what they were: dtype, shape, place."""
        moved = _moved(self._description, tensors, self._found[1:])
        if moved is None or (moved and self._share_memory()):
            self._is_sent = False  # some of the addresses may be these tensors' all the same
            return False
        if moved or not self._is_sent:
            self._addresses.send(self._found)
            self._is_sent = True
        return True

    def of(self, addresses: Sequence[int]) -> tuple[int, ...]:
        """The slots of tensors at these addresses now; 0, and `missed`, where none is known."""
        slots = {address: slot for slot, address in enumerate(self._found.tolist()) if address}
        # Two that share memory cannot be told apart by it.
        self.missed |= self._share_memory() or not {0, *slots}.issuperset(addresses)
        return tuple(slots.get(address, 0) for address in addresses)

    def _share_memory(self) -> bool:
        here = [address for address in self._found.tolist() if address]
        return len(set(here)) < len(here)

    def active(self) -> AbstractContextManager[None]:
        """Meanwhile kernels read addresses from here, in this thread."""
        return _with_slots(self)


_ACTIVE = threading.local()


@contextmanager
def _with_slots(slots: Slots | None) -> Iterator[None]:
    before = active_slots()
    _ACTIVE.slots = slots
    try:
        yield
    finally:
        _ACTIVE.slots = before


def without_slots() -> AbstractContextManager[None]:
    """Meanwhile kernels read addresses of tensors that have no slots."""
    return _with_slots(None)


def active_slots() -> Slots | None:
    """Those in force in this thread."""
    return getattr(_ACTIVE, "slots", None)


def miss() -> None:
    """Say that something is done now without slots, at addresses that a replay would not know of."""
    slots = active_slots()
    if slots is not None:
        slots.missed = True


def _described(tensors: Sequence[Tensor | None], addresses: Tensor) -> Any:
    if not set(map(type, tensors)) <= _PLAIN:
        return None
    kernels = native.kernels()
    if kernels is not None:
        return kernels.described(list(tensors), addresses)
    words = _in_words(tensors)
    if words is not None:
        addresses.copy_(torch.tensor(_addresses(tensors), dtype=torch.int64, device="cpu"))
    return words


def _moved(description: Any, tensors: Sequence[Tensor | None], addresses: Tensor) -> bool | None:
    if not set(map(type, tensors)) <= _PLAIN:
        return None
    kernels = native.kernels()
    if kernels is not None:
        return kernels.locate(description, list(tensors), addresses)
    if _in_words(tensors) != description:
        return None
    found = torch.tensor(_addresses(tensors), dtype=torch.int64, device="cpu")
    moved = not torch.equal(found, addresses)
    addresses.copy_(found)
    return moved


def _in_words(tensors: Sequence[Tensor | None]) -> list[object] | None:
    if any(tensor is not None and tensor.layout != torch.strided for tensor in tensors):
        return None
    return [
        None if t is None else (t.dtype, t.device, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors
    ]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
