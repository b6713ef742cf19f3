"""The simulated device shows what a real one would punish only now and then; see `make test-simulated`."""

import os

import pytest
import torch

from gradkeel.kernels.addresses import Addresses
from gradkeel.kernels.arrival import Arrival, to_host
from syncs import without_sync

pytestmark = pytest.mark.skipif("SIMULATED_CUDA" not in os.environ, reason="make test-simulated")


def test_a_copy_to_the_host_is_garbage_until_it_has_arrived():
    there = to_host(torch.ones(3, device="cuda"))
    arrival = Arrival(torch.device("cuda"))
    assert there.is_pinned()
    assert 1.0 not in there.tolist()
    assert not arrival.is_there()
    assert 1.0 not in there.tolist()
    arrival.wait()
    assert there.tolist() == [1.0] * 3


def test_pinned_memory_must_not_be_written_to_while_it_is_being_sent():
    pinned = torch.zeros(3, pin_memory=True)
    sent = pinned.to("cuda", non_blocking=True)
    pinned.fill_(2.0)
    with pytest.raises(RuntimeError, match="while it was being sent"):
        torch.cuda.synchronize()
    assert sent.tolist() == [0.0] * 3


def test_addresses_wait_for_those_that_were_sent_from_the_same_memory():
    addresses = Addresses(1, torch.device("cuda"))
    for i in range(20):
        addresses.send(torch.tensor([i]))
    assert addresses.buffer.tolist() == [19]


@pytest.mark.parametrize(
    "call",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: torch.ones(2).to("cuda"),
        lambda tensor: bool((tensor > 0).all()),
    ],
)
def test_what_waits_raises_where_that_is_forbidden(call):
    tensor = torch.ones(2, device="cuda")
    with without_sync(), pytest.raises(RuntimeError, match="synchronizing"):
        call(tensor)
    call(tensor)


def test_what_is_captured_is_run_by_the_replay_alone():
    given, total = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = given * 2
        total += doubled.sum()
    assert total.item() == 0.0
    assert doubled.isnan().all()
    for times in (1, 2):
        given.fill_(times)
        graph.replay()
        assert doubled.tolist() == [2.0 * times] * 3
    assert total.item() == 18.0


def test_nothing_is_waited_for_in_a_capture():
    value = torch.ones((), device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="synchronizing"):
        value.item()
