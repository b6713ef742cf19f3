"""What stands for a step's number while it is captured."""

import pytest

import gradkeel as gk
from gradkeel.guard.given import Given, Route, Watched
from gradkeel.kernels.graph import UnfitError
from gradkeel.policies.base import is_own


def test_a_captured_step_holds_as_long_as_comparisons_come_out_alike():
    step = Watched(3)
    assert step <= 4
    assert step != 7
    assert step > 1
    assert step.holds(2)
    assert step.holds(4)
    assert not step.holds(5)  # no longer at most 4
    assert not step.holds(1)


def test_nobody_asked_so_it_always_holds():
    assert Watched(1).holds(10**9)


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s + 1,
        lambda s: 2 * s,
        lambda s: f"{s}",
        int,
        float,
        bool,
        lambda s: range(3)[s],
        lambda s: s % 2,
    ],
)
def test_more_than_a_comparison_is_refused(use):
    with pytest.raises(UnfitError):
        use(Watched(1))


def test_which_numbers_a_graph_needs_memory_for():
    plain = Given(1, 1.0, None, None, tolerant=False, route=Route.HOST)
    windowed = Given(1, 0.25, None, None, tolerant=False, route=Route.HOST)
    assert plain.kind() != windowed.kind()
    buffers = windowed.buffers("cpu")
    buffers.send(Given(2, 0.125, None, None, tolerant=False, route=Route.HOST))
    assert float(buffers.prescale) == 0.125
    assert plain.buffers("cpu").prescale == 1.0


def test_policies_of_the_users_are_told_from_our_own():
    class Own(gk.ClipByGlobalNorm):
        pass

    class OwnBound(gk.policies.Constant):
        pass

    assert is_own(gk.policies.ZClip())
    assert is_own(gk.policies.parse("global-norm:1+value:0.1").policy)
    assert is_own(gk.policies.parse("per-group:none/agc").policy)
    assert not is_own(Own(1.0))
    assert not is_own(gk.policies.Clip("global", OwnBound(1.0), gk.policies.Hard()))
    assert not is_own(gk.policies.Clip("global", gk.policies.Schedule(lambda step: 1.0), gk.policies.Hard()))
