"""What thousands of ranks cost one of them: torch's fake process group, in which this process is one rank of many."""

import gc
import sys
import tracemalloc

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import gradkeel as gk
from gradkeel import policies as gp

from tests.distributed.pool import clear_sharding_prop_cache

RANKS, PARAMETERS = 4096, 1000
# Loops that torch itself makes over ranks while it makes a group or a mesh are not ours: everything is made before.


@pytest.fixture
def job():
    """Makes this process one of so many ranks."""

    def make(ranks):
        distributed.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())
        return init_device_mesh("cpu", (ranks,))

    yield make
    distributed.destroy_process_group()
    clear_sharding_prop_cache()


def shards(mesh, count):
    """Parameters with gradients, as fully_shard leaves them: one row of each is here."""

    def shard():
        return DTensor.from_local(torch.ones(1, 4), mesh, [Shard(0)], run_check=False)

    parameters = [nn.Parameter(shard()) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = shard()
    return parameters


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0, foreach=False)


class Wire:
    """Counts collectives and the bytes that each of them gives to this rank."""

    def __init__(self, monkeypatch):
        self.sent = []
        for name in (
            "all_reduce",
            "all_gather_into_tensor",
            "all_gather_single",
            "all_gather_object",
            "broadcast",
        ):
            if hasattr(distributed, name):
                monkeypatch.setattr(distributed, name, self._counting(getattr(distributed, name)))

    def _counting(self, collective):
        def counted(tensor, *arguments, **options):
            self.sent.append(tensor.nbytes if isinstance(tensor, torch.Tensor) else sys.maxsize)
            return collective(tensor, *arguments, **options)

        return counted


def python_steps(act):
    """How many lines of Python ``act`` runs."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return lines


def test_attach_is_small(job, monkeypatch):
    optimizer = sgd(shards(job(RANKS), PARAMETERS))
    wire = Wire(monkeypatch)
    gc.collect()
    tracemalloc.start()
    try:
        gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert wire.sent == [8 * RANKS]  # a hash of each rank's


@pytest.mark.parametrize(
    ("policy", "sums", "maxima"),
    [
        (gk.ClipByGlobalNorm(1.0), [PARAMETERS + 32], []),
        (gp.Chain(gp.ZClip(), gk.ClipByNorm(1.0)), [PARAMETERS + 32], []),
        (gk.ClipByGlobalNorm(1.0, norm_type=float("inf")), [32], [PARAMETERS]),
        (gk.ClipByValue(1.0), [PARAMETERS + 32], [2 * PARAMETERS]),
    ],
    ids=["2-norm", "each", "inf-norm", "value"],
)
def test_a_step_sends_a_number_for_each_parameter(job, monkeypatch, policy, sums, maxima):
    guard = gk.attach(sgd(shards(job(RANKS), PARAMETERS)), policy)
    wire = Wire(monkeypatch)
    with CommDebugMode() as mode:
        guard.optimizer.step()
    assert mode.get_total_counts() == len(wire.sent) == len(sums) + len(maxima)
    for bytes_sent, numbers in zip(wire.sent, sums + maxima, strict=True):
        assert bytes_sent <= 8 * numbers


def test_functions_send_one_number(job, monkeypatch):
    parameters = shards(job(RANKS), PARAMETERS)
    wire = Wire(monkeypatch)
    gk.clip_grad_norm_(parameters, 1.0)
    assert wire.sent == [8]


def work(mesh, act):
    """How many lines of Python it takes to attach, to step and to clip by the function."""
    parameters = shards(mesh, 50)
    optimizer = sgd(parameters)
    if act == "attach":
        return python_steps(lambda: gk.attach(optimizer, gk.ClipByGlobalNorm(1.0)))
    if act == "step":
        guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
        optimizer.step()
        return python_steps(lambda: (guard._begin(), guard._evaluate(), guard._finish()))
    gk.clip_grad_norm_(parameters, 1.0)
    return python_steps(lambda: gk.clip_grad_norm_(parameters, 1.0))


@pytest.mark.parametrize("act", ["attach", "step", "function"])
def test_python_makes_no_loop_over_ranks_times_parameters(job, act):
    few = work(job(8), act)
    distributed.destroy_process_group()
    clear_sharding_prop_cache()
    many = work(job(RANKS), act)
    # Attach looks at each rank's hash once, in a few loops over ranks alone; nothing else knows how many there are,
    # but for torch 2.6's `DeviceMesh.get_group`, which compares all of a mesh's ranks, once for each mesh.
    loops = 10 if act == "attach" else 3 if torch.__version__ < (2, 8) else 0
    assert many - few < 10 + loops * RANKS
