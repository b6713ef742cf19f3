"""On CPU a few cells are decided on in plain numbers; the decisions and states are those of tensors."""

import io
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradkeel import policies as gp
from policy_rows import ROWS
from streams import log_normal, measured

STEPS = 100


class InTensors(TorchDispatchMode):
    """Looks at every operation and changes none; while somebody looks, values stay in tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def eventful(cells):
    """[steps, cells] norms with spikes, lasting shifts that patience runs out on, extremes, and what is no norm."""
    stream = log_normal(STEPS, cells, spread=0.5, seed=cells)
    stream[25:] *= 100  # after the warm-ups; patience (12 below) runs out
    stream[50] = 1e-120
    stream[52] *= 1e6
    stream[55:57] = 1e120
    stream[60] = 0.0
    stream[61, 0] = math.inf
    stream[62, -1] = math.nan
    stream[65:] *= 1e-3
    stream[80:85] = stream[79]  # a spread of nothing
    return stream


IMPATIENT = [
    gp.ZClip(warmup=5, patience=12, scope="tensor"),
    gp.AutoClip(window=20, warmup=5, patience=12, scope="tensor"),
    gp.RobustClip(window=20, warmup=5, patience=12, scope="tensor"),
    gp.Clip("tensor", gp.ZScore(2.0, window=20, warmup=5, patience=12), gp.Rescale()),
    gp.Clip("tensor", gp.ZScore(2.0, window=20, warmup=5, limited=False), gp.Smooth()),
    gp.Clip("group", gp.Ema(1.5, warmup=5, patience=12), gp.Smooth()),
    gp.AdaGC(warmup=10, patience=12),
    gp.AdaGC(warmup=10, reference=True),
    gp.ZClip(warmup=10, reference=True, scope="unit"),
    gp.QuantileClip(scope="unit"),
    gp.SkipStep(window=20, warmup=5),
    gp.Chain(gp.ZClip(warmup=5, patience=12), gp.AutoClip(window=20, warmup=5, patience=12)),
    gp.PerGroup(gp.ZClip(warmup=5, patience=12), gp.RobustClip(window=20, warmup=5, patience=12)),
]


def same(one, other, what):
    if one is None or other is None:
        assert one is other, what
        return
    assert (one.dtype, one.shape) == (other.dtype, other.shape), what
    # Both are float64. Sums, logarithms and exponentials of the two differ in the last bit or two of 1e-16, and each
    # step hands that on; logarithms of 1e120 are of 276, whose exponential magnifies roundings as much.
    assert torch.allclose(one, other, rtol=1e-11, atol=0, equal_nan=True), f"{what}: {one} is not {other}"


@pytest.mark.parametrize(
    ("policy", "cells"),
    [pytest.param(row.policy, 3, id=row.id) for row in ROWS]
    + [(policy, cells) for policy in IMPATIENT for cells in (1, 2, 9)],
)
def test_decisions_and_states_are_those_of_tensors(policy, cells):
    norm_type = policy.needs.norm_type
    plain = tensors = None
    for step, norms in enumerate(eventful(cells), 1):
        groups = [i % 2 for i in range(cells)]
        now = measured(norms, step, groups=groups, loss=norms[0] - 1.0, norm_type=norm_type)
        if plain is None:
            plain, tensors = policy.init(now), policy.init(now)
        ours, plain = policy.decide(now, plain)
        with InTensors():
            theirs, tensors = policy.decide(now, tensors)
        assert ours.clamp == theirs.clamp
        for name in ("coefficients", "unit_coefficients", "bound"):
            same(getattr(ours, name), getattr(theirs, name), f"{name} of step {step}")
        assert (ours.skip is None) == (theirs.skip is None)
        assert ours.skip is None or torch.equal(ours.skip, theirs.skip), f"skip of step {step}"
        assert plain.keys() == tensors.keys()
        for key, value in tensors.items():
            same(plain[key], value, f"{key} after step {step}")
        if step % 40 == 0:  # either way of deciding takes up the other's state
            plain, tensors = tensors, plain


@pytest.mark.parametrize("policy", IMPATIENT)
def test_a_state_in_plain_numbers_is_saved_as_tensors(policy):
    stream = eventful(2)
    state = policy.init(measured(stream[0], groups=[0, 1]))
    for step, norms in enumerate(stream[:60], 1):
        _, state = policy.decide(measured(norms, step, groups=[0, 1], loss=norms[0]), state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("policy", IMPATIENT)
def test_deciding_leaves_the_old_state_as_it_is(policy):
    """A step that is not made is decided on again from the same state."""
    stream = eventful(2)
    state = policy.init(measured(stream[0], groups=[0, 1]))
    for step, norms in enumerate(stream[:60], 1):
        now = measured(norms, step, groups=[0, 1], loss=norms[0])
        before = dict(state)
        _, first = policy.decide(now, state)
        assert all(torch.equal(state[key], value) for key, value in before.items())
        _, again = policy.decide(now, state)
        assert all(torch.equal(again[key], value) for key, value in first.items())
        state = first


def operations(policy, cells):
    """How many operations on tensors a decision takes."""
    now = measured(log_normal(1, cells)[0])
    _, state = policy.decide(now, policy.init(now))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        policy.decide(now, state)
    return sum(event.name.startswith("aten::") and event.cpu_parent is None for event in profile.events())


@pytest.mark.parametrize("policy", [gp.ClipByGlobalNorm(1.0), gp.ZClip(), gp.AutoClip(), gp.RobustClip()])
def test_a_global_decision_on_cpu_reads_the_norm_and_makes_two_tensors(policy):
    assert operations(policy, 100) == 3


class HalfOfLast(gp.Bound):
    """A bound of the user's own, written in torch's functions."""

    def init(self, cells):
        return {"last": torch.full_like(cells.norms, math.inf)}

    def bound(self, cells, state):
        return torch.minimum(state["last"], torch.full_like(cells.norms, 100.0)) / 2

    def update(self, cells, state, bound):
        return {"last": torch.where(cells.valid, cells.norms, state["last"])}


class OfEma(gp.Ema):
    """An override in torch's functions of a formula that was on plain numbers."""

    def estimate(self, cells, state):
        return 3 * torch.exp(state["log_mean"])


@pytest.mark.parametrize(("bound", "expected"), [(HalfOfLast(), [50.0, 1.0]), (OfEma(2.0), [math.inf, 6.0])])
def test_a_bound_written_on_tensors_sees_tensors(bound, expected):
    policy, state, bounds = gp.Clip("global", bound, gp.Hard()), None, []
    for step in (1, 2):
        now = measured([2.0], step)
        decision, state = policy.decide(now, policy.init(now) if state is None else state)
        bounds.append(decision.bound.item())
    assert bounds == pytest.approx(expected, rel=1e-12)  # a logarithm and its exponential
