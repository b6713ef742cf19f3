"""Work on several streams is put in order where it has to be."""

import pytest

from gradkeel.kernels import arrival


class Stream:
    """Notes whom it waits for."""

    def __init__(self, name):
        self.name, self.waits = name, []

    def wait_stream(self, other):
        self.waits.append(other.name)


@pytest.mark.parametrize("is_same", [True, False])
def test_in_order_with_another_stream(is_same, monkeypatch):
    """It waits for what came before, and what comes after waits for it."""
    stream = Stream("the steps'")
    own = stream if is_same else Stream("this one")
    monkeypatch.setattr(arrival, "current_stream", lambda device: own)
    with arrival.in_order_with(stream, None):
        assert own.waits == ([] if is_same else ["the steps'"])
        assert is_same or stream.waits == []
    assert stream.waits == ([] if is_same else ["this one"])
