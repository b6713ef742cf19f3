"""One rank writes what all ranks have measured, and a checkpoint fits any number of ranks."""

import contextlib
import io
import math

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import gradkeel as gk
from gradkeel import policies as gp
from gradkeel.record import Reader

from tests.distributed.test_windows import data, ddp, fsdp, hybrid, loss_sum, make_model, tensor_parallel


def recorded(rank, path, wrap):
    model = wrap(make_model(), rank, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.5), model=model, record=path)
    inputs = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    reports = []
    for step in range(5):
        optimizer.zero_grad()
        (model(inputs * (step + 1)).square().sum() * (math.nan if step == 3 else 1.0)).backward()
        with pytest.warns(gk.SkippedStepWarning) if step == 3 else torch.enable_grad():
            optimizer.step()
        reports.append((guard.report.norm, guard.report.reason))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        guard.summary()
    guard.detach()
    return reports, printed.getvalue()


@pytest.mark.parametrize("wrap", [fsdp, ddp])
def test_one_rank_writes_whole_norms(ranks, tmp_path, wrap):
    path = tmp_path / "run.keel"
    (one, summary), (other, nothing) = ranks(2, recorded, path, wrap)
    assert "5 steps" in summary
    assert nothing == "rank 1: rank 0 has the summary\n"
    assert [norm for norm, _ in one[:3]] == [norm for norm, _ in other[:3]]
    run = Reader(path)
    assert run.totals().tolist() == pytest.approx([norm for norm, _ in one], nan_ok=True)
    assert run.norms().shape == (5, 4)
    assert [step for step, _ in run.skips()] == [4]
    assert run.skips()[0][1] == one[3][1] == other[3][1]
    assert ("on rank 0" in one[3][1]) == (wrap is fsdp)


def staged(rank, path, per_rank):
    parameter = nn.Parameter(torch.ones(2 + rank))
    where = {"*": distributed.group.WORLD}
    record = gk.Recorder(path, per_rank=per_rank)
    guard = gk.attach(
        torch.optim.SGD([(f"stage{rank}.w", parameter)], lr=0.1), None, shard_over=where, record=record
    )
    parameter.grad = torch.full((2 + rank,), 3.0)
    guard.optimizer.step()
    guard.detach()


@pytest.mark.parametrize("per_rank", [False, True])
def test_a_record_has_every_stages_parameters(ranks, tmp_path, per_rank):
    path = tmp_path / "run.keel"
    ranks(2, staged, path, per_rank)
    run = Reader(path)
    assert run.names == ("stage0.w", "stage1.w")
    assert run.norms().tolist() == [[pytest.approx(3 * math.sqrt(2)), pytest.approx(3 * math.sqrt(3))]]
    _, weights, updates = run.weight_samples()
    sizes = [[math.sqrt(2), math.sqrt(3)]] if per_rank else []
    assert weights.tolist() == [pytest.approx(row) for row in sizes]
    assert updates.tolist() == [pytest.approx([0.3 * norm for norm in row]) for row in sizes]


def recorded_by_each(rank, path, count, wrap, steps):
    """Trains, each rank with a file of its own; one process where ``count`` is 1."""
    model = make_model() if count == 1 else wrap(make_model(), rank, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    guard = gk.attach(
        optimizer, gk.ClipByGlobalNorm(0.5), model=model, record=gk.Recorder(path, per_rank=True)
    )
    inputs = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    for step in steps:
        optimizer.zero_grad()
        model(inputs * (step + 1)).square().sum().backward()
        guard.log(rank=rank)
        guard.optimizer.step()
    guard.detach()


def samples_of(path):
    with Reader(path) as run:
        return run.names, *run.weight_samples()


@pytest.mark.parametrize(
    ("count", "wrap"), [(2, fsdp), (2, ddp), (4, hybrid), (4, tensor_parallel), (4, fsdp)]
)
def test_files_of_all_ranks_are_read_together(ranks, tmp_path, count, wrap):
    alone, path = tmp_path / "alone.keel", tmp_path / "run.keel"
    ranks(1, recorded_by_each, alone, 1, None, range(3))
    ranks(count, recorded_by_each, path, count, wrap, range(3))
    (names, steps, weights, updates), (own_names, *own) = samples_of(alone), samples_of(path)
    assert [name.removeprefix("module.") for name in own_names] == list(names)
    assert own[0].tolist() == steps.tolist() == [1, 2, 3]
    # The same float64 sums in another order.
    assert torch.allclose(own[1], weights, rtol=1e-10, atol=0)
    assert torch.allclose(own[2], updates, rtol=1e-10, atol=0)
    with Reader(path) as run:
        assert run.by_rank("scalar:rank").tolist() == [[*map(float, range(count))]] * 3
        assert run.by_rank("time", start=2).shape == (2, count)
    for rank in range(count):  # each is a record by itself
        with Reader(path if rank == 0 else tmp_path / f"run.rank{rank}.keel") as run:
            assert (len(run), run.store.rank) == (3, rank)


def test_a_lost_file_leaves_the_rest_readable(ranks, tmp_path):
    path = tmp_path / "run.keel"
    ranks(2, recorded_by_each, path, 2, fsdp, range(3))
    (tmp_path / "run.rank1.keel").unlink()
    with Reader(path) as run:
        assert [len(part) for part in run.weight_samples()] == [0, 0, 0]  # half of the weights is unknown
        assert run.by_rank("scalar:rank").tolist() == [[0.0]] * 3
        assert len(run.totals()) == 3


def test_samples_of_other_pieces_are_not_mixed(ranks, tmp_path):
    """From four ranks to two: what is left of the first run are halves of its weights."""
    path = tmp_path / "run.keel"
    ranks(4, recorded_by_each, path, 4, fsdp, range(3))
    ranks(2, continued, path, 3)
    steps = samples_of(path)[1]
    assert steps.tolist() == [4, 5]


def continued(rank, path, before):
    model = fully_shard(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    guard = gk.attach(optimizer, None, model=model, record=gk.Recorder(path, per_rank=True))
    guard._step = before
    for _ in range(2):
        model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        optimizer.step()
    guard.detach()


POLICY = gp.Chain(gp.AutoClip(0.5, window=4, warmup=2, scope="unit"), gp.ZClip(warmup=2))


class Run:
    """A sharded model in training, which can be saved and taken up."""

    def __init__(self):
        self.model = make_model()
        if distributed.get_world_size() > 1:
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.guard = gk.attach(self.optimizer, POLICY, model=self.model)
        # Ranks draw the same data: FSDP2's mean over ranks is then the gradient of one of them.
        self.generator = torch.Generator().manual_seed(9)

    def steps(self, count):
        told = []
        for _ in range(count):
            batch = [torch.randn(4, size, generator=self.generator, dtype=torch.float64) for size in (3, 2)]
            self.optimizer.zero_grad()
            loss_sum(self.model, batch).backward()
            self.optimizer.step()
            told.append((self.guard.report.norm, self.guard.report.coefficient, self.guard.step))
        return told

    def parts(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "guard": self.guard}


def saved(rank, path, before, after):
    run = Run()
    run.steps(before)
    checkpoint.save(run.parts(), checkpoint_id=path)
    return run.steps(after)


def resumed(rank, path, before, after):
    run = Run()
    run.generator.manual_seed(9)
    for _ in range(before):
        for size in (3, 2):
            torch.randn(4, size, generator=run.generator, dtype=torch.float64)
    parts = run.parts()
    checkpoint.load(parts, checkpoint_id=path)
    set_state_dict(
        run.model, run.optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
    )
    return run.steps(after)


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 4), (4, 2), (2, 1), (1, 2)])
@pytest.mark.filterwarnings("ignore")
def test_resume_on_another_number_of_ranks(ranks, tmp_path, first, second):
    path = str(tmp_path / "checkpoint")
    wanted = ranks(first, saved, path, 5, 3)[0]
    for told in ranks(second, resumed, path, 5, 3):
        for mine, right in zip(told, wanted, strict=True):
            assert mine == pytest.approx(right, rel=1e-9)
            assert mine[1] < 1.0 or right[1] == 1.0
    assert [step for _, _, step in wanted] == [6, 7, 8]


def between_windows(rank, path, count, is_first):
    model = make_model() if count == 1 else fsdp(make_model(), rank, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    guard = gk.attach(optimizer, gp.ZClip(warmup=1), model=model)
    accumulate = gk.Accumulator(guard, steps=2, model=model)
    parts = {"guard": guard, "accumulate": accumulate}
    if not is_first:
        checkpoint.load(parts, checkpoint_id=path)
    for micro in accumulate(data([2, 3])):
        with micro:
            micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]))
    optimizer.step()
    if is_first:
        checkpoint.save(parts, checkpoint_id=path)
    return guard.step, guard.report.stepped


@pytest.mark.parametrize("second", [1, 2, 4])
@pytest.mark.filterwarnings("ignore")
def test_an_accumulator_is_taken_up_by_another_number_of_ranks(ranks, tmp_path, second):
    path = str(tmp_path / "checkpoint")
    assert ranks(2, between_windows, path, 2, True) == [(1, True)] * 2
    assert ranks(second, between_windows, path, second, False) == [(2, True)] * second
