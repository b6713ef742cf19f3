"""On CPU a few cells are decided on in plain numbers; the decisions and states are those of tensors."""

import copy
import dataclasses
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradkeel import policies as gp
from gradkeel.kernels import native
from gradkeel.policies import numbers
from gradkeel.policies.bounds.window import entered, window_of
from policy_rows import ROWS
from streams import log_normal, measured

STEPS = 100


def afresh(policy):
    """A copy, whose formulas are written down when it is first asked."""
    return copy.deepcopy(policy)


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way(request, monkeypatch):
    """Formulas are followed by the native kernels, and where there are none by Python."""
    if request.param == "python":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip(str(native.unavailable()))
    return request.param


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
    policy, norm_type = afresh(policy), policy.needs.norm_type
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


@pytest.mark.parametrize("bad", [[math.nan], [math.nan, 0.0, math.nan], [0.0]])
@pytest.mark.parametrize("seen", [6, 9, 15])
@pytest.mark.parametrize(
    "bound",
    [
        gp.Quantile(0.6, window=6, warmup=2),
        gp.RobustZScore(2.0, window=6, warmup=2),
        gp.ZScore(2.0, window=6, warmup=2),
        gp.ZScore(2.0, window=6, warmup=2, limited=False),
    ],
)
def test_a_ring_that_holds_what_is_no_norm_is_that_of_tensors(bound, seen, bad):
    """NaN is sorted last, and once it has left the ring nothing is left of it."""
    policy = gp.Clip("tensor", bound, gp.Hard())
    norms = log_normal(20, 2, spread=0.5, seed=seen)
    plain = {**policy.init(measured(norms[0])), "seen": torch.tensor([seen, seen])}
    plain["history"] = norms[-6:].T.clone()
    plain["history"][0, 1 : 1 + len(bad)] = torch.tensor(bad, dtype=torch.float64)
    tensors = plain
    for step, own in enumerate(norms, 1):
        now = measured(own, step)
        ours, plain = policy.decide(now, plain)
        with InTensors():
            theirs, tensors = policy.decide(now, tensors)
        for name in ("coefficients", "bound"):
            same(getattr(ours, name), getattr(theirs, name), f"{name} of step {step}")
        for key, value in tensors.items():
            same(plain[key], value, f"{key} after step {step}")


@pytest.mark.parametrize("policy", IMPATIENT)
def test_a_state_in_plain_numbers_is_saved_as_tensors(policy):
    policy, stream = afresh(policy), eventful(2)
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
def test_the_kernels_and_python_take_up_each_others_state(policy, monkeypatch, way):
    """And so does a run that is resumed on a machine without a compiler."""
    if way == "python":
        pytest.skip("the two take turns")
    stream, states, (compiled, plain) = eventful(2), [], (afresh(policy), afresh(policy))
    for step, norms in enumerate(stream[:60], 1):
        now = measured(norms, step, groups=[0, 1], loss=norms[0])
        if step == 1:
            states = [compiled.init(now), compiled.init(now)]
            with monkeypatch.context() as without:
                without.setattr(native, "kernels", lambda: None)
                plain.decide(now, states[0])  # so that its formulas are written down
        _, states[0] = compiled.decide(now, states[0])
        _, states[1] = (compiled if step % 7 < 3 else plain).decide(now, states[1])
    for key, value in states[0].items():
        same(value, states[1][key], key)


@pytest.mark.parametrize("policy", IMPATIENT)
def test_deciding_leaves_the_old_state_as_it_is(policy):
    """A step that is not made is decided on again from the same state."""
    policy, stream = afresh(policy), eventful(2)
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
    policy = afresh(policy)
    now = measured(log_normal(1, cells)[0])
    _, state = policy.decide(now, policy.init(now))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        policy.decide(now, state)
    return sum(event.name.startswith("aten::") and event.cpu_parent is None for event in profile.events())


@pytest.mark.parametrize("policy", [gp.ClipByGlobalNorm(1.0), gp.ZClip(), gp.AutoClip(), gp.RobustClip()])
def test_a_global_decision_on_cpu_reads_the_norm_and_makes_no_tensor(policy):
    assert operations(policy, 100) == 1


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


# ---- one operation at a time ---------------------------------------------------------------------------------------

EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 5e-324, 1e-310, 1.7e308, -1.7e308, 710.0, -800.0]
EDGES += [math.inf, -math.inf, math.nan]


def in_tensor(value):
    return torch.tensor([value], dtype=torch.float64)


def alike(plain, tensor):
    """The same float64, to a rounding of the functions; zeros have their signs."""
    (wanted,) = tensor.tolist()
    if math.isnan(wanted) or math.isnan(plain):
        return math.isnan(wanted) and math.isnan(plain)
    # Two libraries' exponentials and logarithms may differ in the last bit.
    return plain == pytest.approx(wanted, rel=1e-15, abs=0) and math.copysign(1, plain) == math.copysign(
        1, wanted
    )


@pytest.mark.parametrize("value", EDGES)
@pytest.mark.parametrize("function", [numbers.log, numbers.exp, numbers.sqrt])
def test_a_function_of_a_plain_number_is_that_of_a_tensor(function, value):
    assert alike(function(value), function(in_tensor(value)))


@pytest.mark.parametrize("value", [0.0, -1e-300, -1e-12, -0.5, -50.0, -1e300, -math.inf, math.nan])
def test_expm1_of_a_plain_number_is_that_of_a_tensor(value):
    assert alike(numbers.expm1(value), numbers.expm1(in_tensor(value)))


@pytest.mark.parametrize("second", EDGES)
@pytest.mark.parametrize("first", EDGES)
def test_an_operation_on_two_plain_numbers_is_that_on_tensors(first, second):
    one, two = in_tensor(first), in_tensor(second)
    assert alike(numbers.divide(first, second), numbers.divide(one, two))
    if not 0 < abs(second) < 1e-308:  # torch takes the reciprocal first, which is out of range there
        assert alike(numbers.divide(first, second), numbers.divide(first, two))
    for function, wanted in ((numbers.maximum, torch.maximum), (numbers.minimum, torch.minimum)):
        # Which of two zeros is the larger is nobody's concern.
        assert alike(function(first, second) + 0.0, wanted(one, two) + 0.0)
        assert alike(function(first, second) + 0.0, function(one, second) + 0.0)
        assert alike(function(first, second) + 0.0, function(one, two) + 0.0)


def test_what_is_chosen_and_made_of_plain_numbers():
    like = in_tensor(2.0)
    assert numbers.where(True, 1.0, 2.0) == 1.0
    assert numbers.where(False, 1.0, 2.0) == 2.0
    # What a bound of the user's own compares may be NumPy's.
    assert [numbers.where(np.float64(x) > 1, 1.0, 2.0) for x in (3, 0)] == [1.0, 2.0]
    assert [numbers.where(x, 1.0, 2.0) for x in (3, 0)] == [1.0, 2.0]
    assert numbers.where(like > 1, 1.0, 2.0 * like).tolist() == [1.0]
    assert numbers.where(like > 2, 1.0, 2.0 * like).tolist() == [4.0]
    assert isinstance(numbers.real(3, 1.0), float)
    assert numbers.real(3, 1.0) == 3.0
    assert numbers.real(torch.tensor([3]), like).dtype == torch.float64
    assert numbers.real(torch.tensor([3]), like.float()).dtype == torch.float32
    assert numbers.constant(3, 1.0) == 3.0
    assert isinstance(numbers.constant(3, 1.0), float)
    assert torch.equal(numbers.constant(3, like.expand(5)), in_tensor(3.0))


# ---- windows at the edges of their warm-ups ------------------------------------------------------------------------

WINDOWS = [
    # What the bound is after 1, 3 has been seen: a quantile, mean + 2 std, and exp(median + 2 MAD).
    (gp.Quantile(0.5, window=2, warmup=2), 2.0),
    (gp.Quantile(0.25, window=2, warmup=2), 1.5),
    (gp.ZScore(2.0, window=2, warmup=2), 2.0 + 2.0 * 2**0.5),
    (
        gp.RobustZScore(2.0, window=2, warmup=2),
        math.exp(math.log(3) / 2 * (1 + 2 * 1.4826022185056018)),
    ),
]


def bounds_of(bound, norms, in_tensors):
    """The bound at each step on these norms."""
    policy, state, found = gp.Clip("global", bound, gp.Hard()), None, []
    for step, norm in enumerate(norms, 1):
        now = measured([norm], step)
        state = policy.init(now) if state is None else state
        if in_tensors:
            with InTensors():
                decision, state = policy.decide(now, state)
        else:
            decision, state = policy.decide(now, state)
        found.append(decision.bound.item())
    return found


@pytest.mark.parametrize("in_tensors", [False, True], ids=["plain", "tensors"])
@pytest.mark.parametrize(("bound", "expected"), WINDOWS)
def test_a_window_bounds_from_the_step_after_its_warm_up(bound, expected, in_tensors):
    # A few float64 operations.
    close = {"rel": 1e-13}
    found = bounds_of(bound, [1.0, 3.0, 0.5], in_tensors)
    assert found == [math.inf, math.inf, pytest.approx(expected, **close)]
    # The window holds two: what was there before them is forgotten.
    assert bounds_of(bound, [700.0, 1.0, 3.0, 0.5], in_tensors)[2] != pytest.approx(expected, rel=0.1)
    forgotten = bounds_of(
        dataclasses.replace(bound, **UNLIMITED.get(type(bound), {})), [0.01, 1.0, 3.0, 0.5], in_tensors
    )
    assert forgotten[3] == pytest.approx(expected, **close)
    # What is no norm does not count as seen.
    skipped = bounds_of(bound, [1.0, 0.0, math.nan, math.inf, 3.0, 0.5], in_tensors)
    assert skipped == [math.inf] * 5 + [pytest.approx(expected, **close)]


UNLIMITED = {gp.ZScore: {"limited": False}}


@pytest.mark.parametrize("in_tensors", [False, True], ids=["plain", "tensors"])
@pytest.mark.parametrize(
    "make", [lambda: gp.Quantile(0.9, window=4, warmup=1), lambda: gp.RobustZScore(3.0, window=4, warmup=1)]
)
def test_one_norm_is_a_window(make, in_tensors):
    bound = make()
    # The least spread that a logarithm is taken to have is 0.01.
    expected = 5.0 if isinstance(bound, gp.Quantile) else 5.0 * math.exp(0.03)
    assert bounds_of(bound, [5.0, 1.0], in_tensors) == [math.inf, pytest.approx(expected, rel=1e-13)]


@pytest.mark.parametrize("in_tensors", [False, True], ids=["plain", "tensors"])
@pytest.mark.parametrize(("limited", "spread"), [(True, 1e-3), (False, 1e-6)])
def test_equal_norms_are_taken_to_vary_a_little(limited, spread, in_tensors):
    bound = gp.ZScore(6.0, window=4, warmup=3, limited=limited)
    found = bounds_of(bound, [5.0] * 4, in_tensors)
    assert found == [math.inf] * 3 + [pytest.approx(5.0 * (1 + 6 * spread), rel=1e-13)]


@pytest.mark.parametrize("in_tensors", [False, True], ids=["plain", "tensors"])
def test_an_outlier_enters_twice_as_far_out_as_the_bound_from_the_end_of_the_warm_up_on(in_tensors):
    # Norms 1 and 3: mean 2, deviation sqrt 2. A norm of 1000 is z = 2 limited to 2 + 2 * 2 * sqrt 2.
    bound, limit = gp.ZScore(2.0, window=8, warmup=2), 2 + 4 * 2**0.5
    numbers_of = torch.tensor([1.0, 3.0, limit], dtype=torch.float64)
    expected = (numbers_of.mean() + 2 * numbers_of.std()).item()
    assert bounds_of(bound, [1.0, 3.0, 1000.0, 1.0], in_tensors)[3] == pytest.approx(expected, rel=1e-12)
    # In the warm-up it enters as it is.
    numbers_of = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    expected = (numbers_of.mean() + 2 * numbers_of.std()).item()
    assert bounds_of(bound, [1.0, 1000.0, 1.0], in_tensors)[2] == pytest.approx(expected, rel=1e-12)


# ---- formulas of one's own, written down or not --------------------------------------------------------------------


class Falling(gp.Bound, on_numbers=True):
    """Written in operators and the functions of `numbers`: it falls with the steps, from what was first seen."""

    def init(self, cells):
        return {"first": torch.full_like(cells.norms, math.inf)}

    def bound(self, cells, state):
        half = numbers.divide(abs(-state["first"]), 1 + cells.step % 7) + np.float64(0.5)
        return numbers.where(
            (cells.norms < 1e9) & (cells.sizes > 0), half**1.0, 10.0 - numbers.exp(cells.norms * 0.0)
        )

    def update(self, cells, state, bound):
        return {"first": numbers.minimum(state["first"], cells.norms)}


class ByIf(Falling, on_numbers=True):
    """It chooses by ``if``, as nobody may who has many cells at once; the step is one for all."""

    def bound(self, cells, state):
        return 0.5 * cells.norms if cells.step < 3 else 2.0 * cells.norms


class ByTable(Falling, on_numbers=True):
    """It looks the step up, which is no operation."""

    def bound(self, cells, state):
        return {1: 0.25, 2: 0.5}.get(cells.step, 1.0) * cells.norms


class InTorch(Falling, on_numbers=True):
    """It says that it is on numbers and is not."""

    def bound(self, cells, state):
        return torch.minimum(state["first"], 2.0 * cells.norms) * torch.ones_like(cells.norms)


class OutOfRange(Falling, on_numbers=True):
    """Its operators raise of plain numbers and are infinite of tensors: at once, or at some step."""

    def bound(self, cells, state):
        return 1.0 / (cells.norms - 4.0) + (1e200 * cells.norms) ** 2 + cells.step % (cells.norms - 5.0)


class InSum(Falling, on_numbers=True):
    """It goes through the cells, which one number has none of."""

    def bound(self, cells, state):
        return sum(cells.norms) * torch.ones_like(cells.norms)


class InWords(Falling, on_numbers=True):
    """It looks the step up by its words."""

    def bound(self, cells, state):
        return {"1": 0.25, "2": 0.5}.get(str(cells.step), 1.0) * cells.norms


class Modular(Falling, on_numbers=True):
    """It takes a power modulo a number, which is another operation."""

    def bound(self, cells, state):
        return pow(cells.step, 3, 5) * cells.norms


class Drops(Falling, on_numbers=True):
    """Its state has other names from step to step, and a constant in it."""

    def update(self, cells, state, bound):
        return {"first": cells.norms * 0.0 + 3.0}


class Counting(gp.Bound, on_numbers=True):
    """It looks at the bits of a whole number: those of 1, 2, 3, ... and what is left of them."""

    def init(self, cells):
        return {"count": torch.ones_like(cells.norms, dtype=torch.int64)}

    def bound(self, cells, state):
        count = state["count"]
        is_odd, is_second, is_late = (count & 1) == 1, (count | 1) == 3, ~count < -4
        even = numbers.where(is_second, 0.25, numbers.where(is_late, 0.125, 2.0))
        return numbers.where(is_odd, 0.5, even) * cells.norms

    def update(self, cells, state, bound):
        return {"count": state["count"] + 1}


class Flagged(gp.Bound, on_numbers=True):
    """It remembers a truth, and turns it."""

    def init(self, cells):
        return {"is_even": torch.zeros_like(cells.norms, dtype=torch.bool)}

    def bound(self, cells, state):
        return numbers.where(~state["is_even"] & (cells.norms > 0), 0.5 * cells.norms, math.inf)

    def update(self, cells, state, bound):
        return {"is_even": ~state["is_even"]}


class OfThisToo(gp.Bound, on_numbers=True):
    """The mean of the last three norms, with this step's."""

    def init(self, cells):
        ring = cells.norms.new_zeros(cells.norms.shape[0], 3)
        return {"seen": torch.zeros_like(cells.norms, dtype=torch.int64), "history": ring}

    def bound(self, cells, state):
        history = entered(state["history"], state["seen"], cells.norms)
        return window_of(history, state["seen"] + 1).mean()

    def update(self, cells, state, bound):
        return {
            "seen": state["seen"] + 1,
            "history": entered(state["history"], state["seen"], cells.norms),
        }


@pytest.mark.parametrize(
    "bound",
    [
        Falling(),
        Counting(),
        Flagged(),
        OfThisToo(),
        ByIf(),
        ByTable(),
        InTorch(),
        OutOfRange(),
        InSum(),
        InWords(),
        Modular(),
        Drops(),
        gp.Schedule({1: 0.3}.get),
    ],
)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_formula_of_ones_own_is_followed_as_it_would_be_on_tensors(bound, scope):
    policy = gp.Clip(scope, afresh(bound), gp.Hard())
    plain = tensors = None
    for step in range(1, 6 if not isinstance(bound, gp.Schedule) else 2):
        now = measured([3.0 + step, 4.0, math.nan if step == 3 else 1.0], step)
        if plain is None:
            plain, tensors = policy.init(now), policy.init(now)
        ours, plain = policy.decide(now, plain)
        with InTensors():
            theirs, tensors = policy.decide(now, tensors)
        same(ours.coefficients, theirs.coefficients, f"coefficients of step {step}")
        same(ours.bound, theirs.bound, f"bound of step {step}")
        for key, value in tensors.items():
            same(plain[key], value, f"{key} after step {step}")


@pytest.mark.parametrize(
    ("bound", "is_written"),
    [
        (Falling(), True),
        (ByIf(), False),
        (ByTable(), False),
        (InTorch(), False),
        (InSum(), False),
        (InWords(), False),
        (Modular(), False),
    ],
)
def test_what_is_no_operation_on_numbers_is_not_written_down(bound, is_written):
    policy = gp.Clip("global", bound, gp.Hard())
    now = measured([3.0])
    verdicts = policy._written.on(now, "global", policy.init(now))
    assert (verdicts is not None) == is_written


class Single(gp.HostBound, on_numbers=True):
    """Its limits are of single precision."""

    def at(self, step):
        return np.float32(-0.1), np.float32(0.1)


def test_a_limit_of_single_precision_is_divided_in_double_precision():
    decision, _ = gp.Clip("tensor", Single(), gp.Hard()).decide(measured([3.0, 7.0]), {})
    assert decision.coefficients.tolist() == [float(np.float32(0.1)) / 3.0, float(np.float32(0.1)) / 7.0]


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("cells", [1, 3])
def test_a_state_of_other_cells_is_refused(cells, is_plain):
    policy = gp.ZClip(scope="tensor")
    _, state = policy.decide(measured([1.0, 2.0]), policy.init(measured([1.0, 2.0])))
    with pytest.raises(ValueError, match="argument"):
        policy.decide(measured([1.0] * cells, 2), state if is_plain else dict(state))


def test_an_error_of_a_schedule_is_said_at_each_step():
    policy = gp.Clip("global", gp.Schedule(lambda step: 1.0 if step < 3 else -1.0), gp.Hard())
    for step in (1, 2):
        policy.decide(measured([3.0], step), {})
    for step in (3, 4):
        with pytest.raises(ValueError, match=rf"function\({step}\)=-1.0"):
            policy.decide(measured([3.0], step), {})


@pytest.mark.parametrize("policy", [*IMPATIENT, gp.Clip("tensor", Falling(), gp.Hard())])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_policy_that_has_decided_is_copied_and_pickled(policy, copied):
    now = measured([1.0, 2.0], groups=[0, 1], loss=torch.tensor(1.0))
    decision, _ = policy.decide(now, policy.init(now))
    again = copied(policy)
    assert again == policy or isinstance(policy.bound, Falling)
    other, _ = again.decide(now, again.init(now))
    for name in ("coefficients", "unit_coefficients", "bound", "skip"):
        same(getattr(decision, name), getattr(other, name), name)
