import gc
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradkeel.norms import GradientNorms
from gradkeel.policies import AutoClip
from gradkeel.policies.states import Ring

WINDOW = 5
NORMS = st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf, math.nan])


@given(st.lists(st.tuples(st.integers(0, 30), NORMS, st.booleans()), max_size=60))
def test_no_ring_ever_changes_whichever_of_them_is_asked_and_followed(choices):
    """Each choice takes some ring of all that there are, old ones too, enters a norm, and perhaps looks."""
    rings = [(Ring([0.0] * WINDOW), 0, [0.0] * WINDOW)]
    for which, norm, looks in choices:
        ring, seen, values = rings[which % len(rings)]
        number = min(seen, WINDOW)
        if looks:
            assert ring.values == values
            assert ring.ordered(number) == sorted(values[:number])
        after = ring.entered(seen, norm)
        if not math.isfinite(norm):  # what no bound keeps
            assert repr(after.values) == repr([*values[: seen % WINDOW], norm, *values[seen % WINDOW + 1 :]])
            continue
        rings.append((after, seen + 1, [*values[: seen % WINDOW], norm, *values[seen % WINDOW + 1 :]]))
    for ring, seen, values in rings:
        assert ring.ordered(min(seen, WINDOW)) == sorted(values[: min(seen, WINDOW)])
        assert ring.values == values


def test_statistics_that_start_afresh_leave_old_rings_as_they_were():
    first = Ring([0.0] * WINDOW)
    second = first.entered(0, 1.0).entered(1, 2.0).entered(2, 3.0)
    again = second.entered(0, 9.0)
    assert again.ordered(1) == [9.0]
    assert (second.ordered(3), second.values[:3]) == ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert first.values == [0.0] * WINDOW


def test_who_keeps_an_old_ring_keeps_no_more_than_a_round_of_later_ones():
    ring, rings = Ring([0.0] * WINDOW), []
    for seen in range(20 * WINDOW):
        ring = ring.entered(seen, float(seen))
        assert ring.ordered(min(seen + 1, WINDOW))
        rings.append(ring)
    old = rings[WINDOW + 2]
    rings.clear()
    gc.collect()
    assert sum(type(one) is Ring for one in gc.get_objects()) <= WINDOW + 1
    assert old.values == [5.0, 6.0, 7.0, 3.0, 4.0]


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
