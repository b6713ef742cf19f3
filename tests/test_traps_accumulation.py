"""The accumulation lines of the trap suite: each a way in which real training code goes wrong.

Oracle for all: float64, single process, the window's items as one full batch.
"""

import io
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import gradkeel as gk

VOCABULARY = 5


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, VOCABULARY)).to(dtype)


def make_data(counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(VOCABULARY, (n,), generator=generator))
        for n in counts
    ]


def loss_sum(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="sum")


def oracle(
    windows: Iterable[Sequence[tuple[Tensor, Tensor]]], bound: float | None, lr: float = 0.5
) -> list[Tensor]:
    """Weights after one full-batch step a window, in float64."""
    model = make_model(torch.float64)
    for window in windows:
        inputs = torch.cat([x for x, _ in window]).double()
        targets = torch.cat([y for _, y in window])
        nn.functional.cross_entropy(model(inputs), targets).backward()
        gradients = [p.grad for p in model.parameters()]
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(lr * g * (1.0 if bound is None else min(1.0, bound / float(norm))))
                p.grad = None
    return [p.detach() for p in model.parameters()]


def train(
    data: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    bound: float | None,
    *,
    lr: float = 0.5,
    reduction: str = "sum",
) -> tuple[list[Tensor], gk.Guard]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    guard = gk.attach(optimizer, None if bound is None else gk.ClipByGlobalNorm(bound), model=model)
    accumulate = gk.Accumulator(guard, steps, reduction=reduction)
    for micro in accumulate(data):
        with micro:
            loss = loss_sum(model, micro.batch)
            count = len(micro.batch[0])
            micro.backward(loss / count if reduction == "mean" else loss, weight=count)
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], guard


def assert_same(mine: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for a, b in zip(mine, exact, strict=True):
        # float32 sums of some hundred terms against float64
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bound", [None, 0.05])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_01_partition_invariance(bound: float | None, reduction: str) -> None:
    cut = random.Random(0)
    for _ in range(20):
        counts = [cut.choice([1, 3, 17, 50]) for _ in range(8)]
        steps = cut.choice([1, 2, 4, 8])
        data = make_data(counts)
        windows = [data[i : i + steps] for i in range(0, len(data), steps)]
        assert_same(train(data, steps, bound, reduction=reduction)[0], oracle(windows, bound))


def test_01_the_mean_of_means_is_something_else() -> None:
    """The bug that the trap is about: the same two micro-batches, each loss a mean, divided by two."""
    data = make_data([3, 50])
    model = make_model()
    for batch in data:
        (loss_sum(model, batch) / len(batch[0]) / 2).backward()
    naive = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    exact_weights = oracle([data], None, lr=1.0)
    exact = torch.cat(
        [(a.double() - b).flatten() for a, b in zip(make_model().parameters(), exact_weights, strict=True)]
    )
    assert (naive - exact).norm() / exact.norm() > 0.1


def test_02_short_last_window() -> None:
    data = make_data([5, 2, 9, 4, 7, 1, 30])
    seen = []
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.05), model=model)
    accumulate = gk.Accumulator(guard, 4)
    for _epoch in range(2):
        for micro in accumulate(iter(data)):  # an iterator has no length
            with micro:
                fresh = all(p.grad is None for p in model.parameters())
                seen.append((micro.index, fresh))
                micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]))
            if micro.closes_window:
                optimizer.step()
                optimizer.zero_grad()
    assert guard.report.step == 4
    assert seen == [(i, i == 0) for i in [0, 1, 2, 3, 0, 1, 2] * 2]
    assert_same([p.detach() for p in model.parameters()], oracle([data[:4], data[4:]] * 2, 0.05))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_03_zero_weight(reduction: str, as_tensor: bool) -> None:
    """A micro-batch whose items are all masked counts nothing; a window of such is skipped, without a NaN."""
    data = make_data([4, 6])
    masked = (torch.randn(3, 4), torch.full((3,), -100))
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.05), model=model)
    accumulate = gk.Accumulator(guard, 3, reduction=reduction)
    for micro in accumulate([data[0], masked, data[1], masked, masked, masked]):
        before = [p.detach().clone() for p in model.parameters()]
        with micro:
            inputs, targets = micro.batch
            count = int((targets >= 0).sum())
            loss = nn.functional.cross_entropy(
                model(inputs), targets, reduction=reduction
            )  # NaN for a masked mean
            micro.backward(loss, weight=torch.tensor(count) if as_tensor else count)
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
    report = guard.report
    assert (report.step, report.stepped, report.reason) == (2, False, "the window's weight is zero")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.state[next(model.parameters())]["step"] == 1
    exact = make_model(torch.float64)
    reference = torch.optim.AdamW(exact.parameters(), lr=0.5)
    inputs, targets = torch.cat([data[0][0], data[1][0]]).double(), torch.cat([data[0][1], data[1][1]])
    nn.functional.cross_entropy(exact(inputs), targets).backward()
    norm = torch.cat([p.grad.flatten() for p in exact.parameters()]).norm()
    for p in exact.parameters():
        p.grad *= min(1.0, 0.05 / float(norm))
    reference.step()
    for a, b in zip(model.parameters(), exact.parameters(), strict=True):
        # Adam divides a gradient by its own size, which multiplies float32's error where gradients are near eps
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=1e-4, atol=1e-4)


def test_05_dropped_micro_batch() -> None:
    """A micro-batch that raises before its backward leaves the window, and takes its weight with it."""
    data = make_data([4, 9, 6])
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    accumulate = gk.Accumulator(gk.attach(optimizer, None, model=model), 2)
    for index, micro in enumerate(accumulate(data)):
        try:
            with micro:
                if index == 1:
                    raise MemoryError("as an out-of-memory error in the forward pass would")
                micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]))
        except MemoryError:
            continue
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
    assert_same([p.detach() for p in model.parameters()], oracle([[data[0], data[2]]], None))


def test_05_a_broken_backward_must_be_dropped() -> None:
    """An exception in the middle of backward leaves half a micro-batch behind: nothing steps on that."""
    data = make_data([4, 9, 6])
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    accumulate = gk.Accumulator(gk.attach(optimizer, None, model=model), 2)

    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            raise MemoryError("in the middle of backward")

    micro = next(accumulate(data))

    def explode() -> None:
        with micro:
            hidden = Explodes.apply(model[0](micro.batch[0]))
            loss = nn.functional.cross_entropy(model[2](hidden), micro.batch[1], reduction="sum")
            micro.backward(loss, weight=4)

    with pytest.raises(MemoryError):
        explode()
    for refused in (optimizer.step, accumulate.finish, accumulate.state_dict):
        with pytest.raises(gk.WindowError, match="drop"):
            refused()
    accumulate.drop()
    assert all(p.grad is None for p in model.parameters())
    for micro in accumulate(data[:2]):
        with micro:
            micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]))
        if micro.closes_window:
            optimizer.step()
    assert_same([p.detach() for p in model.parameters()], oracle([data[:2]], None))


@pytest.mark.parametrize("fused", [False, True])
def test_07_epoch_boundary_with_scaler(fused: bool) -> None:
    """Five micro-batches in windows of two, for two epochs, under a loss scale: no error, and exact."""
    data = make_data([5, 2, 9, 4, 7])
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.05), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    accumulate = gk.Accumulator(guard, 2)
    for _epoch in range(2):
        for micro in accumulate(data):
            with micro:
                loss = loss_sum(model, micro.batch)
                micro.backward(loss, weight=len(micro.batch[0]), scaler=scaler)
            if micro.closes_window:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    assert guard.report.step == 6
    windows = [data[:2], data[2:4], data[4:]] * 2
    assert_same([p.detach() for p in model.parameters()], oracle(windows, 0.05))


def test_08_clip_once_per_window() -> None:
    """Gradients [2, 0] and [0, 2] under bound 1 give [.7071, .7071], not [.4472, .8944]."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    accumulate = gk.Accumulator(guard, 2)
    for micro in accumulate([torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])]):
        with micro:
            micro.backward((weight * micro.batch).sum(), weight=1)
        if micro.closes_window:
            optimizer.step()
    torch.testing.assert_close(-weight.detach(), torch.tensor([0.5**0.5, 0.5**0.5]))
    assert guard.report.norm == pytest.approx(8**0.5, rel=1e-7)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_09_wrong_order_raises(set_to_none: bool) -> None:
    data = make_data([3, 4, 5, 6])
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    accumulate = gk.Accumulator(gk.attach(optimizer, gk.ClipByGlobalNorm(0.05), model=model), 3)

    def run(micro: gk.MicroBatch) -> None:
        with micro:
            micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]))

    loss_sum(model, data[0]).backward()
    with pytest.raises(gk.WindowError, match="without a window"):
        optimizer.step()
    optimizer.zero_grad()
    micros = accumulate(data)
    first = next(micros)
    with first:
        first.backward(loss_sum(model, first.batch), weight=3)
        with pytest.raises(gk.WindowError, match=r"inside `with micro:`"):
            optimizer.step()
    with pytest.raises(gk.WindowError, match=r"after micro-batch 1 of 3.*closes_window"):
        optimizer.step()
    with pytest.raises(gk.WindowError, match="belong inside"):
        first.backward(loss_sum(model, first.batch), weight=3)
    with pytest.raises(gk.WindowError, match="a window is open"):
        accumulate(data)
    torch.nn.utils.clip_grad_norm_(
        model.parameters(), 100.0
    )  # scales by 1, and is still somebody else's clip
    with pytest.raises(gk.WindowError, match=r"modified by somebody else.*clip"):
        run(next(micros))
    accumulate.drop()

    micros = accumulate(data)
    run(next(micros))
    optimizer.zero_grad(set_to_none=set_to_none)
    with pytest.raises(gk.WindowError, match="cleared" if set_to_none else "modified"):
        run(next(micros))
    accumulate.drop()

    for micro in accumulate(data[:3]):
        run(micro)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(gk.WindowError, match="modified by somebody else"):
        optimizer.step()
    accumulate.drop()
    before = [p.detach().clone() for p in model.parameters()]
    assert_same(before, [p.detach() for p in make_model().parameters()])  # none of this moved anything

    for micro in accumulate(data[:3]):
        run(micro)
    optimizer.step()
    with pytest.raises(gk.WindowError, match="one step"):
        optimizer.step()
    with pytest.raises(gk.WindowError, match=r"zero_grad\(\) after optimizer.step"):
        run(next(accumulate(data)))


def test_14_low_precision_accumulation() -> None:
    """bfloat16 1 + 256 x 0.003: plain sums stay at 1, wide ones give 1.768."""
    results = {}
    for dtype in (None, torch.float32):
        weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        accumulate = gk.Accumulator(gk.attach(optimizer, None), 257, accumulate_dtype=dtype)
        for micro in accumulate([1.0] + [0.003] * 256):
            with micro:
                micro.backward(weight.sum() * micro.batch, weight=1 / 257)
            if micro.closes_window:
                optimizer.step()
        results[dtype] = -float(weight.detach())
    assert results[None] == 1.0
    assert results[torch.float32] == pytest.approx(1.768, rel=2**-8)  # bfloat16 has 8 bits


def test_16_stale_gradients() -> None:
    """A window after a skipped one equals a fresh window."""
    data = make_data([4, 6, 5, 3])
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.05), model=model)
    accumulate = gk.Accumulator(guard, 2)
    steps = []
    for index, micro in enumerate(accumulate(data)):
        with micro:
            bad = float("nan") if index == 1 else 1.0
            micro.backward(loss_sum(model, micro.batch) * bad, weight=len(micro.batch[0]))
        if micro.closes_window:
            with (
                pytest.warns(gk.SkippedStepWarning, match="all 4 gradients") if index == 1 else nullcontext()
            ):
                optimizer.step()  # and no zero_grad: the skip has cleared the gradients
            steps.append(guard.report.stepped)
    assert steps == [False, True]
    assert_same([p.detach() for p in model.parameters()], oracle([data[2:]], 0.05))


@pytest.mark.parametrize("wide", [None, torch.float64])
def test_28_resume(wide: torch.dtype | None) -> None:
    """Killed at micro-batch 2 of 4 and resumed from its checkpoint: bitwise equal to the run that was not killed."""
    data = make_data([4, 6, 5, 3, 2, 8, 9, 1])

    def build() -> tuple[nn.Module, torch.optim.Optimizer, gk.Guard, gk.Accumulator]:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        guard = gk.attach(optimizer, gk.policies.parse("zclip").policy, model=model)
        return model, optimizer, guard, gk.Accumulator(guard, 4, accumulate_dtype=wide)

    def run(parts: tuple, batches: Sequence, *, stop: bool = False) -> None:
        model, optimizer, _, accumulate = parts
        micros: Iterator = accumulate(itertools.chain(batches, [None]) if stop else batches)
        for micro in micros:
            if micro.batch is None:
                return
            with micro:
                micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]))
            if micro.closes_window:
                optimizer.step()
                optimizer.zero_grad()

    whole = build()
    run(whole, data)

    killed = build()
    run(killed, data[:6], stop=True)
    saved = {
        k: p.state_dict() for k, p in zip(("model", "optimizer", "guard", "accumulate"), killed, strict=True)
    }
    path = io.BytesIO()
    torch.save(saved, path)
    path.seek(0)
    loaded = torch.load(path, weights_only=True)

    resumed = build()
    for key, part in zip(("model", "optimizer", "guard", "accumulate"), resumed, strict=True):
        part.load_state_dict(loaded[key])
    run(resumed, data[6:])
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole[2].report.norm == resumed[2].report.norm

    unused = make_model()
    guard = gk.attach(torch.optim.SGD(unused.parameters(), lr=0.1), None, model=unused)
    other = gk.Accumulator(guard, 2, accumulate_dtype=wide)
    with pytest.raises(ValueError, match=r"steps=4.*steps=2"):
        other.load_state_dict(loaded["accumulate"])


def test_39_excluded_are_prescaled() -> None:
    """Under accumulation and a loss scale, excluded parameters get their true, unclipped gradient."""
    data = make_data([4, 6])
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1e-3), model=model, exclude=["*.bias"])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for micro in gk.Accumulator(guard, 2)(data):
        with micro:
            micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]), scaler=scaler)
        if micro.closes_window:
            scaler.step(optimizer)
    exact = oracle([data], None, lr=1.0)
    start = list(make_model().parameters())
    for index, (mine, true) in enumerate(zip(model.parameters(), exact, strict=True)):
        if index % 2 == 1:  # the biases
            torch.testing.assert_close(mine.detach().double(), true, rtol=1e-6, atol=1e-6)
    moved = [(mine - begin).detach().double() for mine, begin in zip(model.parameters(), start, strict=True)]
    # differences of float32 weights of order 1 lose all but four digits of an update of 1e-3
    assert torch.cat([moved[0].flatten(), moved[2].flatten()]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_40_reused_buffers() -> None:
    """A loader that reuses its tensor is read in order, and random numbers are drawn as in a plain loop."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))

    class Reuses:
        def __iter__(self) -> Iterator[Tensor]:
            buffer = torch.empty(2, 3)
            for _ in range(5):
                yield buffer.copy_(torch.randn(2, 3))

    def plain() -> list[Tensor]:
        torch.manual_seed(5)
        return [model(batch).detach().clone() for batch in Reuses()]

    def accumulated() -> list[Tensor]:
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        guard = gk.attach(optimizer, None)
        seen = []
        for micro in gk.Accumulator(guard, 2)(Reuses()):
            with micro:
                output = model(micro.batch)
                seen.append(output.detach().clone())
                micro.backward(output.sum(), weight=2)
            if micro.closes_window:
                optimizer.step()
                optimizer.zero_grad()
        return seen

    expected = plain()
    assert all(torch.equal(a, b) for a, b in zip(accumulated(), expected, strict=True))
