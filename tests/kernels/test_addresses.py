"""Slots: the same tensors at whatever addresses, with the native library and without it."""

import pytest
import torch

from gradkeel.kernels import addresses, native
from gradkeel.kernels.addresses import Slots

CPU = torch.device("cpu")


@pytest.fixture(params=["native", "python"], autouse=True)
def way(request, monkeypatch):
    if request.param == "native" and native.kernels() is None:
        pytest.skip("no native library here")
    if request.param == "python":
        monkeypatch.setattr(native, "kernels", lambda: None)


def tensors():
    return [torch.ones(3, 4), None, torch.ones(5, dtype=torch.bfloat16), torch.zeros(0), torch.ones(())]


def where(held):
    return [0, *(0 if tensor is None else tensor.data_ptr() for tensor in held)]


def test_addresses_follow_the_tensors():
    held, moved = tensors(), tensors()
    slots = Slots(held, CPU)
    assert not slots.missed
    assert slots.buffer.tolist() == where(held)
    buffer = slots.buffer.data_ptr()
    assert slots.refresh(moved)
    assert slots.buffer.tolist() == where(moved)
    assert slots.buffer.data_ptr() == buffer
    assert slots.of([moved[4].data_ptr(), 0, moved[0].data_ptr()]) == (5, 0, 1)
    assert not slots.missed
    assert slots.of([held[0].data_ptr()]) == (0,)  # it was there, and is there no more
    assert slots.missed


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(4, 3),
        torch.ones(4, 3).t(),
        torch.ones(3, 4, dtype=torch.float16),
        torch.ones(13)[1:].view(3, 4),  # another alignment
        torch.ones(3, 4, device="meta"),
        None,
        torch.eye(3).to_sparse(),
    ],
)
def test_other_tensors_do_not_fit_and_nothing_is_sent(other):
    held = tensors()
    slots = Slots(held, CPU)
    assert not slots.refresh([other, *held[1:]])
    assert slots.buffer.tolist() == where(held)
    assert not slots.refresh(held[1:])
    # What did not fit may have left addresses behind that these have too.
    new = torch.ones(3, 4)
    assert not slots.refresh([new, None, None, held[3], held[4]])
    assert slots.refresh([new, *held[1:]])
    assert slots.buffer.tolist() == where([new, *held[1:]])


def test_tensors_that_share_memory_are_missed():
    shared = torch.ones(4)
    slots = Slots([shared, shared.view(2, 2)], CPU)
    slots.of([shared.data_ptr()])
    assert slots.missed


def test_subclasses_are_missed():
    class Own(torch.Tensor):
        """Holds its entries who knows where."""

    assert Slots([torch.ones(2).as_subclass(Own)], CPU).missed


def test_they_are_active_where_they_were_made_so():
    slots = Slots(tensors(), CPU)
    with slots.active():
        assert addresses.active_slots() is slots
        with addresses.without_slots():
            assert addresses.active_slots() is None
        assert addresses.active_slots() is slots
    assert addresses.active_slots() is None
