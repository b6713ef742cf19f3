"""Whether a step may be made, where the host knows and where only the device does; and whose state it leaves."""

import math
from types import SimpleNamespace

import pytest
import torch

from gradkeel.guard.step import committed, judge
from gradkeel.norms import Decision


def number(value, device="cpu"):
    return torch.tensor(value, device=device)


def report(total=1.0, *, skip=None, device="cpu", names=("w",)):
    total = number(total, device)
    measured = SimpleNamespace(names=names, total=total, known_total=total)
    return SimpleNamespace(
        measured=measured, decision=Decision(skip=None if skip is None else number(skip, device))
    )


def window(is_empty):
    return SimpleNamespace(is_empty=lambda: is_empty)


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize(
    ("reports", "found_inf", "is_empty", "finite", "assents"),
    [
        ([report()], None, False, True, True),
        ([report(0.0)], None, False, True, True),
        ([report(math.inf)], None, False, False, True),
        ([report(math.nan)], None, False, False, True),
        ([report(), report(math.nan)], None, False, False, True),
        ([report(), report(math.nan, names=())], None, False, True, True),  # nothing was measured
        ([report()], number(0.0), False, True, True),
        ([report()], number(1.0), False, False, True),
        ([report(skip=False)], None, False, True, True),
        ([report(skip=True)], None, False, True, False),
        ([report(skip=False), report(skip=True)], None, False, True, False),
        ([report()], None, True, True, False),
        ([report()], None, number(True), True, False),
        ([report()], None, number(False), True, True),
        ([], None, False, True, True),
    ],
)
def test_the_host_knows_of_what_is_on_cpu(reports, found_inf, is_empty, finite, assents, tolerant):
    found = judge(reports, found_inf, window(is_empty), tolerant=tolerant)
    assert found == (finite, assents and (finite or tolerant))
    assert all(isinstance(flag, bool) for flag in found)


@pytest.mark.parametrize("totals", [(1.0, math.inf), (math.inf, 1.0), (1.0, 1.0)])
def test_one_bad_selection_is_enough_where_only_the_device_knows(monkeypatch, totals):
    monkeypatch.setattr("gradkeel.guard.step.known", lambda value: value)  # the host may not look
    finite, may_step = judge([report(total) for total in totals], None, None, tolerant=False)
    assert isinstance(finite, torch.Tensor)
    assert finite.item() == may_step.item() == (totals == (1.0, 1.0))


def is_pending(flag):
    return (
        isinstance(flag, torch.Tensor)
        and flag.dtype == torch.bool
        and flag.device.type == "meta"
        and not flag.dim()
    )


# A tensor on the device "meta" has no value: whoever asks for one is told so.
@pytest.mark.parametrize("tolerant", [False, True])
def test_the_device_alone_knows_of_what_is_on_it(tolerant):
    there = report(device="meta")
    for reports, found_inf in (
        ([there], None),
        ([there, there], None),
        ([report(), there], number(0.0, "meta")),
    ):
        finite, may = judge(reports, found_inf, None, tolerant=tolerant)
        assert is_pending(finite)
        assert may is True if tolerant else is_pending(may)
    finite, may = judge([report(skip=True, device="meta"), there], None, window(False), tolerant=tolerant)
    assert is_pending(finite)
    assert is_pending(may)


def test_the_host_waits_for_no_device_where_it_knows_enough():
    there = report(device="meta")
    assert judge([there, report(math.nan)], None, None, tolerant=False) == (False, False)
    finite, may = judge([there], None, window(True), tolerant=False)
    assert is_pending(finite)
    assert may is False
    assert judge([report(skip=True), there], None, None, tolerant=True)[1] is False


class Policy:
    def init(self, measured):
        return {"seen": torch.zeros(1)}


def states(commit, old, names=("w",)):
    parts = [
        SimpleNamespace(label=label, policy=policy, is_own=True)
        for label, policy in (("main", Policy()), ("excluded", None))
    ]
    after = [{"seen": torch.ones(1)}, {}]
    found = committed(parts, [report(names=names), report()], after, old, commit)
    return {label: state["seen"].item() for label, state in found.items()}


@pytest.mark.parametrize(
    "old", [{}, {"main": {"seen": torch.full((1,), 5.0)}}, {"other": {"seen": torch.ones(1)}}]
)
def test_only_a_step_that_counts_leaves_a_state(old):
    kept = {label: state["seen"].item() for label, state in old.items()}
    assert states(True, old) == {**kept, "main": 1}
    assert states(False, old) == kept
    assert states(number(True), old) == {**kept, "main": 1}
    assert states(number(False), old) == {
        "main": 0,
        **kept,
    }  # what a device may not choose is kept as it began
    assert states(True, old, names=()) == kept  # a policy without parameters
