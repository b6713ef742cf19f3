"""The accumulator's contract, besides the traps."""

import math

import pytest
import torch
from torch import nn

import gradkeel as gk


def parts(**options):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = gk.attach(optimizer, options.pop("policy", None))
    return weight, optimizer, guard, gk.Accumulator(guard, options.pop("steps", 2), **options)


def run(accumulate, optimizer, weight, batches, weights):
    for micro, amount in zip(accumulate(batches), weights, strict=False):
        with micro:
            micro.backward((weight * micro.batch).sum(), weight=amount)
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"steps=0.*at least 1"),
        ({"steps": 2.0}, r"steps=2\.0.*int"),
        ({"steps": True}, r"steps=True"),
        ({"reduction": "none"}, r"reduction='none'.*'sum' or 'mean'"),
        ({"accumulate_dtype": torch.int32}, r"accumulate_dtype=torch\.int32"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        parts(**arguments)


def test_a_guard_has_one_accumulator():
    _, _, guard, _ = parts()
    with pytest.raises(gk.WindowError, match="has an accumulator already"):
        gk.Accumulator(guard, 2)


@pytest.mark.parametrize(
    ("amount", "error"),
    [(-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("3", TypeError), (True, TypeError)],
)
def test_weights_are_checked_before_backward(amount, error):
    weight, _, _, accumulate = parts()
    micro = next(accumulate([torch.ones(2)]))
    with micro:
        with pytest.raises(error, match="weight"):
            micro.backward(weight.sum(), weight=amount)
        assert weight.grad is None
        micro.backward(weight.sum(), weight=1)


def test_a_weight_of_several_numbers_is_refused():
    weight, _, _, accumulate = parts()
    micro = next(accumulate([torch.ones(2)]))
    with micro:
        with pytest.raises(ValueError, match=r"shape \(2,\)"):
            micro.backward(weight.sum(), weight=torch.ones(2))
        micro.backward(weight.sum(), weight=torch.ones(1))


def test_without_weights_each_micro_batch_counts_alike():
    weight, optimizer, _, accumulate = parts()
    run(accumulate, optimizer, weight, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])], [None, None])
    assert weight.tolist() == [-1.0, -2.0]


def test_weights_and_none_do_not_mix():
    weight, _, _, accumulate = parts()
    micros = accumulate([torch.ones(2)] * 2)
    with next(micros) as micro:
        micro.backward(weight.sum(), weight=1)
    with pytest.raises(gk.WindowError, match="cannot be mixed"), next(micros) as micro:
        micro.backward(weight.sum())


def test_weigh_serves_a_backward_that_others_call():
    weight, optimizer, guard, accumulate = parts()
    for micro in accumulate([(torch.tensor([3.0, 0.0]), 1), (torch.tensor([0.0, 9.0]), 2)]):
        values, items = micro.batch
        with micro:
            (weight * values).sum().backward()
            micro.weigh(items)
        if micro.closes_window:
            optimizer.step()
    assert weight.tolist() == [-1.0, -3.0]
    assert "loss" not in guard.report.scalars  # nobody told it


def test_a_backward_of_unknown_weight_is_an_error():
    weight, optimizer, guard, accumulate = parts()
    for index, micro in enumerate(accumulate([torch.ones(2)] * 3)):
        if index == 1:
            with (
                pytest.raises(gk.WindowError, match=r"2 of 2 ran a backward of unknown weight.*weigh"),
                micro,
            ):
                (weight * micro.batch).sum().backward()
            with pytest.raises(gk.WindowError, match="drop"):
                optimizer.step()
            accumulate.drop()
        else:
            with micro:
                micro.weigh(2)
                (weight * micro.batch).sum().backward()
    optimizer.step()
    assert weight.grad.tolist() == [0.5, 0.5]
    assert guard.step == 1


def test_a_micro_batch_without_a_backward_counts_nothing():
    weight, optimizer, _guard, accumulate = parts()
    for index, micro in enumerate(accumulate([torch.ones(2)] * 2)):
        with micro:
            if index == 0:
                micro.backward((weight * micro.batch).sum(), weight=4)
    optimizer.step()
    assert weight.grad.tolist() == [0.25, 0.25]


def test_the_guard_must_be_one():
    with pytest.raises(TypeError, match=r"what attach\(\) returns"):
        gk.Accumulator(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 2)


def test_weigh_refuses_means():
    _, _, _, accumulate = parts(reduction="mean")
    with next(accumulate([1])) as micro, pytest.raises(gk.WindowError, match="sums"):
        micro.weigh(3)


def test_the_loss_is_the_windows():
    weight, optimizer, guard, accumulate = parts()
    with torch.no_grad():
        weight.fill_(1.0)
    run(accumulate, optimizer, weight, [torch.tensor([1.0, 1.0]), torch.tensor([6.0, 4.0])], [1, 3])
    assert float(guard.report.scalars["loss"]) == (2.0 + 10.0) / 4
    assert float(accumulate.loss) == 3.0


def test_a_loss_that_the_user_logs_stays():
    weight, optimizer, guard, accumulate = parts(steps=1)
    for micro in accumulate([torch.ones(2)]):
        with micro:
            guard.log(loss=42.0)
            micro.backward((weight * micro.batch).sum(), weight=1)
        optimizer.step()
    assert guard.report.scalars["loss"] == 42.0


def test_a_break_must_be_finished_or_dropped():
    weight, optimizer, guard, accumulate = parts(steps=4)
    for micro in accumulate([torch.tensor([2.0, 2.0])] * 3):
        with micro:
            micro.backward((weight * micro.batch).sum(), weight=2)
        break
    with pytest.raises(gk.WindowError, match=r"finish\(\) and step, or accumulate\.drop\(\)"):
        accumulate([torch.ones(2)])
    accumulate.finish()
    optimizer.step()
    assert weight.tolist() == [-1.0, -1.0]
    assert guard.report.step == 1
    with pytest.raises(gk.WindowError, match="no window is open"):
        accumulate.finish()


def test_a_micro_batch_that_is_passed_over_is_an_error():
    _, _, _, accumulate = parts()
    with pytest.raises(gk.WindowError, match="passed over"):
        list(accumulate([1, 2]))


def test_closes_window_is_known_after_the_block():
    weight, _, _, accumulate = parts(steps=1)
    with next(accumulate([torch.ones(2)])) as micro:
        with pytest.raises(gk.WindowError, match="after the `with micro:` block"):
            _ = micro.closes_window
        micro.backward(weight.sum(), weight=1)
    assert micro.closes_window


def test_nested_micro_batches_are_refused():
    _, _, _, accumulate = parts()
    micros = accumulate([1, 2])
    first = next(micros)
    with first, pytest.raises(gk.WindowError, match="inside of another"), first:
        pass


def test_the_last_micro_batch_of_the_data_may_raise_and_the_window_is_not_lost():
    weight, optimizer, _, accumulate = parts(steps=4)
    micros = accumulate([torch.tensor([2.0, 2.0]), torch.ones(2)])
    with next(micros) as micro:
        micro.backward((weight * micro.batch).sum(), weight=2)
    with pytest.raises(MemoryError), next(micros):
        raise MemoryError
    with pytest.raises(gk.WindowError, match="nothing has closed"):
        next(micros)
    accumulate.finish()
    optimizer.step()
    assert weight.tolist() == [-1.0, -1.0]


def test_float16_sums_stay_in_range():
    """The sum of 40 gradients of 3,000 leaves float16's range; their mean does not."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=2**-10)
    guard = gk.attach(optimizer, None, nonfinite="raise")
    for micro in gk.Accumulator(guard, 2)([20, 20]):
        with micro:
            micro.backward((weight * 3000.0).sum() * micro.batch, weight=micro.batch)
        if micro.closes_window:
            optimizer.step()
    assert weight.tolist() == [-3000 / 1024] * 2
    assert guard.report.norm == pytest.approx(3000 * 2**0.5, rel=1e-6)


def test_sums_of_wide_dtype_take_any_gradient():
    """Sparse gradients and parameters without one; float32 gradients are not widened by float32."""
    table = nn.Embedding(5, 2, sparse=True)
    unused = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*table.parameters(), unused], lr=1.0)
    with torch.no_grad():
        table.weight.zero_()
    accumulate = gk.Accumulator(gk.attach(optimizer, None), 2, accumulate_dtype=torch.float32)
    for micro in accumulate([torch.tensor([0, 1]), torch.tensor([1])]):
        with micro:
            micro.backward(table(micro.batch).sum(), weight=1)
        if micro.closes_window:
            optimizer.step()
    assert table.weight[:, 0].tolist() == [-0.5, -1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("wide", [None, torch.float64])
def test_noise_scale_of_known_noise(wide):
    """Items with gradient g + noise: tr(Sigma) and |g|^2 are known, micro-batches unequal."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    accumulate = gk.Accumulator(guard, 4, noise_scale=True, accumulate_dtype=wide)
    truth = torch.full((50,), 0.2, dtype=torch.float64)  # |G|^2 = 2, tr(Sigma) = 50
    sizes = [1, 5, 2, 8] * 2000
    for micro in accumulate(sizes):
        with micro:
            items = truth + torch.randn(micro.batch, 50, generator=generator, dtype=torch.float64)
            micro.backward((weight * items.sum(0)).sum(), weight=micro.batch)
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
    assert accumulate.noise_scale.windows == 2000
    # 2,000 windows of 16 items: measured over seeds, the standard error is about 1.5% (parts) and 4% (running sums)
    assert accumulate.noise_scale.value == pytest.approx(25.0, rel=0.05 if wide else 0.15)


def test_noise_scale_must_be_asked_for():
    _, _, _, accumulate = parts()
    with pytest.raises(ValueError, match="noise_scale=True"):
        _ = accumulate.noise_scale


def test_detach_frees_the_optimizer_from_windows():
    weight, optimizer, guard, _ = parts()
    guard.detach()
    weight.sum().backward()
    optimizer.step()
    assert weight.tolist() == [-1.0, -1.0]
