"""Windows one after the other: what one leaves to the next, and what the guard makes of them."""

from fractions import Fraction

import pytest
import torch
from torch import nn

import gradkeel as gk

from tests.accumulate.loop import Loop

MICROS = [([1.0, 4.0], 1), ([5.0, 2.0], 3)]  # the window's gradient is [1.5, 1.5]
WIDE = [None, torch.float64]


# ---- dropped, finished, broken -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("count", [1, 2])
def test_a_dropped_window_leaves_nothing_behind(wide, count):
    """Neither gradients nor weights nor losses, whether it was complete or not."""
    loop = Loop(2, accumulate_dtype=wide)
    with torch.no_grad():
        loop.weight.fill_(1.0)
    loop.leave_open([([100.0, 200.0], 7)] * count)
    loop.accumulate.drop()
    assert loop.weight.grad is None
    with torch.no_grad():
        loop.weight.zero_()
    loop.run(MICROS)
    assert loop.moved == [1.5, 1.5]
    assert loop.guard.report.scalars["loss"] == loop.accumulate.loss == 0.0


@pytest.mark.parametrize("wide", [*WIDE, torch.float32])
@pytest.mark.parametrize("count", [1, 2])
def test_a_window_that_is_dropped_leaves_its_gradients_in_the_loops_buffer(wide, count):
    loop, flat = Loop(2, accumulate_dtype=wide), torch.zeros(2)
    loop.weight.grad = flat.view(2)
    loop.leave_open([([100.0, 200.0], 7)] * count)
    loop.accumulate.drop()
    assert flat.tolist() == [0.0, 0.0]
    for _ in range(2):
        loop.run(MICROS, zero_grad=False)
        assert flat.tolist() == [1.5, 1.5]
        flat.zero_()
    assert loop.moved == [3.0, 3.0]


@pytest.mark.parametrize("wide", [*WIDE, torch.float32])
def test_a_window_that_is_skipped_in_the_loops_buffer_need_not_be_cleared(wide):
    loop, flat = Loop(2, accumulate_dtype=wide), torch.zeros(2)
    loop.weight.grad = flat.view(2)
    with pytest.warns(gk.errors.SkippedStepWarning):
        loop.run([([float("nan"), 0.0], 1)] * 2, zero_grad=False)
    loop.run(MICROS, zero_grad=False)
    assert (loop.moved, flat.tolist()) == ([1.5, 1.5], [1.5, 1.5])
    with pytest.raises(gk.WindowError, match="would add to the last one's gradients"):
        loop.run(MICROS)


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_that_the_user_logged_outlives_a_dropped_window(count):
    loop = Loop(2)
    loop.guard.log(loss=42.0)
    loop.leave_open(MICROS[:count])
    loop.accumulate.drop()
    loop.run(MICROS)
    assert loop.guard.report.scalars["loss"] == 42.0


@pytest.mark.parametrize("wide", WIDE)
def test_a_window_that_is_finished_early_is_watched_from_then_on(wide):
    loop = Loop(4, accumulate_dtype=wide)
    loop.leave_open(MICROS)
    loop.accumulate.finish()
    loop.weight.grad.mul_(0.5)
    with pytest.raises(gk.WindowError, match=r"modified by somebody else.*before optimizer\.step"):
        loop.optimizer.step()
    loop.accumulate.drop()
    loop.leave_open(MICROS)
    loop.accumulate.finish()
    loop.optimizer.step()
    assert loop.moved == [1.5, 1.5]


@pytest.mark.parametrize("wide", WIDE)
def test_finishing_a_complete_window_changes_nothing(wide):
    loop = Loop(2, accumulate_dtype=wide, noise_scale=True)
    loop.leave_open(MICROS)
    loop.accumulate.finish()
    loop.optimizer.step()
    assert loop.moved == [1.5, 1.5]
    assert loop.accumulate.noise_scale.windows == 1


@pytest.mark.parametrize("wide", WIDE)
def test_a_non_finite_window_that_raises_can_be_dropped(wide):
    loop = Loop(2, accumulate_dtype=wide, nonfinite="raise")
    with pytest.raises(gk.NonFiniteGradientError, match="nothing has been modified"):
        loop.run([MICROS[0], ([float("nan"), 0.0], 3)])
    loop.accumulate.drop()
    loop.run(MICROS)
    assert loop.moved == [1.5, 1.5]


def test_an_exception_that_spares_the_gradients_spares_the_window():
    """Trap 5 with wide sums: the window goes on without the micro-batch that raised."""
    loop = Loop(2, accumulate_dtype=torch.float64)
    for index, micro in enumerate(loop.accumulate([MICROS[0], MICROS[0], MICROS[1]])):
        if index == 1:
            with pytest.raises(MemoryError), micro:
                raise MemoryError
            continue
        with micro:
            loop.backward(micro)
    assert micro.closes_window
    loop.optimizer.step()
    assert loop.moved == [1.5, 1.5]


def test_a_broken_micro_batch_is_named():
    loop = Loop(3)
    micros = loop.accumulate(MICROS * 2)
    with next(micros) as micro:
        loop.backward(micro)

    def breaks():
        with next(micros) as micro:
            loop.backward(micro)
            raise MemoryError

    with pytest.raises(MemoryError):
        breaks()
    with pytest.raises(
        gk.WindowError, match=r"micro-batch 2 of 3 raised MemoryError during its backward; call .*drop"
    ):
        loop.optimizer.step()


# ---- from one window to the next -----------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("wide", WIDE)
def test_gradients_may_be_zeroed_in_place_between_windows(wide, foreach):
    weight, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight, unused], lr=1.0, foreach=foreach)
    guard = gk.attach(optimizer, None)
    for micro in gk.Accumulator(guard, 2, accumulate_dtype=wide)(MICROS * 3):
        with micro:
            micro.backward((weight * torch.tensor(micro.batch[0])).sum(), weight=micro.batch[1])
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            assert weight.grad.tolist() == [0.0, 0.0]
    assert weight.tolist() == [-4.5, -4.5]


@pytest.mark.parametrize("policy", [None, "global_norm(0.1)"])
@pytest.mark.parametrize("wide", WIDE)
def test_gradients_that_stay_after_the_step_are_refused(wide, policy):
    policy = None if policy is None else gk.ClipByGlobalNorm(0.1)
    loop = Loop(accumulate_dtype=wide, policy=policy)
    with pytest.raises(gk.WindowError, match=r"new window would add.*zero_grad\(\) after optimizer\.step"):
        loop.run(MICROS * 2, zero_grad=False)
    assert loop.guard.step == 1
    loop.optimizer.zero_grad()
    loop.run(MICROS)
    assert loop.guard.step == 2


@pytest.mark.parametrize("wide", WIDE)
def test_one_gradient_that_stays_is_one_too_many(wide):
    loop = Loop(1, accumulate_dtype=wide)
    other = nn.Parameter(torch.zeros(2))
    loop.optimizer.add_param_group({"params": [other]})
    micros = loop.accumulate(MICROS)
    with next(micros) as micro:
        micro.backward((loop.weight + other).sum(), weight=1)
    loop.optimizer.step()
    loop.weight.grad = None
    with pytest.raises(gk.WindowError, match="new window would add"), next(micros):
        pass


@pytest.mark.parametrize("wide", WIDE)
def test_parameters_may_be_added_between_windows(wide):
    """As finetuning does that unfreezes a layer after an epoch."""
    loop = Loop(accumulate_dtype=wide)
    loop.run(MICROS)
    late = nn.Parameter(torch.zeros(2, dtype=torch.float32))
    loop.optimizer.add_param_group({"params": [late]})
    for micro in loop.accumulate(MICROS):
        with micro:
            gradient = torch.tensor(micro.batch[0])
            micro.backward(((loop.weight + late) * gradient).sum(), weight=micro.batch[1])
            assert wide is None or micro.index == 0 or late.grad is not None
        if wide is not None and not micro.closes_window:
            assert late.grad is None  # its sum is wide, too
    loop.optimizer.step()
    assert loop.moved == [3.0, 3.0]
    assert late.tolist() == [-1.5, -1.5]


def test_each_window_has_its_own_loss():
    loop = Loop()
    assert loop.accumulate.loss is None
    with torch.no_grad():
        loop.weight.fill_(1.0)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    seen = []
    for micro in loop.accumulate([*MICROS, ([3.0, 3.0], 2), ([1.0, 5.0], 4)]):
        with micro:
            loop.backward(micro)
            seen.append(float(loop.accumulate.loss))
        if micro.closes_window:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            seen.append((float(loop.guard.report.scalars["loss"]), float(loop.accumulate.loss)))
    # Sums so far over weights so far.
    assert seen == [5.0, 12 / 4, (3.0, 3.0), 3.0, 12 / 6, (2.0, 2.0)]
    assert not loop.accumulate.loss.requires_grad


def test_a_micro_batch_is_fetched_when_the_one_before_is_done_with():
    """A window's last one is followed by the step before anything is fetched for the next."""
    loop, events = Loop(2), []

    def loader():
        for index in range(5):
            events.append(f"fetch {index}")
            yield index, ([1.0, 1.0], 1)

    for micro in loop.accumulate(loader()):
        index, batch = micro.batch
        events.append(f"use {index}")
        micro.batch = batch
        with micro:
            loop.backward(micro)
        if micro.closes_window:
            events.append("step")
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert events == [
        *("fetch 0", "use 0", "fetch 1", "use 1", "step"),
        *("fetch 2", "use 2", "fetch 3", "use 3", "step"),
        *("fetch 4", "use 4", "step"),
    ]


@pytest.mark.parametrize("length", [0, 3, 9])
def test_a_length_is_not_believed_where_the_data_tell(length):
    """As with an iterable dataset whose length is a guess."""

    class Guessed(list):
        def __len__(self):
            return length

    loop = Loop(2)
    loop.run(Guessed([*MICROS, *MICROS, ([2.0, 0.0], 4)]))
    assert loop.guard.step == 3
    assert loop.moved == [3.5, 3.0]


def test_batches_that_look_empty_are_batches():
    loop, seen = Loop(2), []
    for micro in loop.accumulate([None, 0, [], False]):
        seen.append((micro.batch, micro.index, micro.is_filler))
        with micro:
            micro.backward(loop.weight.sum(), weight=1)
        if micro.closes_window:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert seen == [(None, 0, False), (0, 1, False), ([], 0, False), (False, 1, False)]
    assert loop.guard.step == 2


def test_no_data_is_no_window():
    loop = Loop()
    assert list(loop.accumulate([])) == []
    loop.run(MICROS)
    assert loop.moved == [1.5, 1.5]


# ---- who touched the gradients -------------------------------------------------------------------------------------


def two_parameters():
    loop = Loop(3)
    loop.other, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    loop.optimizer.add_param_group({"params": [loop.other, unused]})
    return loop


def clear_one(loop):
    loop.other.grad = None


def clear_one_and_scale_the_other(loop):
    loop.weight.grad.mul_(2)
    loop.other.grad = None


def scale_one(loop):
    loop.other.grad.mul_(1.0)


def replace_one(loop):
    loop.other.grad = loop.other.grad.clone()


def backward_elsewhere(loop):
    loop.other.sum().backward()


@pytest.mark.parametrize(
    ("act", "word"),
    [
        (clear_one, "cleared"),
        (clear_one_and_scale_the_other, "cleared"),
        (scale_one, "modified by somebody else"),
        (replace_one, "modified by somebody else"),
        (backward_elsewhere, "modified by somebody else"),
    ],
)
@pytest.mark.parametrize("before_step", [False, True])
def test_what_others_do_to_one_gradient_is_seen(act, word, before_step):
    loop = two_parameters()
    micros = loop.accumulate([1, 1, 1, 1])
    for _ in range(3 if before_step else 1):
        with next(micros) as micro:
            micro.backward((loop.weight + loop.other).sum(), weight=1)
    act(loop)
    if before_step:
        with pytest.raises(gk.WindowError, match=rf"{word}.*before optimizer\.step\(\)"):
            loop.optimizer.step()
    else:
        with pytest.raises(gk.WindowError, match=rf"{word}.*before micro-batch 2 of 3"), next(micros):
            pass


def test_a_first_gradient_that_comes_from_elsewhere_is_seen():
    loop = two_parameters()
    micros = loop.accumulate([1, 1])
    with next(micros) as micro:
        micro.backward(loop.weight.sum(), weight=1)
    loop.other.sum().backward()
    with pytest.raises(gk.WindowError, match="modified by somebody else"), next(micros):
        pass


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "three",
    [3, 3.0, Fraction(3), torch.tensor(3), torch.tensor([3.0]), torch.tensor([[3]], dtype=torch.int32)],
    ids=repr,
)
def test_any_real_number_weighs(three):
    loop = Loop()
    loop.run([MICROS[0], (MICROS[1][0], three)])
    assert loop.moved == [1.5, 1.5]


@pytest.mark.parametrize(
    "amount", [torch.tensor(-1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))]
)
def test_tensors_that_weigh_are_checked_as_well(amount):
    loop = Loop()
    with next(loop.accumulate(MICROS)) as micro:
        with pytest.raises(ValueError, match="finite number, at least 0"):
            micro.backward(loop.weight.sum(), weight=amount)
        with pytest.raises(ValueError, match=r"shape \(0,\)"):
            micro.weigh(torch.empty(0))
        loop.backward(micro)


def test_a_weight_of_a_graph_does_not_enter_the_gradient():
    loop = Loop(reduction="mean")
    amount = (loop.weight.sum() + 2).reshape(1)
    loop.run([([1.0, 4.0], 2), ([2.0, 1.0], amount)])
    assert loop.moved == [1.5, 2.5]


def test_means_without_weights_count_alike():
    loop = Loop(reduction="mean")
    loop.run([(gradient, None) for gradient, _ in MICROS])
    assert loop.moved == [3.0, 3.0]


@pytest.mark.parametrize("first", [1, None])
def test_weights_and_none_do_not_mix_in_either_order(first):
    loop = Loop()
    with pytest.raises(gk.WindowError, match="cannot be mixed"):
        loop.run([([1.0, 1.0], first), ([1.0, 1.0], 1 if first is None else None)])
    loop.accumulate.drop()
    loop.run([([1.0, 2.0], 1 if first is None else None)])  # the next window may be weighed the other way
    assert loop.moved == [1.0, 2.0]


def test_means_that_others_run_backward_on_may_count_alike():
    loop = Loop(reduction="mean")
    for micro in loop.accumulate(MICROS):
        with micro:
            micro.weigh(None)
            (loop.weight * torch.tensor(micro.batch[0])).sum().backward()
    loop.optimizer.step()
    assert loop.moved == [3.0, 3.0]


def test_backward_and_weigh_belong_inside_of_their_own_micro_batch():
    loop = Loop()
    micro, other = next(loop.accumulate(MICROS)), next(loop.accumulate(MICROS))
    for act in (lambda: micro.backward(loop.weight.sum(), weight=1), lambda: micro.weigh(1)):
        with pytest.raises(gk.WindowError, match="belong inside"):
            act()
    with other:
        with pytest.raises(gk.WindowError, match="belong inside"):
            micro.backward(loop.weight.sum(), weight=1)
        loop.backward(other)
    assert loop.weight.grad.tolist() == [1.0, 4.0]


def test_a_micro_batch_without_items_runs_no_backward_and_tells_no_loss():
    """Its loss may be NaN, and so may its gradient."""
    loop = Loop(3)
    loop.run([MICROS[0], ([float("nan"), 1.0], 0.0), MICROS[1]])
    assert loop.moved == [1.5, 1.5]
    assert loop.accumulate.loss == 0.0


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "keep"])
def test_an_empty_window_is_skipped_whatever_its_gradients_are(nonfinite):
    """Other code may have run backward on nothing; the policy learns nothing of that."""
    loop = Loop(1, nonfinite=nonfinite, policy=gk.policies.parse("zclip").policy)
    loop.run([([1.0, 4.0], 1)] * 3)
    before, moved = loop.guard.state_dict()["states"], loop.moved
    for entry in (1.0, float("nan")):
        for micro in loop.accumulate([entry]):
            with micro:
                micro.weigh(0)
                (loop.weight.sum() * micro.batch).backward()
            loop.optimizer.step()
        report = loop.guard.report
        assert (report.stepped, report.reason) == (False, "the window's weight is zero")
        assert loop.weight.grad is None
    after = loop.guard.state_dict()
    assert after["step"] == 5
    assert after["consecutive_skips"] == 0
    assert all(torch.equal(value, after["states"]["main"][key]) for key, value in before["main"].items())
    loop.run([([1.0, 4.0], 1)])
    assert loop.guard.report.stepped
    assert loop.moved != moved


# ---- wide sums -----------------------------------------------------------------------------------------------------


def test_gradients_that_are_wider_than_their_sums_would_be_keep_their_dtype():
    loop = Loop(2, dtype=torch.float64, accumulate_dtype=torch.float32)
    loop.run([([1.0, 2.0**-40], 1), ([2.0**-40, 1.0], 1)])
    assert loop.moved == [0.5 + 2.0**-41] * 2


# ---- float16 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [None, 1, 5])
def test_float16_sums_of_many_micro_batches_stay_in_range(amount):
    """64 gradients of 3,072 add up to three times float16's largest number, and are exact in its 11 bits."""
    loop = Loop(64, dtype=torch.float16, nonfinite="raise")
    factor = 1 if amount is None else amount
    loop.run([([3072.0 * factor, 1536.0 * factor], amount)] * 64)
    assert loop.moved == [3072.0, 1536.0]


def test_float16_losses_are_divided_by_the_same_number_throughout_a_window():
    loop = Loop(3, dtype=torch.float16)
    loop.run([([4.0, 8.0], 2), ([508.0, 1016.0], 126)])
    assert loop.moved == [4.0, 8.0]
    loop.run([([2.0, 2.0], 1)])
    assert loop.moved == [6.0, 10.0]


def test_a_first_micro_batch_without_items_chooses_no_divisor():
    """The two others' sum is 98,304 in its first entry, which float16 does not know."""
    loop = Loop(3, dtype=torch.float16, nonfinite="raise")
    loop.run([([1024.0, 1024.0], 0), *[([49152.0, 16384.0], 16)] * 2])
    assert loop.moved == [3072.0, 1024.0]


def test_float16_losses_are_told_as_they_are():
    loop = Loop(2, dtype=torch.float16)
    with torch.no_grad():
        loop.weight.fill_(1.0)
    loop.run([([16.0, 48.0], 16), ([32.0, 32.0], 16)])
    assert loop.guard.report.scalars["loss"] == 4.0


def test_half_precision_under_a_loss_scale_stays_in_range():
    """Autocast's gradients are float16 where the parameters are float32: 40 x 3,000 is too much."""
    loop = Loop(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with next(loop.accumulate([40])) as micro:
        micro.backward((loop.weight.half() * 3000.0).sum() * micro.batch, weight=micro.batch, scaler=scaler)
        assert torch.isfinite(loop.weight.grad).all()
    scaler.step(loop.optimizer)
    assert loop.moved == [3000.0, 3000.0]


@pytest.mark.parametrize("scaled", [False, True])
def test_float32_losses_are_divided_only_under_a_loss_scale(scaled):
    """What others read from ``.grad`` in the window's course is the plain sum."""
    loop = Loop(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if scaled else None
    with next(loop.accumulate(MICROS)) as micro:
        loop.backward(micro, scaler=scaler)
    assert loop.weight.grad.tolist() == ([0.5, 2.0] if scaled else [1.0, 4.0])
