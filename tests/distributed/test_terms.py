"""Loss terms, failed backwards and communication hooks over ranks, against float64 in one process."""

import math

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import gradkeel as gk

from tests.accumulate.test_terms import Raises
from tests.distributed.test_agreement import outcome
from tests.distributed.test_windows import ddp, fsdp, fsdp_by_layer, hybrid, whole

BOUND = 0.05
WRAPS = [ddp, fsdp, fsdp_by_layer, hybrid]


def make_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(rank, counts):
    """Inputs of tokens and of sequences for each micro-batch."""
    generator = torch.Generator().manual_seed(rank)
    return [
        tuple(torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in both) for both in counts
    ]


def sums(model, batch):
    """The two terms of one forward: a sum over tokens and one over sequences."""
    count, out = len(batch[0]), model(torch.cat(batch))
    return out[:count, 0].square().sum(), (out[count:, 1] - 1.0).square().sum()


def train(rank, wrap, counts, steps, per, by_loader):
    model = wrap(make_model(), rank, len(counts))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), model=model)
    accumulate = gk.Accumulator(guard, steps, model=model, per=per)
    batches, windows = data(rank, counts[rank]), []
    micros = accumulate(batches) if by_loader else (accumulate.micro() for _ in batches)
    for micro, drawn in zip(micros, [*batches, *[None] * 9], strict=False):
        with micro:
            batch = micro.batch if by_loader else drawn
            token_sum, sequence_sum = sums(model, batch)
            if len(per) == 1:
                micro.backward(token_sum, weight=len(batch[0]), retain_graph=True)
                micro.backward(sequence_sum)
            else:
                micro.backward(token_sum, weight=len(batch[0]), per=per[0], retain_graph=True)
                micro.backward(sequence_sum, weight=len(batch[1]), per=per[1])
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
            windows.append((guard.report.norm, float(guard.report.scalars["loss"])))
    return [whole(p).detach().flatten().tolist() for p in model.parameters()], windows


def oracle(counts, steps, per):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    batches, windows = [data(rank, own) for rank, own in enumerate(counts)], []
    for start in range(0, max(map(len, counts)), steps):
        items = [batch for own in batches for batch in own[start : start + steps]]
        tokens, sequences = (sum(len(batch[i]) for batch in items) for i in (0, 1))
        both = [sums(model, batch) for batch in items]
        loss = sum(one for one, _ in both) / tokens
        loss = loss + sum(other for _, other in both) / (tokens if len(per) == 1 else sequences)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        for parameter in model.parameters():
            parameter.grad *= min(1.0, BOUND / norm.item())
        optimizer.step()
        windows.append((norm.item(), loss.item()))
    return [p.detach().flatten().tolist() for p in model.parameters()], windows


COUNTS = ([(9, 1), (1, 3), (4, 2), (2, 5)], [(3, 4), (5, 1), (7, 1), (8, 2)])
UNEVEN = ([(9, 1), (1, 3), (4, 2), (2, 5)], [(3, 4), (5, 1)])  # the second rank has fewer


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("per", [("item",), ("token", "sequence")], ids=["shared", "apart"])
@pytest.mark.parametrize(
    ("counts", "by_loader"),
    [(COUNTS, True), (COUNTS, False), (UNEVEN, True)],
    ids=["loader", "calls", "uneven"],
)
def test_terms_of_a_window_over_ranks(ranks, wrap, per, counts, by_loader):
    wanted, told = oracle(counts, 2, per)
    for weights, windows in ranks(2, train, wrap, counts, 2, per, by_loader):
        # The same float64 sums in another order.
        for mine, right in zip(weights, wanted, strict=True):
            assert mine == pytest.approx(right, rel=1e-9, abs=1e-12)
        for (norm, loss), (right_norm, right_loss) in zip(windows, told, strict=True):
            assert norm == pytest.approx(right_norm, rel=1e-9)
            assert loss == pytest.approx(right_loss, rel=1e-9)


# ---- backwards that raise ------------------------------------------------------------------------------------------


class Dot(nn.Module):
    """The inner product with a parameter of zeros: the batch is the gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, batch):
        return (self.weight * batch).sum()


def failing(rank, failing_ranks):
    """Three micro-batches of 2 items, whose second one finds no memory in backward."""
    model = DistributedDataParallel(Dot())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, None, model=model)
    accumulate = gk.Accumulator(guard, 3, model=model)
    own = torch.tensor([4.0 + 4.0 * rank, 8.0], dtype=torch.float64)
    for index, micro in enumerate(accumulate([own] * 3)):
        if index == 1 and rank in failing_ranks:
            with pytest.raises(torch.OutOfMemoryError), micro:
                micro.backward(Raises.apply(model(micro.batch)), weight=2)
            continue
        with micro:
            micro.backward(model(micro.batch), weight=2)
    optimizer.step()
    return guard.report.norm, [-entry for entry in model.module.weight.tolist()]


@pytest.mark.parametrize("failing_ranks", [(1,), (0, 1)])
def test_failed_micro_batch_is_not_counted(ranks, failing_ranks):
    """Micro-batches of [4, 8] and of [8, 8], two items each: all of the first ones, or two, and two of the second."""
    wanted = [3.0, 4.0] if 0 in failing_ranks else [2.8, 4.0]
    for norm, moved in ranks(2, failing, failing_ranks):
        assert moved == pytest.approx(wanted)
        assert norm == pytest.approx(math.hypot(*wanted))


def dropped(rank, wrap):
    """A window that is left after its first micro-batch leaves nothing to the next."""
    norms = []
    for is_dropped in (False, True):
        model = wrap(make_model(), rank, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
        guard = gk.attach(optimizer, None, model=model)
        accumulate = gk.Accumulator(guard, 2, model=model)
        batches = data(rank, [(2, 1), (3, 2), (4, 3)])
        if is_dropped:
            with next(accumulate(batches)) as micro:
                micro.backward(sums(model, micro.batch)[0] * 100.0, weight=2)
            accumulate.drop()
        for micro in accumulate(batches[1:]):
            with micro:
                micro.backward(sums(model, micro.batch)[0], weight=len(micro.batch[0]))
        optimizer.step()
        norms.append(guard.report.norm)
    return norms


@pytest.mark.parametrize("wrap", [ddp, fsdp, fsdp_by_layer])
def test_a_dropped_window_leaves_nothing_behind(ranks, wrap):
    for fresh, after_drop in ranks(2, dropped, wrap):
        assert after_drop == fresh


# ---- communication hooks -------------------------------------------------------------------------------------------


def summing_hook(group, bucket):
    work = distributed.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def averaging_hook(group, bucket):
    bucket.buffer().div_(distributed.get_world_size(group))
    return summing_hook(group, bucket)


def hooked(rank, hook, options, is_late):
    model = DistributedDataParallel(Dot())
    register = lambda: model.register_comm_hook(distributed.group.WORLD, hook)  # noqa: E731
    if not is_late:
        register()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, None, model=model)

    def run():
        accumulate = gk.Accumulator(guard, 2, model=model, **options)
        if is_late:
            register()
        for micro in accumulate([torch.tensor([6.0, 8.0], dtype=torch.float64)] * 2):
            with micro:
                micro.backward(model(micro.batch), weight=2)
        optimizer.step()
        return guard.report.norm

    return outcome(run)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    ("hook", "options"),
    [
        (summing_hook, {"divides": 1}),
        (averaging_hook, {"divides": 2}),
        (default_hooks.allreduce_hook, {}),
        (default_hooks.fp16_compress_hook, {}),
    ],
    ids=["sum", "average", "allreduce", "fp16"],
)
def test_custom_comm_hook(ranks, hook, options, is_late):
    assert ranks(2, hooked, hook, options, is_late) == [pytest.approx(5.0)] * 2


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("hook", [summing_hook, averaging_hook])
def test_a_custom_comm_hook_that_nobody_knows_is_refused(ranks, hook, is_late):
    for kind, words in ranks(2, hooked, hook, {}, is_late):
        assert kind == "ValueError"
        assert f"communication hook {hook.__name__}()" in words
        assert "divides=1" in words


def test_divides_is_a_number_above_0():
    guard = gk.attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), None)
    with pytest.raises(ValueError, match=r"divides=0\): divides must be a number above 0"):
        gk.Accumulator(guard, 2, divides=0)
