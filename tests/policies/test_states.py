import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradkeel.norms import GradientNorms
from gradkeel.policies import AutoClip, Cells, Clip, Hard
from gradkeel.policies.bounds.window import entered, window_of
from gradkeel.policies.bounds.windowed import Windowed
from gradkeel.policies.numbers import minimum
from gradkeel.policies.states import Ring

WINDOW = 5
NORMS = st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf, math.nan])


def in_order(values):
    return torch.tensor(values).sort().values.tolist()


@given(st.lists(st.tuples(st.integers(0, 30), NORMS, st.booleans()), max_size=60))
def test_no_ring_ever_changes_whichever_of_them_is_asked_and_followed(choices):
    """Each choice takes some ring of all that there are, old ones too, enters a norm, and perhaps looks."""
    rings = [(Ring([0.0] * WINDOW), 0, [0.0] * WINDOW)]
    for which, norm, looks in choices:
        ring, seen, values = rings[which % len(rings)]
        number = min(seen, WINDOW)
        if looks:
            assert repr(ring.values) == repr(values)
            assert repr(ring.ordered(number)) == repr(in_order(values[:number]))
        after = ring.entered(seen, norm)
        rings.append((after, seen + 1, [*values[: seen % WINDOW], norm, *values[seen % WINDOW + 1 :]]))
    for ring, seen, values in rings:
        assert repr(ring.ordered(min(seen, WINDOW))) == repr(in_order(values[: min(seen, WINDOW)]))
        assert repr(ring.values) == repr(values)


def test_statistics_that_start_afresh_leave_old_rings_as_they_were():
    first = Ring([0.0] * WINDOW)
    second = first.entered(0, 1.0).entered(1, 2.0).entered(2, 3.0)
    again = second.entered(0, 9.0)
    assert again.ordered(1) == [9.0]
    assert (second.ordered(3), second.values[:3]) == ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert first.values == [0.0] * WINDOW


def test_states_kept_from_earlier_steps_are_what_they_were():
    policy = AutoClip(window=8, warmup=2)
    torch.manual_seed(0)
    drawn = torch.rand(40, dtype=torch.float64)
    norms = [
        GradientNorms(("w",), one.reshape(1), one.item(), 2.0, (0,), i + 1) for i, one in enumerate(drawn)
    ]
    states = [policy.init(norms[0])]
    copies = []
    for one in norms:
        states.append(policy.decide(one, states[-1])[1])
        copies.append({key: value.clone() for key, value in states[-1].items()})
    for i in (0, 17, 5, 39, 5):
        assert all(torch.equal(copies[i][key], states[i + 1][key]) for key in copies[i])
        if i + 1 < len(norms):
            again = policy.decide(norms[i + 1], states[i + 1])[1]
            assert all(torch.equal(copies[i + 1][key], again[key]) for key in again)


@dataclass(frozen=True)
class Backwards(Windowed, on_numbers=True):
    """It looks at the window as it was after it has looked at the one that comes of it."""

    def statistic(self, window):
        return window.quantile(0.5)

    def learn(self, cells, state, bound):
        seen = state["seen"]
        before = window_of(state["history"], seen)
        after = window_of(entered(state["history"], seen, cells.norms), seen + 1)
        norms = after.quantile(0.9) + minimum(before.quantile(0.9), 9.0) - before.mean()
        return {"history": entered(state["history"], seen, norms)}


@dataclass(frozen=True)
class Rooted(Windowed, on_numbers=True):
    """It enters the root of a difference, which Python makes complex and torch NaN where that is below zero."""

    def statistic(self, window):
        return window.mean()

    def learn(self, cells, state, bound):
        return {"history": entered(state["history"], state["seen"], (cells.norms - 0.5) ** 0.5)}


@pytest.mark.parametrize(
    "bound", [Backwards(window=5, warmup=2), Rooted(window=32, warmup=2), Rooted(window=3, warmup=2)]
)
def test_bounds_of_ones_own_give_on_numbers_what_they_give_on_tensors(bound):
    policy, plain, tensors = Clip("tensor", bound, Hard()), None, None
    torch.manual_seed(0)
    for step in range(1, 20):
        drawn = torch.rand(2, dtype=torch.float64)
        measured = GradientNorms(("v", "w"), drawn, drawn.norm(), 2.0, (0, 0), step)
        _, plain = policy.decide(measured, plain or policy.init(measured))
        tensors = policy._verdict(Cells(measured, "tensor"), tensors or policy.init(measured))[2]
        # Numbers are added up in another order: some of the last digits of float64.
        assert torch.allclose(plain["history"], tensors["history"], rtol=1e-12, atol=1e-14, equal_nan=True)
