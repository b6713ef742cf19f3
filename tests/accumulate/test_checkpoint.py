"""Checkpoints of an accumulator: everywhere in a window, and what does not fit."""

import copy

import pytest
import torch

import gradkeel as gk

from tests.accumulate.loop import Loop

MICROS = [([1.0, 4.0], 1), ([5.0, 2.0], 3)]  # the window's gradient is [1.5, 1.5]
WIDE = [None, torch.float64]


def resumed(saved, **options):
    loop = Loop(**options)
    loop.accumulate.load_state_dict(saved)
    return loop


def complete(loop):
    """Go through the window's micro-batches and stop before the step."""
    for micro in loop.accumulate(MICROS):
        with micro:
            loop.backward(micro)


@pytest.mark.parametrize("wide", WIDE)
def test_between_the_last_micro_batch_and_the_step(wide):
    killed = Loop(accumulate_dtype=wide)
    with torch.no_grad():
        killed.weight.fill_(1.0)  # so that the losses are not zero
    complete(killed)
    loop = resumed(killed.accumulate.state_dict(), accumulate_dtype=wide)
    for one in (killed, loop):
        one.optimizer.step()
        assert one.guard.report.stepped
        assert one.guard.report.norm == pytest.approx(1.5 * 2**0.5, rel=1e-7)  # float32
        # Policies that look at the loss decide as they would have.
        assert float(one.guard.report.scalars["loss"]) == float(one.accumulate.loss) == 3.0
    assert loop.moved == [1.5, 1.5]
    loop.optimizer.zero_grad()
    loop.run(MICROS)
    assert loop.moved == [3.0, 3.0]


def test_gradients_are_taken_up_into_the_loops_buffer():
    killed, loop, flat = Loop(), Loop(), torch.ones(2)
    killed.leave_open(MICROS[:1])
    loop.weight.grad = flat.view(2)
    loop.accumulate.load_state_dict(killed.accumulate.state_dict())
    assert flat.tolist() == [1.0, 4.0]
    loop.run(MICROS[1:], zero_grad=False)
    assert (loop.moved, flat.tolist()) == ([1.5, 1.5], [1.5, 1.5])


@pytest.mark.parametrize("wide", WIDE)
def test_a_resumed_window_that_is_complete_takes_no_more(wide):
    killed = Loop(accumulate_dtype=wide)
    complete(killed)
    loop = resumed(killed.accumulate.state_dict(), accumulate_dtype=wide)
    with pytest.raises(gk.WindowError, match="after the end of the window"), next(loop.accumulate(MICROS)):
        pass


@pytest.mark.parametrize("wide", WIDE)
def test_inside_a_window(wide):
    killed = Loop(3, accumulate_dtype=wide)
    killed.leave_open(MICROS)
    loop = resumed(killed.accumulate.state_dict(), steps=3, accumulate_dtype=wide)
    with pytest.raises(gk.WindowError, match="after micro-batch 2 of 3"):
        loop.optimizer.step()
    micro = next(loop.accumulate([([4.0, 6.0], 4)]))
    assert micro.index == 2
    with micro:
        loop.backward(micro)
    assert micro.closes_window
    loop.optimizer.step()
    assert loop.moved == [1.25, 1.5]


@pytest.mark.parametrize("wide", WIDE)
def test_a_resumed_window_may_be_finished_or_dropped(wide):
    killed = Loop(3, accumulate_dtype=wide)
    killed.leave_open(MICROS)
    finished, dropped = [
        resumed(killed.accumulate.state_dict(), steps=3, accumulate_dtype=wide) for _ in range(2)
    ]
    finished.accumulate.finish()
    finished.optimizer.step()
    assert finished.moved == [1.5, 1.5]
    dropped.accumulate.drop()
    dropped.run([([2.0, 2.0], 1)])
    assert dropped.moved == [2.0, 2.0]


def test_a_resumed_window_goes_on_in_one_loop_only():
    """The first loop after loading goes on with the window; a second one has left it open."""
    killed = Loop(4)
    killed.leave_open(MICROS)
    loop = resumed(killed.accumulate.state_dict(), steps=4)
    loop.leave_open(MICROS[:1])
    with pytest.raises(gk.WindowError, match="a window is open after micro-batch 3 of 4"):
        loop.accumulate(MICROS)


def test_micro_batches_without_weights_go_on_without_weights():
    killed = Loop(3)
    killed.leave_open([([2.0, 4.0], None)])
    saved = killed.accumulate.state_dict()
    loop = resumed(saved, steps=3)
    loop.run([([4.0, 2.0], None)])
    assert loop.moved == [3.0, 3.0]
    mixed = resumed(saved, steps=3)
    with pytest.raises(gk.WindowError, match="cannot be mixed"):
        mixed.run([([4.0, 2.0], 1)])


def test_float16_losses_are_divided_as_before():
    """The power of two by which losses are divided is chosen by the first weight and stays."""
    killed = Loop(2, dtype=torch.float16)
    killed.leave_open([([3000.0, 3000.0], 1)])
    loop = resumed(killed.accumulate.state_dict(), dtype=torch.float16)
    loop.run([([8000.0, 16000.0], 16)])
    # (3000 + 8000) / 17 and (3000 + 16000) / 17, in float16's 11 bits
    assert loop.moved == pytest.approx([11000 / 17, 19000 / 17], rel=2**-11)


@pytest.mark.parametrize("wide", WIDE)
def test_a_saved_window_is_a_copy(wide):
    """Neither the run that was saved nor one that was resumed changes it."""
    killed = Loop(3, accumulate_dtype=wide)
    for micro in killed.accumulate([*MICROS, ([4.0, 6.0], 4)]):
        with micro:
            killed.backward(micro)
        if micro.index == 1:
            saved = killed.accumulate.state_dict()
            kept = copy.deepcopy(saved)
    killed.optimizer.step()
    for _ in range(2):
        loop = resumed(saved, steps=3, accumulate_dtype=wide)
        loop.run([([4.0, 6.0], 4)])
        assert loop.moved == [1.25, 1.5]
    for part in ("gradients", "sums"):
        assert saved[part].keys() == kept[part].keys()
        assert all(torch.equal(saved[part][name], kept[part][name]) for name in kept[part])


@pytest.mark.parametrize("wide", WIDE)
def test_between_windows_it_holds_no_tensors(wide):
    loop = Loop(accumulate_dtype=wide)
    loop.run(MICROS, zero_grad=False)
    assert loop.weight.grad is not None
    saved = loop.accumulate.state_dict()
    assert saved["gradients"] == saved["sums"] == {}
    assert saved["loss"] is None
    again = resumed(saved, accumulate_dtype=wide)
    again.run(MICROS)
    assert again.moved == [1.5, 1.5]


def test_wide_sums_need_an_accumulator_that_has_them():
    killed = Loop(3, accumulate_dtype=torch.float64)
    killed.leave_open(MICROS)
    saved = killed.accumulate.state_dict()
    assert list(saved["sums"]) == list(killed.guard.names)
    with pytest.raises(gk.errors.CheckpointError, match=r"wide sums.*accumulate_dtype"):
        Loop(3).accumulate.load_state_dict(saved)


def test_a_window_without_wide_sums_goes_on_in_an_accumulator_that_has_them():
    killed = Loop(3)
    killed.leave_open(MICROS)
    loop = resumed(killed.accumulate.state_dict(), steps=3, accumulate_dtype=torch.float64)
    loop.run([([4.0, 6.0], 4)])
    assert loop.moved == [1.25, 1.5]


@pytest.mark.parametrize("part", ["gradients", "sums"])
def test_unknown_parameters_are_named(part):
    saved = Loop(accumulate_dtype=torch.float64).accumulate.state_dict()
    known = Loop().guard.names[0]
    saved[part] = {"encoder.weight": torch.ones(2), known: torch.ones(2), "head.bias": torch.ones(2)}
    loop = Loop(accumulate_dtype=torch.float64)
    with pytest.raises(gk.errors.CheckpointError, match=r"not here: encoder\.weight, head\.bias$"):
        loop.accumulate.load_state_dict(saved)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("version", 0, "version=0, but this Accumulator version=1"),
        ("steps", 4, "steps=4, but this Accumulator steps=2"),
        ("reduction", "mean", "reduction='mean', but this Accumulator reduction='sum'"),
        ("version", None, "version=None"),
    ],
)
def test_another_kind_of_window_is_refused_and_the_open_one_stays(key, value, words):
    saved = Loop().accumulate.state_dict()
    if value is None:
        del saved[key]
    else:
        saved[key] = value
    loop = Loop()
    loop.leave_open([([1.0, 4.0], 1)])
    with pytest.raises(gk.errors.CheckpointError, match=words):
        loop.accumulate.load_state_dict(saved)
    loop.accumulate.finish()
    loop.optimizer.step()
    assert loop.moved == [1.0, 4.0]


def test_loading_discards_the_window_that_was_open():
    loop = Loop(accumulate_dtype=torch.float64)
    loop.leave_open([([100.0, 100.0], 1)])
    loop.accumulate.load_state_dict(Loop().accumulate.state_dict())
    loop.run(MICROS)
    assert loop.moved == [1.5, 1.5]


def test_a_resumed_window_is_watched():
    killed = Loop(3)
    killed.leave_open(MICROS)
    loop = resumed(killed.accumulate.state_dict(), steps=3)
    loop.optimizer.zero_grad()
    with pytest.raises(gk.WindowError, match="cleared in the middle"), next(loop.accumulate(MICROS)):
        pass
