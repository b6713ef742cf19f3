"""Accumulation over data-parallel ranks against one process that sees every window as one batch."""

import functools
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import gradkeel as gk

from tests.distributed.test_agreement import outcome

BOUND = 0.05  # clips each of these windows


def make_model(dtype=torch.float64):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def data(counts, seed=0):
    """One micro-batch of so many items for each count; inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(count, 3), draw(count, 2)) for count in counts]


def loss_sum(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().sum()


def ddp(model, rank, count):
    return DistributedDataParallel(model)


def fsdp(model, rank, count):
    return fully_shard(model)


def fsdp_by_layer(model, rank, count):
    """Only the layers are sharded, not the root."""
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return model


def fsdp_that_sums(model, rank, count):
    fully_shard(model).set_gradient_divide_factor(1.0)
    return model


def hybrid(model, rank, count):
    return fully_shard(
        model, mesh=init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("replicate", "shard"))
    )


def tensor_parallel(model, rank, count):
    """Pairs of ranks hold a layer's columns together and see the same data."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # About torch's own tensor parallelism, whose output is a view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def train(rank, count, wrap, counts, steps, has_length, replicas=1):
    """Train on this rank's micro-batches; the weights and what the guard tells of each window."""
    wrapped = wrap(make_model(), rank, count)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0, foreach=False)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), model=wrapped)
    accumulate = gk.Accumulator(guard, steps=steps, model=wrapped)
    own = rank // replicas
    batches = data(counts[own], seed=own)
    windows, fillers = [], 0
    for micro in accumulate(batches if has_length else iter(batches)):
        with micro:
            micro.backward(loss_sum(wrapped, micro.batch), weight=len(micro.batch[0]))
        fillers += micro.is_filler
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
            loss = None if accumulate.loss is None else float(accumulate.loss)
            windows.append((guard.report.norm, guard.report.stepped, loss))
    weights = [whole(p).detach().flatten().tolist() for p in wrapped.parameters()]
    return weights, windows, fillers


def oracle(counts, steps):
    """The same in one process: each window of all ranks is one batch."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    batches = [data(own, seed=rank) for rank, own in enumerate(counts)]
    windows = []
    for start in range(0, max(map(len, counts)), steps):
        items = [batch for own in batches for batch in own[start : start + steps]]
        weight = sum(len(inputs) for inputs, _ in items)
        if weight == 0:
            windows.append((0.0, False, None))
            continue
        loss = sum(loss_sum(model, batch) for batch in items) / weight
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        for parameter in model.parameters():
            parameter.grad *= min(1.0, BOUND / norm.item())
        optimizer.step()
        windows.append((norm.item(), True, loss.item()))
    return [p.detach().flatten().tolist() for p in model.parameters()], windows


def check(answers, counts, steps):
    wanted, told = oracle(counts, steps)
    for weights, windows, _ in answers:
        # The same float64 sums in another order, over a few steps.
        for mine, right in zip(weights, wanted, strict=True):
            assert mine == pytest.approx(right, rel=1e-9, abs=1e-12)
        for (norm, stepped, loss), (right_norm, must_step, right_loss) in zip(windows, told, strict=True):
            assert stepped == must_step
            if must_step:
                assert norm == pytest.approx(right_norm, rel=1e-9)
                assert loss == pytest.approx(right_loss, rel=1e-9)
    assert all(answer[1] == answers[0][1] for answer in answers)


WRAPS = [ddp, fsdp, fsdp_by_layer, fsdp_that_sums, hybrid]
UNEVEN = ([10, 1, 4, 3, 2], [3, 50, 7, 1, 6])


@pytest.mark.parametrize("wrap", WRAPS)
def test_ddp_token_weights(ranks, wrap):
    counts = ([10], [90])
    check(ranks(2, train, 2, wrap, counts, 1, True), counts, 1)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("steps", [2, 3])
def test_partition_invariance(ranks, wrap, steps):
    check(ranks(2, train, 2, wrap, UNEVEN, steps, True), UNEVEN, steps)


@pytest.mark.parametrize("wrap", [ddp, fsdp, hybrid])
def test_four_ranks(ranks, wrap):
    counts = ([3, 50], [1, 2], [7, 7], [20, 4])
    check(ranks(4, train, 4, wrap, counts, 2, True), counts, 2)


def test_weights_are_added_over_data_parallel_ranks_only(ranks):
    counts = ([3, 50], [1, 2])
    check(ranks(4, train, 4, tensor_parallel, counts, 2, True, 2), counts, 2)


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize("wrap", WRAPS)
def test_ranks_with_less_data_go_on(ranks, wrap, has_length):
    counts = ([3, 1], [5, 2, 4, 1, 6, 2])
    answers = ranks(2, train, 2, wrap, counts, 4, has_length)
    check(answers, counts, 4)
    # Without lengths the last window is filled up on every rank.
    assert [fillers for _, _, fillers in answers] == ([4, 0] if has_length else [6, 2])


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    "counts",
    [([0, 5], [4, 3]), ([4, 0], [2, 1]), ([0, 0], [2, 3]), ([0, 0, 3, 1], [0, 0, 2, 2])],
    ids=["first", "last", "rank", "window"],
)
def test_zero_weight(ranks, wrap, counts):
    check(ranks(2, train, 2, wrap, counts, 2, True), counts, 2)


def no_data(rank, counts, has_length):
    model = DistributedDataParallel(make_model())
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=1.0), None)
    batches = data(counts) if rank == 0 else []
    accumulate = gk.Accumulator(guard, steps=2, model=model)
    return outcome(lambda: next(accumulate(batches if has_length else iter(batches))))


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize("counts", [[3], [3, 2]], ids=["one batch", "two batches"])
def test_a_rank_without_any_data_is_an_error_on_all(ranks, counts, has_length):
    for kind, words in ranks(2, no_data, counts, has_length):
        assert kind == "WindowError"
        assert "ranks [1] have no batch at all" in words


def masked_means(rank, wrap):
    """Cross entropy's mean over no tokens is NaN; its rank and micro-batch count as nothing."""
    torch.manual_seed(5)
    model = wrap(nn.Linear(3, 4).double(), rank, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    guard = gk.attach(optimizer, None, model=model)
    accumulate = gk.Accumulator(guard, steps=2, model=model, reduction="mean")
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, -100, -100], [-100] * 5]) if rank == 0 else torch.full((2, 5), -100)
    for micro in accumulate(list(zip(inputs, labels, strict=True))):
        with micro:
            logits, wanted = model(micro.batch[0]), micro.batch[1]
            micro.backward(nn.functional.cross_entropy(logits, wanted), weight=int((wanted != -100).sum()))
    optimizer.step()
    return (
        [whole(p).detach().flatten().tolist() for p in model.parameters()],
        float(accumulate.loss),
        [inputs[0].tolist()],
    )


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_fully_masked_means(ranks, wrap):
    answers = ranks(2, masked_means, wrap)
    torch.manual_seed(5)
    model = nn.Linear(3, 4).double()
    inputs = torch.tensor(answers[0][2][0], dtype=torch.float64)
    loss = nn.functional.cross_entropy(model(inputs), torch.tensor([0, 1, 2, -100, -100]))
    loss.backward()
    for weights, told, _ in answers:
        assert told == pytest.approx(loss.item(), rel=1e-12)
        for mine, parameter in zip(weights, model.parameters(), strict=True):
            assert mine == pytest.approx((parameter - parameter.grad).flatten().tolist(), rel=1e-12)


def local_gradients(rank, steps):
    """How far each micro-batch's gradient is from this rank's own sum, before and at the window's end."""
    model = DistributedDataParallel(make_model())
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=1.0), None)
    accumulate = gk.Accumulator(guard, steps=steps, model=model)
    alone, weight = make_model(), next(model.module.parameters())
    distances = []
    for micro in accumulate(data([2, 3, 4], seed=rank)):
        with micro:
            micro.backward(loss_sum(model, micro.batch), weight=1)
        loss_sum(alone, micro.batch).backward()
        distances.append(float((weight.grad - next(alone.parameters()).grad).abs().max()))
    return distances


def test_no_sync_wraps_forward(ranks):
    for distances in ranks(2, local_gradients, 3):
        assert distances[:2] == [0.0, 0.0]
        assert distances[2] > 0.1


def wide_sums(rank):
    """Trap 14 over ranks: 1 + 256 x 0.003 = 1.768, on each of them."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model = DistributedDataParallel(model)
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=0.0), None)
    accumulate = gk.Accumulator(guard, steps=257, model=model, accumulate_dtype=torch.float32)
    entries = [1.0] + [0.003] * 256
    for micro in accumulate(entries):
        with micro:
            micro.backward(model(torch.full((1, 1), micro.batch, dtype=torch.bfloat16)).sum(), weight=1 / 257)
    guard.optimizer.step()
    return guard.report.norm


def test_low_precision_accumulation(ranks):
    # Each rank's sum is rounded to bfloat16 before the exchange, and once more by it: 3 units in the last place.
    assert ranks(2, wide_sums) == [pytest.approx(1.768 / 1.0, rel=3 * 2**-8)] * 2


def mixed_precision(rank):
    model = make_model(torch.float32)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    guard = gk.attach(torch.optim.AdamW(model.parameters(), lr=0.0), None)
    accumulate = gk.Accumulator(guard, steps=64, model=model)
    for micro in accumulate([torch.ones(1, 3)] * 64):
        with micro:
            micro.backward(model(micro.batch).sum(), weight=1)
    guard.optimizer.step()
    alone = make_model(torch.float32)
    alone(torch.ones(1, 3)).sum().backward()
    return guard.report.norm, float(torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()]))


def test_fsdp_sums_in_its_reduce_dtype(ranks):
    for norm, wanted in ranks(2, mixed_precision):
        assert norm == pytest.approx(wanted, rel=1e-2)  # bfloat16 forward and backward, but no stalled sum


def one_message(rank, wrap):
    model = wrap(make_model(), rank, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND))
    accumulate = gk.Accumulator(guard, steps=2, model=model)
    counts = []
    for micro in accumulate(data([2, 3, 4, 5], seed=rank)):
        with micro:
            micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]))
        if micro.closes_window:
            with CommDebugMode() as mode:
                optimizer.step()
            counts.append(mode.get_total_counts())
            optimizer.zero_grad()
    return counts


@pytest.mark.parametrize("wrap", WRAPS)
def test_norms_and_weights_share_one_collective(ranks, wrap):
    assert ranks(2, one_message, wrap) == [[1, 1]] * 2


class Shuffled:
    """Draws its order from the global generator whenever a pass begins, as a `DataLoader` does."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter([self.items[i] for i in torch.randperm(len(self.items))])

    def __len__(self):
        return len(self.items)


def drawn(rank):
    model = DistributedDataParallel(make_model())
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=1.0), None)
    accumulate = gk.Accumulator(guard, steps=4, model=model)
    torch.manual_seed(8)
    taken = []
    for micro in accumulate(Shuffled(list(range(16)))):
        taken.append(micro.batch)
        with micro:
            pass
        if micro.closes_window:
            accumulate.drop()
    torch.manual_seed(8)
    return taken, list(Shuffled(list(range(16))))


def test_a_loader_is_gone_through_once(ranks):
    for taken, plain in ranks(2, drawn):
        assert taken == plain


def saved_inside(rank, is_told):
    model = make_model() if is_told else DistributedDataParallel(make_model())
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=1.0), None)
    where = {"process_group": distributed.group.WORLD} if is_told else {"model": model}
    accumulate = gk.Accumulator(guard, steps=2, **where)
    before = accumulate.state_dict()["count"]
    for micro in accumulate(data([2, 3], seed=rank)):
        with micro:
            micro.backward(loss_sum(model, micro.batch), weight=1)
        if not micro.closes_window:
            words = outcome(accumulate.state_dict)
    if is_told:  # the exchange is the user's own
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
    guard.optimizer.step()
    return before, words, accumulate.state_dict()["count"]


@pytest.mark.parametrize("is_told", [False, True])
def test_resume_inside_a_window_is_refused(ranks, is_told):
    for before, (kind, words), after in ranks(2, saved_inside, is_told):
        assert (before, after) == (0, 0)
        assert kind == "CheckpointError"
        assert "take checkpoints after optimizer.step()" in words


def accumulated(model):
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=1.0, foreach=False), None)
    return outcome(lambda: gk.Accumulator(guard, steps=2, model=model))


def different_divisors(rank):
    model = make_model()
    fully_shard(model[0]).set_gradient_divide_factor(1.0)
    fully_shard(model[2])
    return accumulated(model)


def hidden_divisor(rank):
    """As set_reduce_scatter_divide_factor() of torch 2.6, which works under NCCL alone, leaves a group."""
    model = fully_shard(make_model())
    model._get_fsdp_state()._fsdp_param_group.reduce_scatter_reduce_op = distributed.ReduceOp.SUM
    return accumulated(model)


@pytest.mark.parametrize(
    ("divisors", "said"), [(different_divisors, "(1, 2)"), (hidden_divisor, "leave that call out")]
)
def test_parts_whose_divisors_differ_or_are_not_told_are_refused(ranks, divisors, said):
    for kind, words in ranks(2, divisors):
        assert kind == "ValueError"
        assert said in words
