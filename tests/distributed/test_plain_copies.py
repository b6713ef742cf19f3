"""Ranks whose parameters are plain copies, as DDP has them: nothing in the tensors makes them meet."""

import time
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import gradkeel as gk
from gradkeel import policies as gp

from tests.distributed.test_agreement import outcome, sgd

SECONDS = 8  # half of it is the group's timeout


def attached(rank, policies, options):
    model = DistributedDataParallel(nn.Linear(2, 2))
    return outcome(lambda: bool(gk.attach(sgd(model.parameters()), policies[rank], **options[rank])))


@pytest.mark.parametrize(
    ("policies", "options"),
    [
        ([gk.ClipByNorm(1.0), gk.ClipByNorm(2.0)], [{}, {}]),
        (["norm:1.0", None], [{}, {}]),
        ([gk.ClipByNorm(1.0)] * 2, [{}, {"exclude": "1"}]),
        ([gk.ClipByNorm(1.0)] * 2, [{}, {"nonfinite": "keep"}]),
    ],
    ids=["bound", "none", "exclude", "nonfinite"],
)
def test_plain_copies_under_different_policies_are_refused(ranks, policies, options):
    for kind, words in ranks(2, attached, policies, options):
        assert kind == "RankError"
        assert "rank 1 and rank 0 have other policies or other parameters" in words


def test_what_one_rank_cannot_read_is_an_error_on_all(ranks):
    """The spec is parsed before ranks compare anything: the others must hear of it all the same."""
    began = time.monotonic()
    one, other = ranks(2, attached, ["norm:1.0", "nrom:1.0"], [{}, {}])
    assert time.monotonic() - began < 15
    assert one[0] == "RankError"
    assert one[1].startswith("rank 1 could not set its guard up (PolicySpecError: ")
    assert other[0] == "PolicySpecError"


def after_rank_0(rank):
    """Wait for rank 0 to come here, for longer than any collective would."""
    store = distributed.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("rank 0 is done", "")
    store.wait(["rank 0 is done"], timedelta(seconds=SECONDS))


def one_alone(rank, kind):
    """Only rank 0 attaches, or makes an accumulator; what it hears, and after how long."""
    model = nn.Linear(2, 2)
    optimizer = sgd(model.parameters())
    guard = gk.attach(optimizer, None) if kind == "accumulator" else None
    began, answer = time.monotonic(), None
    if rank == 0 and kind == "attach":
        answer = outcome(lambda: gk.attach(optimizer, None))
    elif rank == 0:
        answer = outcome(lambda: gk.Accumulator(guard, 2, process_group=distributed.group.WORLD))
    seconds = time.monotonic() - began
    after_rank_0(rank)
    return answer, seconds


@pytest.mark.parametrize("kind", ["attach", "accumulator"])
def test_one_rank_alone_is_an_error_in_bounded_time(ranks, kind):
    ((name, words), seconds), _ = ranks(2, one_alone, kind, seconds=SECONDS)
    assert name == "RankError"
    assert words.startswith("rank 1 did not set its guard up within 4 s")
    assert "all of the ranks [0, 1]" in words
    assert seconds < SECONDS


def late(rank):
    """Rank 1 comes when rank 0 has given up: it must not believe that rank 0 is there."""
    answer = None
    if rank == 0:
        answer = outcome(lambda: gk.attach(sgd(nn.Linear(2, 2).parameters()), None))
    after_rank_0(rank)
    if rank == 1:
        answer = outcome(lambda: gk.attach(sgd(nn.Linear(2, 2).parameters()), None))
    return answer


def test_a_rank_that_comes_too_late_hears_of_it(ranks):
    for kind, words in ranks(2, late, seconds=SECONDS):
        assert (kind, words.startswith("rank 1 did not set")) == ("RankError", True)


def on_its_own(rank):
    """As in a sweep in which each rank trains a model of its own."""
    group = distributed.new_group([rank], use_local_synchronization=True)
    model = nn.Linear(2 + rank, 1)
    optimizer = sgd(model.parameters())
    guard = gk.attach(optimizer, gk.ClipByNorm(1.0 + rank), process_group=group)
    for _ in range(1 + rank):
        model(torch.ones(1, 2 + rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.ones(1, 2 + rank)).sum().backward()
    with CommDebugMode() as mode:
        optimizer.step()
    return guard.step, mode.get_total_counts()


def test_ranks_may_train_models_of_their_own(ranks):
    assert ranks(2, on_its_own) == [(2, 0), (3, 0)]


def rank_local_losses(rank, policy):
    """Gradients are alike, and only rank 1 has an outlier among its losses."""
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Linear(2, 2).double())
    optimizer = sgd(model.parameters())
    guard = gk.attach(optimizer, policy, model=model)
    stepped = []
    for step in range(6):
        optimizer.zero_grad()
        model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        guard.log(loss=1.0 + 0.01 * step + 1000.0 * (step == 5 and rank == 1))
        optimizer.step()
        stepped.append(guard.report.stepped)
    return stepped, float(guard.report.scalars["loss"]), model.module.weight.flatten().tolist()


SKIP = gp.SkipStep(warmup=3, window=8)


@pytest.mark.parametrize("policy", [SKIP, gp.Chain(SKIP, gk.ClipByGlobalNorm(1.0))], ids=["skip", "chain"])
def test_ranks_decide_together_where_losses_differ(ranks, policy):
    one, other = ranks(2, rank_local_losses, policy)
    assert one == other
    stepped, loss, _ = one
    assert stepped == [True] * 5 + [False]
    assert loss == pytest.approx(1.05 + 500.0)
