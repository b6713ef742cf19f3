"""Which formulas the native kernels follow; what comes of them is compared in tests/policies/test_plain_numbers.py."""

import gc
import math
import random

import pytest
import torch

from gradkeel import policies as gp
from gradkeel.kernels import formulas, native
from gradkeel.norms import Lines
from gradkeel.policies.bounds.window import entered, window_of
from gradkeel.policies.states import CompiledState
from streams import measured

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=str(native.unavailable()))


def test_a_formula_is_followed_for_each_cell():
    # (norm + 2) * what all share, and whether that is above 20; what is remembered goes up by 1.
    operations = (("add", 1, 3), ("mul", 0, 5), ("gt", 6, 4), ("add", 2, 7))
    lines = Lines(1, 2, (2.0, 20.0), operations, (6, 7, 8))
    follow = formulas.compiled(lines)
    norms = torch.arange(11.0, dtype=torch.float64)
    before, after = bytearray(8 * 3 * 11), bytearray(8 * 3 * 11)
    found, bounds = follow([3.0], norms, (), after, before)
    expected = ((norms + 2) * 3).tolist()
    assert found == expected
    assert bounds == [float(value > 20) for value in expected]
    assert torch.frombuffer(after, dtype=torch.float64).tolist() == found + bounds + bounds


@pytest.mark.parametrize(
    "lines",
    [
        Lines(1, 1, (), (("call", 0),), (2, 2)),
        Lines(1, 1, (), (("mod", 1, 0),), (2, 2)),
        Lines(1, 1, tuple(map(float, range(300))), (("add", 1, 2),), (2, 2)),
    ],
)
def test_what_the_kernels_do_not_know_is_left_to_python(lines):
    assert formulas.compiled(lines) is None


def test_without_the_kernels_no_formula_is_compiled(monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: None)
    assert formulas.compiled(Lines(1, 1, (), (("add", 0, 1),), (2, 2))) is None


class TwoRings(gp.Bound, on_numbers=True):
    """The mean of the last three norms, or of their doubles."""

    def init(self, cells):
        ring = cells.norms.new_zeros(cells.norms.shape[0], 3)
        return {"seen": torch.zeros_like(cells.norms, dtype=torch.int64), "one": ring, "other": ring}

    def bound(self, cells, state):
        means = [window_of(state[name], state["seen"]).mean() for name in ("one", "other")]
        return 1.0 + means[0] + means[1]

    def update(self, cells, state, bound):
        return {
            "seen": state["seen"] + 1,
            "one": entered(state["one"], state["seen"], cells.norms),
            "other": entered(state["other"], state["seen"], 2.0 * cells.norms),
        }


class OtherRing(TwoRings, on_numbers=True):
    """It looks at one ring, and norms enter another."""

    def bound(self, cells, state):
        return 1.0 + window_of(state["other"], state["seen"]).mean()

    def update(self, cells, state, bound):
        return {**state, "seen": state["seen"] + 1, "one": entered(state["one"], state["seen"], cells.norms)}


class NoEntry(OtherRing, on_numbers=True):
    """It looks at a ring that nothing enters."""

    def update(self, cells, state, bound):
        return {**state, "seen": state["seen"] + 1}


class Table(gp.Bound, on_numbers=True):
    """It keeps two numbers of each cell under one name, and looks at neither."""

    def init(self, cells):
        return {"table": cells.norms.new_ones(cells.norms.shape[0], 2)}

    def bound(self, cells, state):
        return 0.5 * cells.norms


@pytest.mark.parametrize("bound", [TwoRings(), OtherRing(), NoEntry(), Table()])
def test_states_that_no_compiled_formula_takes_are_right_all_the_same(bound):
    policy = gp.Clip("tensor", bound, gp.Hard())
    state, seen = None, []
    for step in range(1, 7):
        norms = [float(step), 2.0 * step]
        now = measured(norms, step)
        decision, state = policy.decide(now, policy.init(now) if state is None else state)
        assert type(state) is not CompiledState
        last = seen[-3:]
        means = [3 * sum(own[i] for own in last) / max(len(last), 1) for i in (0, 1)]
        wanted = {TwoRings: [1.0 + mean for mean in means], Table: [0.5 * own for own in norms]}
        # A sum of three numbers and a division, in another order: a rounding or two of float64.
        assert decision.bound.tolist() == pytest.approx(wanted.get(type(bound), [1.0, 1.0]), rel=1e-15)
        seen.append(norms)


class OneRing(gp.Bound, on_numbers=True):
    """The mean of the last three norms."""

    def init(self, cells):
        ring = cells.norms.new_zeros(cells.norms.shape[0], 3)
        return {"seen": torch.zeros_like(cells.norms, dtype=torch.int64), "history": ring}

    def bound(self, cells, state):
        return window_of(state["history"], state["seen"]).mean()

    def update(self, cells, state, bound):
        history = entered(state["history"], state["seen"], cells.norms)
        return {"seen": state["seen"] + 1, "history": history}


class Finished(OneRing, on_numbers=True):
    """It takes such a state over and leaves it as it is."""

    def bound(self, cells, state):
        return 0.5 * cells.norms

    def update(self, cells, state, bound):
        return {name: 1 * value if name == "seen" else value for name, value in state.items()}


def test_a_formula_without_a_ring_takes_over_a_state_with_one():
    learning, finished = (gp.Clip("tensor", bound, gp.Hard()) for bound in (OneRing(), Finished()))
    now = measured([1.0, 2.0])
    _, state = learning.decide(now, learning.init(now))
    assert type(state) is CompiledState
    decision, after = finished.decide(measured([3.0, 4.0], 2), state)
    assert decision.bound.tolist() == [1.5, 2.0]
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_states_whose_rings_later_states_share_stay_as_they_were():
    """Whichever is read or followed, in whatever order: each is as it was when it was made."""
    policy = gp.AutoClip(scope="tensor", window=5, warmup=2)
    choose = random.Random(3)
    now = measured([1.0, 2.0, 3.0])
    held = [policy.init(now)]
    copies = [{key: value.clone() for key, value in held[0].items()}]
    for step in range(1, 120):
        # Mostly the last, as in training; or one from before, as after a skipped step or a closure.
        place = len(held) - 1 if choose.random() < 0.6 else choose.randrange(len(held))
        norms = [choose.choice([choose.random(), 7.0, math.nan, math.inf, 0.0]) for _ in range(3)]
        now = measured(norms, step)
        decision, after = policy.decide(now, held[place])
        expected, fresh = policy.decide(now, copies[place])
        assert type(after) is CompiledState
        assert decision.bound.tolist() == expected.bound.tolist()
        copies.append({key: value.clone() for key, value in fresh.items()})
        held.append(after)
        for state, copy in choose.sample(list(zip(held, copies, strict=True)), min(4, len(held))):
            assert all(torch.equal(state[key], copy[key]) for key in copy)
    assert all(
        torch.equal(one[key], copy[key]) for one, copy in zip(held, copies, strict=True) for key in copy
    )


def test_an_old_state_holds_no_more_later_ones_than_its_rings_are_long():
    """It can be taken back from these, and memory does not grow for as long as somebody holds it."""
    policy = gp.AutoClip(scope="tensor", window=5, warmup=2)
    _, state = policy.decide(measured([1.0, 2.0, 3.0]), policy.init(measured([1.0, 2.0, 3.0])))
    old, copy = state, {key: value.clone() for key, value in state.items()}
    there = sum(type(one) is CompiledState for one in gc.get_objects())
    for step in range(2, 100):
        _, state = policy.decide(measured([float(step)] * 3, step), state)
    assert type(state) is CompiledState
    assert sum(type(one) is CompiledState for one in gc.get_objects()) <= there + 2 * 5
    assert all(torch.equal(old[key], copy[key]) for key in copy)


def test_an_interrupt_leaves_a_ring_as_it_was(monkeypatch):
    policy = gp.AutoClip(window=4, warmup=2)
    state = policy.init(measured([1.0]))
    for step in range(1, 9):
        _, state = policy.decide(measured([float(step)], step), state)
    before = {key: value.clone() for key, value in state.items()}
    own = formulas.Followed.__call__
    for enters in (False, True):  # Ctrl-C before the kernels' call, and after it

        def interrupted(self, *given, enters=enters):
            if enters:
                own(self, *given)
            raise KeyboardInterrupt

        monkeypatch.setattr(formulas.Followed, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.decide(measured([99.0], 9), state)
        monkeypatch.undo()
        assert all(torch.equal(state[key], before[key]) for key in before)
    decision, _ = policy.decide(measured([9.0], 9), state)
    expected, _ = policy.decide(measured([9.0], 9), before)
    assert torch.equal(decision.bound, expected.bound)


@pytest.mark.parametrize("cells", [1, 7, 8, 9, 500])
@pytest.mark.parametrize(
    "policy",
    [gp.ZClip(scope="tensor", warmup=3), gp.AutoClip(scope="tensor", window=4, warmup=3), gp.ClipByNorm(1.5)],
)
def test_cells_of_any_number_are_those_of_tensors(policy, cells):
    """Cells go through the lines in groups of eight; Python takes no more than 64."""
    generator = torch.Generator().manual_seed(cells)
    ours = theirs = None
    for step in range(1, 9):
        norms = torch.rand(cells, generator=generator, dtype=torch.float64) + 0.5
        norms[step % cells] = (math.nan, 0.0, math.inf, 1e3)[step % 4]
        now = measured(norms, step)
        if ours is None:
            ours, theirs = policy.init(now), policy.init(now)
        decision, ours = policy.decide(now, ours)
        expected, _, theirs = policy._parts._verdict(gp.Cells(now, "tensor"), theirs)
        # Exponentials and logarithms of two libraries differ in the last bit, which each step hands on.
        assert torch.allclose(decision.coefficients, expected, rtol=1e-12, atol=0)
        for key, value in theirs.items():
            assert torch.allclose(ours[key].double(), value.double(), rtol=1e-12, atol=0, equal_nan=True), key
