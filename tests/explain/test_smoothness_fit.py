"""(L0, L1) from measurements, what follows from it, and when nothing does."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkeel as gk
from gradkeel.smoothness import fit_smoothness, theorem_3

constants = st.floats(-3, 3).map(lambda exponent: 10**exponent)


def scattered(l0, l1, *, count=100, scatter=0.3, seed=0, span=2.0):
    """Norms over ``span`` decades, and smoothness that scatters log-normally around ``l0 + l1 * norm``."""
    generator = torch.Generator().manual_seed(seed)
    norms = 10 ** (span * torch.rand(count, dtype=torch.float64, generator=generator) - 1)
    noise = torch.exp(scatter * torch.randn(count, dtype=torch.float64, generator=generator))
    return norms.tolist(), ((l0 + l1 * norms) * noise).tolist()


@settings(max_examples=20)
@given(st.floats(0.05, 5), constants)
def test_constants_are_recovered_without_scatter(ratio, l1):
    # L0 / L1 within the range of the norms, where the pairs can show both.
    norms, smoothness = scattered(ratio * l1, l1, scatter=0.0)
    fit = fit_smoothness(norms, smoothness)
    # The last of four grids is 33^3 times finer than the 14 + 4.6 units of log ratio that the first one spans.
    assert pytest.approx(ratio * l1, rel=1e-3) == fit.L0
    assert pytest.approx(l1, rel=1e-3) == fit.L1
    assert fit.envelope == pytest.approx((fit.L0, fit.L1), rel=1e-3)
    assert fit.related


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_intervals_and_envelope_hold(seed):
    norms, smoothness = scattered(1.0, 2.0, seed=seed)
    fit = fit_smoothness(norms, smoothness)
    assert fit.related
    assert pytest.approx(2.0, rel=0.3) == fit.L1  # 100 points with a scatter of 30%
    low, high = fit.L1_interval
    assert low <= fit.L1 <= high
    l0, l1 = fit.envelope
    assert all(value <= (l0 + l1 * norm) * (1 + 1e-12) for norm, value in zip(norms, smoothness, strict=True))
    # ... and it is the smallest such multiple.
    assert any(value > 0.999 * (l0 + l1 * norm) for norm, value in zip(norms, smoothness, strict=True))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(100):
        low, high = fit_smoothness(*scattered(0.5, 2.0, seed=seed)).L1_interval
        held += low <= 2.0 <= high
    # Nominal 90 of 100; blocks of neighbours make intervals of independent points somewhat narrow.
    assert 80 <= held <= 99


@settings(max_examples=20)
@given(constants, st.integers(0, 1000))
def test_the_bound_is_where_the_condition_is_met(l1, seed):
    fit = fit_smoothness(*scattered(l1, l1, seed=seed))
    for share in (0.01, 0.5, 0.99):
        lr = share / fit.envelope[0]
        bound = fit.safe_bound(lr)
        assert lr * (fit.envelope[0] + fit.envelope[1] * bound) == pytest.approx(1, rel=1e-9)
        assert lr * bound < fit.max_step
    assert fit.safe_bound(1.01 / fit.envelope[0]) is None


def test_halving_the_learning_rate_doubles_the_bound_where_l0_is_small():
    fit = fit_smoothness(*scattered(0.0, 2.0))
    assert fit.L0 == 0
    assert fit.safe_bound(0.05) == pytest.approx(2 * fit.safe_bound(0.1), rel=1e-9)
    assert 0.05 * fit.safe_bound(0.05) == pytest.approx(fit.max_step, rel=1e-9)


def falling(count=60):
    norms, _ = scattered(1, 1, count=count)
    return norms, [1 / norm for norm in norms]


def unrelated(count=60):
    norms, _ = scattered(1, 1, count=count)
    _, smoothness = scattered(1, 1e-6, count=count, seed=2)
    return norms, smoothness


def steep(count=60):
    norms, _ = scattered(1, 1, count=count)
    return norms, [norm**3 for norm in norms]


def flat(count=60):
    return [2.0] * count, [3.0] * count


def few():
    return scattered(1, 1, count=19)


def hardly_any():
    return [1.0, 2.0], [1.0, 2.0]


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (falling, "smoothness falls while the gradient norm rises"),
        (unrelated, "the gradient norm says little about smoothness"),
        (steep, r"to the power 3\.00, not 1"),
        (flat, "did not vary"),
        (few, "19 measurements; at least 20 are needed"),
        (hardly_any, "2 measurements; at least 20 are needed"),
    ],
)
def test_where_there_is_no_relation_there_is_a_reason_and_no_bound(pairs, reason):
    fit = fit_smoothness(*pairs())
    assert not fit.related
    assert fit.reason.startswith("no (L0, L1) relation")
    assert re.search(reason, fit.reason)
    assert fit.safe_bound(0.1) is None
    assert fit.max_step is None


def test_the_same_pairs_give_the_same_fit_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    assert fit_smoothness(*scattered(1, 2)) == fit_smoothness(*scattered(1, 2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("norms", "smoothness", "message"),
    [
        ([1.0, 2.0], [1.0], "norms and smoothness must have as many values, not 2 and 1"),
        ([1.0, 0.0], [1.0, 1.0], r"norms\[1\]=0.0\): must be a positive number"),
        ([1.0, 1.0], [math.nan, 1.0], r"smoothness\[0\]=nan\)"),
        ([math.inf, 1.0], [1.0, 1.0], r"norms\[0\]=inf\)"),
    ],
)
def test_wrong_pairs_are_named(norms, smoothness, message):
    with pytest.raises(ValueError, match=message):
        fit_smoothness(norms, smoothness)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf])
def test_a_learning_rate_must_be_positive(lr):
    with pytest.raises(ValueError, match="lr must be a positive number"):
        fit_smoothness(*scattered(1, 2)).safe_bound(lr)


@given(constants, constants)
def test_theorem_3_meets_the_condition_for_monotone_descent(l0, l1):
    lr, policy = theorem_3(l0, l1)
    assert lr == pytest.approx(0.1 / l0)
    # lr (L0 + L1 c) with c = min(1/lr, 1/(10 L1 lr)): at most 0.1 + 0.1.
    assert lr * (l0 + l1 * policy.max_norm) <= 0.2 * (1 + 1e-12)
    assert lr * policy.max_norm <= 1 + 1e-12


def test_theorem_3_names_what_is_wrong():
    with pytest.raises(ValueError, match="L1=0\\): L1 must be a positive number"):
        theorem_3(1.0, 0)


# ||H(x)|| <= L0 + L1 ||g(x)|| for 2 s cosh(l x) / l^2: L0 = 2 s, L1 = l; for a |x|_4^4: L1 free, L0 = 16 a / L1^2.
def cosh(scale, rate):
    return (lambda x: (2 * scale * torch.cosh(rate * x) / rate**2).sum()), 2 * scale, rate, 1


def quartic(scale, rate):
    return (lambda x: scale * (x**4).sum()), 16 * scale / rate**2, rate, 3


@given(
    st.sampled_from([cosh, quartic]),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.floats(0.1, 5),
    st.floats(-3, 3).map(lambda exponent: 10**exponent),
    st.floats(0.1, 1),
    st.sampled_from(["clip", "step"]),
)
def test_descent_is_monotone_where_the_condition_holds(make, scale, rate, start, odds, share, kind):
    """``f_k - f_{k+1} >= (3 - e) h_k ||g_k||^2`` for clipped steps with lr (L0 + L1 c) <= 1, and SmoothnessStep's."""
    loss, l0, l1, size = make(scale, rate)
    x = nn.Parameter(torch.linspace(1, 0.3, size, dtype=torch.float64) * start / rate)
    bound = odds * l0 / l1
    if kind == "clip":
        lr, policy = share / (l0 + l1 * bound), gk.ClipByGlobalNorm(bound)
    else:
        lr, policy = share, gk.policies.SmoothnessStep(l0, l1)
    optimizer = torch.optim.SGD([x], lr=lr)
    guard = gk.attach(optimizer, policy)
    for _ in range(15):
        optimizer.zero_grad()
        before = loss(x)
        before.backward()
        optimizer.step()
        after = loss(x).item()
        promised = (3 - math.e) * lr * guard.report.coefficient * guard.report.norm**2
        # The difference of two float64 values is known to their rounding only.
        assert before.item() - after >= promised - 1e-14 * (abs(before.item()) + abs(after))
    guard.detach()
