"""CUDA tensors that need no GPU: shapes, dtypes and devices are true, numbers are not there."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradkeel import norms


class Event:
    """In place of torch's, which needs a device."""

    def __init__(self, device):
        assert device == "cuda"

    def record(self, stream):
        """Nothing runs that it could wait for."""

    def query(self):
        """It never happens, so that nobody reads a number that there is not."""
        return False


@contextlib.contextmanager
def fake_mode():
    """One mode for all tests, for constants are kept; they must not be met by others."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    norms.made.cache_clear()
    yield mode
    norms.made.cache_clear()


def inverted(tensor):
    """A builtin function would not be called as a method."""
    return torch.bitwise_not(tensor)


def without_device(monkeypatch):
    """Put in place what torch would ask the device for."""
    if torch.version.cuda is not None:
        pytest.skip("a build of torch for CUDA asks for the driver behind our back; one for the CPU does not")
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    # torch's own asks for the device's context
    monkeypatch.setattr(torch.Tensor, "__invert__", inverted)
