"""The gradient noise scale: the estimates by hand, and what the accumulator measures for them."""

import math

import pytest
import torch

from gradkeel.kernels import native

from tests.accumulate.loop import Loop

# Sums of gradients, as what each micro-batch adds to the window, and numbers of items.
WINDOW = [([2.0, 0.0], 1), ([3.0, 3.0], 3), ([8.0, 4.0], 4)]
OTHER = [([1.0, 7.0], 2), ([4.0, 4.0], 5), ([0.0, 3.0], 1)]
WIDE = [None, torch.float64]

# A handful of float64 operations; torch's own norms of short float32 tensors are sums in float32.
PRECISION = 1e-9 if native.kernels() is not None else 1e-6


def by_parts(window):
    """``tr(Sigma)`` and ``|G|^2`` from every micro-batch's own sum, by the formulas of the paper's appendix A."""
    sums, items = zip(*window, strict=True)
    sums, items = torch.tensor(sums, dtype=torch.float64), torch.tensor(items, dtype=torch.float64)
    inner = (sums.square().sum(1) / items).sum()
    outer = sums.sum(0).square().sum() / items.sum()
    noise = (inner - outer) / (len(window) - 1)
    return float(noise), float((outer - noise) / items.sum())


def by_running_sums(window):
    """The line through ``|S_k|^2 / B_k`` over ``B_k``: its value at 0, and its slope."""
    sums, items = zip(*window, strict=True)
    sums, items = torch.tensor(sums, dtype=torch.float64), torch.tensor(items, dtype=torch.float64)
    sums, items = sums.cumsum(0), items.cumsum(0)
    design = torch.stack([torch.ones_like(items), items], 1)
    line = torch.linalg.lstsq(design, (sums.square().sum(1) / items).unsqueeze(1)).solution
    return float(line[0]), float(line[1])


def expect(scale, wide, *windows):
    """The estimates are the sums over these windows."""
    estimate = by_running_sums if wide is None else by_parts
    noises, signals = zip(*map(estimate, windows), strict=True)
    assert scale.windows == len(windows)
    # The twin solves its line another way.
    assert scale.noise == pytest.approx(math.fsum(noises), rel=PRECISION)
    assert scale.signal == pytest.approx(math.fsum(signals), rel=PRECISION)


def fresh(steps=3, **options):
    return Loop(steps, noise_scale=True, **options)


def test_the_formula_by_hand():
    """A = 4/1 + 18/3 + 80/4 = 30, C = (13^2 + 7^2)/8 = 27.25."""
    loop = fresh(accumulate_dtype=torch.float64)
    loop.run(WINDOW)
    scale = loop.accumulate.noise_scale
    assert scale.noise == pytest.approx((30 - 27.25) / 2, rel=PRECISION)
    assert scale.signal == pytest.approx((27.25 - 1.375) / 8, rel=PRECISION)
    assert scale.value == pytest.approx(1.375 * 8 / (27.25 - 1.375), rel=PRECISION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wide", WIDE)
def test_windows_add_up(wide, dtype):
    """The same in float16, whose losses are divided by a power of two first."""
    loop = fresh(accumulate_dtype=wide, dtype=dtype)
    loop.run(WINDOW + OTHER)
    expect(loop.accumulate.noise_scale, wide, WINDOW, OTHER)


@pytest.mark.parametrize("wide", WIDE)
def test_it_may_be_read_at_any_time(wide):
    """Reading counts no window twice, and none that is open."""
    loop = fresh(accumulate_dtype=wide)
    assert loop.accumulate.noise_scale.windows == 0
    assert loop.accumulate.noise_scale.value is None
    for index, micro in enumerate(loop.accumulate(WINDOW + OTHER)):
        with micro:
            loop.backward(micro)
        if micro.closes_window:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.accumulate.noise_scale.windows == (index + 1) // 3
    expect(loop.accumulate.noise_scale, wide, WINDOW, OTHER)


@pytest.mark.parametrize("wide", WIDE)
def test_a_last_window_of_one_micro_batch_tells_nothing(wide):
    loop = fresh(accumulate_dtype=wide)
    loop.run(OTHER[:1])
    loop.run([*WINDOW, *OTHER[:1]])
    assert loop.guard.step == 3
    expect(loop.accumulate.noise_scale, wide, WINDOW)
    loop.run(OTHER)
    expect(loop.accumulate.noise_scale, wide, WINDOW, OTHER)


@pytest.mark.parametrize("wide", WIDE)
def test_a_last_window_of_two_micro_batches_counts(wide):
    loop = fresh(accumulate_dtype=wide)
    loop.run([*WINDOW, *OTHER[:2]])
    expect(loop.accumulate.noise_scale, wide, WINDOW, OTHER[:2])


@pytest.mark.parametrize("wide", WIDE)
def test_a_window_that_is_dropped_tells_nothing(wide):
    loop = fresh(accumulate_dtype=wide)
    loop.leave_open(OTHER[:2])
    loop.accumulate.drop()
    loop.run(WINDOW)
    expect(loop.accumulate.noise_scale, wide, WINDOW)


@pytest.mark.parametrize("wide", WIDE)
def test_a_window_that_is_finished_early_counts(wide):
    loop = fresh(4, accumulate_dtype=wide)
    loop.leave_open(WINDOW)
    loop.accumulate.finish()
    loop.optimizer.step()
    expect(loop.accumulate.noise_scale, wide, WINDOW)


@pytest.mark.parametrize("wide", WIDE)
def test_a_micro_batch_without_items_tells_nothing(wide):
    loop = fresh(5, accumulate_dtype=wide)
    nothing = ([9.0, 9.0], 0)
    loop.run([nothing, *WINDOW[:1], nothing, *WINDOW[1:]])
    expect(loop.accumulate.noise_scale, wide, WINDOW)


@pytest.mark.parametrize("wide", WIDE)
def test_micro_batches_without_weights_count_as_one_item_each(wide):
    loop = fresh(accumulate_dtype=wide)
    loop.run([(gradient, None) for gradient, _ in WINDOW])
    expect(loop.accumulate.noise_scale, wide, [(gradient, 1) for gradient, _ in WINDOW])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wide", WIDE)
def test_what_a_checkpoint_holds_of_a_window_counts_as_one_micro_batch(wide, dtype):
    killed = fresh(4, accumulate_dtype=wide, dtype=dtype)
    killed.leave_open(WINDOW[:2])
    loop = fresh(4, accumulate_dtype=wide, dtype=dtype)
    loop.leave_open(OTHER[:1])
    loop.accumulate.load_state_dict(killed.accumulate.state_dict())
    loop.run([WINDOW[2], OTHER[2]])
    held = ([5.0, 3.0], 4)  # the sum of the first two
    expect(loop.accumulate.noise_scale, wide, [held, WINDOW[2], OTHER[2]])


def test_a_loss_scale_is_refused_before_anything_counts():
    loop = fresh(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with next(loop.accumulate(WINDOW)) as micro:
        with pytest.raises(ValueError, match="cannot be measured under a loss scale"):
            loop.backward(micro, scaler=scaler)
        loop.backward(micro)
    loop.optimizer.step()
    assert loop.moved == [2.0, 0.0]


@pytest.mark.parametrize(
    ("part_norms", "total_norm", "noise", "signal", "value"),
    [
        ([3.0, 3.0], 5.0, 2.75, 0.875, 22 / 7),
        ([1.0, 1.0], 4.0, -3.0, 1.75, None),
        ([2.0, 2.0], 1.0, 3.75, -0.875, None),
        ([2.0, 2.0], 4.0, 0.0, 1.0, None),
        ([3.0, 4.0], 5.0, 6.25, 0.0, None),
    ],
)
def test_the_quotient_is_given_only_where_both_parts_are_positive(
    part_norms, total_norm, noise, signal, value
):
    scale = fresh().accumulate.noise_scale.add([2, 2], part_norms=part_norms, total_norm=total_norm)
    assert (scale.noise, scale.signal, scale.value) == (noise, signal, value)


@pytest.mark.parametrize("method", ["add", "add_running"])
@pytest.mark.parametrize(
    ("weights", "norms", "words"),
    [
        ([1], [1.0], "needs two micro-batches or more, not 1; noise is their difference"),
        ([1, 2], [1.0], "weights and norms must be as many, not 2 and 1"),
        ([1, 2], [1.0] * 3, "weights and norms must be as many, not 2 and 3"),
        ([1, 0], [1.0] * 2, r"weights\[1\]=0\).*must be a positive number"),
        ([-1, 2], [1.0] * 2, r"weights\[0\]=-1\)"),
        ([1, math.inf], [1.0] * 2, r"weights\[1\]=inf\)"),
        ([math.nan, 1], [1.0] * 2, r"weights\[0\]=nan\)"),
    ],
)
def test_a_window_that_tells_nothing_is_refused(method, weights, norms, words):
    blank = fresh().accumulate.noise_scale
    options = {"part_norms": norms, "total_norm": 1.0} if method == "add" else {"sum_norms": norms}
    with pytest.raises(ValueError, match=rf"NoiseScale\.{method}.*{words}"):
        getattr(blank, method)(weights, **options)
