"""What goes wrong on one rank only, and where other ranks must hear of it instead of waiting."""

import pytest
import torch
from torch import distributed

import gradkeel as gk
from gradkeel import policies as gp

from tests.distributed.test_agreement import WEIGHT, Window, outcome, quietly, sgd, sharded
from tests.distributed.test_windows import data, ddp, fsdp, hybrid, loss_sum, make_model


def replicas(rank):
    """HSDP, two replicas of two shards each: a loss that is too large on the last rank, then an error there."""
    model = hybrid(make_model(), rank, 4)
    guard = gk.attach(sgd(model.parameters()), gp.SkipStep(warmup=3, window=8), model=model)
    stepped = []
    for step in range(6):
        guard.optimizer.zero_grad()
        model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        guard.log(loss=1.0 + 0.01 * step + 1000.0 * (step == 5 and rank == 3))
        guard.optimizer.step()
        stepped.append(guard.report.stepped)
    loss = float(guard.report.scalars["loss"])
    guard.window = Window(is_bad=rank == 3)
    return stepped, loss, outcome(guard.optimizer.step)


def test_replicas_decide_together(ranks):
    for rank, (stepped, loss, (kind, _)) in enumerate(ranks(4, replicas)):
        assert stepped == [True] * 5 + [False]
        assert loss == pytest.approx(1.05 + 250.0)
        assert kind == ("WindowError" if rank == 3 else "RankError")


def bucketed(rank, bad):
    """DDP whose gradients lie in its buckets: the norms of steps of which rank 1 spoils some."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(3, 2).double(), gradient_as_bucket_view=True
    )
    guard = gk.attach(sgd(model.parameters()), None, model=model)
    norms = []
    for step in range(6):
        guard.optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = model(torch.full((2, 3), 1.0 + rank, dtype=torch.float64)).sum()
        (loss * (torch.nan if rank == 1 and step in bad else 1.0)).backward()
        quietly(guard.optimizer.step)
        norms.append(guard.report.norm if guard.report.stepped else None)
    return norms


def test_gradients_in_buckets_come_anew_after_a_skip(ranks):
    wanted = ranks(2, bucketed, ())[0]
    assert None not in wanted
    for norms in ranks(2, bucketed, (2, 3)):
        assert norms == [None if step in (2, 3) else norm for step, norm in enumerate(wanted)]


def several(rank, policy):
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    guard = gk.attach(sgd([("w", parameter)]), policy)
    guard.window = Window(is_bad=rank in (1, 3))
    parameter.grad = sharded(WEIGHT)
    first = outcome(guard.optimizer.step)
    guard.window = None
    guard.optimizer.step()
    return first, guard.report.norm, guard.step


# The first sums only, the second asks for the largest entries too.
@pytest.mark.parametrize("policy", [gk.ClipByGlobalNorm(1.0), gk.ClipByValue(1.0)])
def test_all_ranks_that_failed_are_named(ranks, policy):
    answers = ranks(4, several, policy)
    for rank, ((kind, words), norm, steps) in enumerate(answers):
        assert kind == ("WindowError" if rank in (1, 3) else "RankError")
        assert rank in (1, 3) or words.startswith("rank 1, 3 raised an error before this step")
        assert (norm, steps) == (pytest.approx(13.0), 1)


class Loader:
    """Four micro-batches, or an error in place of one of them."""

    def __init__(self, rank, raises_at):
        self.items, self.raises_at = data([2, 3, 4, 5], seed=rank), raises_at

    def __iter__(self):
        for i, item in enumerate(self.items):
            if i == self.raises_at:
                raise OSError("a broken file")
            yield item


class LoaderWithLength(Loader):
    def __len__(self):
        return 4


class LoaderWithoutLength(Loader):
    def __len__(self):
        if self.raises_at is not None:
            raise NotImplementedError("no length")
        return 4


def loading(rank, wrap, kind, raises_at):
    model = wrap(make_model(), rank, 2)
    optimizer = sgd(model.parameters())
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    accumulate = gk.Accumulator(guard, steps=2, model=model)

    def epoch(loader):
        for micro in accumulate(loader):
            with micro:
                micro.backward(loss_sum(model, micro.batch), weight=1)
            if micro.closes_window:
                optimizer.step()
                optimizer.zero_grad()

    first, steps = outcome(lambda: epoch(kind(rank, raises_at if rank == 1 else None))), guard.step
    accumulate.drop()
    return first, steps, outcome(lambda: epoch(kind(rank, None))), guard.step - steps


@pytest.mark.parametrize("kind", [Loader, LoaderWithLength])
@pytest.mark.parametrize("wrap", [ddp, fsdp])
@pytest.mark.parametrize("raises_at", [1, 2, 3])
def test_a_loader_that_raises_on_one_rank_stops_all(ranks, wrap, kind, raises_at):
    one, other = ranks(2, loading, wrap, kind, raises_at)
    assert one[0][0] == "RankError"
    assert other[0][0] == "WindowError"
    assert other[0][1].startswith("the loader raised OSError('a broken file'); call accumulate.drop()")
    assert one[1:] == other[1:] == (raises_at // 2, None, 2)  # the windows before it, and the next epoch's


@pytest.mark.parametrize(
    ("kind", "error"), [(Loader, "OSError"), (LoaderWithoutLength, "NotImplementedError")]
)
def test_a_loader_that_raises_at_once_stops_all(ranks, kind, error):
    one, other = ranks(2, loading, ddp, kind, 0)
    assert one[0][0] == "RankError"
    assert "loaders of the ranks [1] raised errors" in one[0][1]
    assert other[0][0] == error
    assert one[1:] == other[1:] == (0, None, 2)


class BrokenRecorder:
    def before_step(self, report):
        raise OSError("no space left")

    def record(self, report):
        pass

    def close(self):
        pass


def recording(rank):
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    guard = gk.attach(sgd([parameter]), None, record=BrokenRecorder() if rank == 1 else None)
    parameter.grad = sharded(WEIGHT)
    with pytest.warns(gk.errors.RecordWarning) if rank == 1 else torch.enable_grad():
        guard.optimizer.step()
    return parameter.detach().full_tensor().tolist(), guard.step


def test_a_recorder_that_raises_on_one_rank_keeps_none_from_stepping(ranks):
    assert ranks(2, recording) == [([[0.0, 0.0], [0.0, 0.0]], 1)] * 2


# ---- what does not fit ---------------------------------------------------------------------------------------------


def refused(rank, kind):
    """Attach on two ranks, of which the second has something else than the first."""
    wholes = {"a": WEIGHT, "b": WEIGHT.reshape(4, 1) if kind == "shape" and rank == 1 else WEIGHT}
    names = ["b"] if kind == "fewer" and rank == 1 else ["a", "b"]
    parameters = {name: torch.nn.Parameter(sharded(wholes[name])) for name in wholes}
    groups = [{"params": [(name, parameters[name])]} for name in names]
    if kind == "groups" and rank == 1:
        groups = [{"params": [(name, parameters[name]) for name in names]}]
    if kind == "clip":
        groups[1]["clip"] = gk.ClipByNorm(1.0 + rank)
    exclude = "a" if kind == "exclude" and rank == 1 else None
    return outcome(lambda: bool(gk.attach(sgd(groups), gk.ClipByGlobalNorm(1.0), exclude=exclude)))


@pytest.mark.parametrize("kind", ["shape", "fewer", "groups", "clip", "exclude"])
def test_ranks_with_other_shards_are_refused_on_both(ranks, kind):
    for name, words in ranks(2, refused, kind):
        assert name == "RankError"
        assert words.startswith("rank 1 and rank 0 have other policies or other parameters")


def strange_module(rank):
    """On the second rank ``shard_over`` names a module that the optimizer does not know."""
    model, stranger = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    where = {(stranger if rank == 1 else model): distributed.group.WORLD}
    return outcome(lambda: bool(gk.attach(sgd(model.parameters()), None, shard_over=where)))


def test_a_declaration_that_fits_on_one_rank_only_is_an_error_on_both(ranks):
    one, other = ranks(2, strange_module)
    assert one[0] == "RankError"
    assert one[1].startswith("rank 1 could not set its guard up")
    assert other == (
        "SelectionError",
        "shard_over: Linear selects none of the optimizer's parameters",
    )


def no_dimension(rank, dim):
    parameter = torch.nn.Parameter(WEIGHT.clone())
    where = {"w": (distributed.group.WORLD, dim)}
    return outcome(lambda: bool(gk.attach(sgd([("w", parameter)]), None, shard_over=where)))


@pytest.mark.parametrize("dim", [-1, True, 0.0])
def test_a_dimension_is_a_whole_number_from_0(ranks, dim):
    for kind, words in ranks(2, no_dimension, dim):
        assert kind == "ValueError"
        assert words == f"shard_over={{'w': (group, {dim!r})}}: the dimension must be an int, at least 0"


def no_group(rank):
    parameter = torch.nn.Parameter(WEIGHT.clone())
    return outcome(lambda: gk.attach(sgd([parameter]), None, process_group="world"))


def test_what_is_no_group_is_refused(ranks):
    for kind, words in ranks(2, no_group):
        assert (kind, words) == (
            "TypeError",
            "process_group must be a ProcessGroup or a DeviceMesh, not str",
        )
    parameter = torch.nn.Parameter(WEIGHT.clone())
    with pytest.raises(gk.AttachError, match="process_group: there is no distributed job"):
        gk.attach(sgd([parameter]), None, process_group="world")


def regrouped(rank):
    """Both ranks change a group's policy between two steps, the second one to something that is none."""
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    optimizer = sgd([("w", parameter)])
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    norms = []
    for clip in ("norm:2.0", 7 if rank == 1 else "norm:3.0"):
        parameter.grad = sharded(WEIGHT)
        optimizer.step()
        norms.append(guard.report.norm)
        optimizer.param_groups[0]["clip"] = clip
    errors = outcome(optimizer.step), outcome(optimizer.step)
    return norms, guard.step, *errors


def test_an_error_in_reading_the_groups_again_is_told(ranks):
    one, other = ranks(2, regrouped)
    # After the first step the parameter has a policy of its own, and nothing is left for the main one.
    assert one[:2] == other[:2] == ([13.0, 0.0], 2)
    for again in (2, 3):  # whoever steps on all the same hears of it again
        assert one[again][0] == "RankError"
        assert one[again][1].startswith("rank 1 could not set its guard up")
        assert other[again][0] == "SelectionError"
