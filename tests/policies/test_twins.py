"""Each bound and recipe against its slow twin, and the fixtures that were seen in the published packages."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from gradkeel import policies as gp
from streams import bounds, log_normal, measured, play

# Both sides are float64 and take a few hundred roundings of 1e-16; logarithms and exponentials of up to 50 add
# their magnitude.
CLOSE = {"rel": 1e-11}

norms_lists = st.lists(st.floats(1e-12, 1e12), min_size=3, max_size=40)


@given(norms_lists, st.floats(0.05, 0.95), st.integers(2, 12), st.integers(1, 12))
def test_quantile(norms, q, window, warmup):
    warmup = min(warmup, window)
    policy = gp.AutoClip(q, window=window, warmup=warmup, patience=None)
    expected = reference.windowed_bounds(
        norms, window, warmup, lambda past: reference.linear_quantile(past, q)
    )
    assert bounds(policy, norms).flatten().tolist() == pytest.approx(expected, **CLOSE)


def test_quantile_of_a_full_window_is_torchs():
    history = log_normal(50, 1).flatten()
    bound = bounds(gp.AutoClip(0.9, window=50, warmup=1), [*history, 1.0])[-1]
    assert bound.item() == pytest.approx(torch.quantile(history, 0.9).item(), **CLOSE)


@given(norms_lists, st.floats(0.5, 8), st.integers(2, 12))
def test_windowed_z_score(norms, z, window):
    bound = gp.ZScore(z, window=window, warmup=2, patience=None, limited=False)
    expected = reference.windowed_bounds(norms, window, 2, reference.mean_plus(z))
    # The one deviation: a spread below a millionth of the mean counts as that much, which widens the bound by 8e-6.
    assert bounds(gp.Clip("global", bound, gp.Hard()), norms).flatten().tolist() == pytest.approx(
        expected, rel=1e-5
    )


@given(norms_lists, st.floats(0.5, 8), st.integers(2, 12))
def test_windowed_z_score_with_limited_outliers(norms, z, window):
    bound = gp.ZScore(z, window=window, warmup=2, patience=None)
    expected = reference.limited_window_bounds(norms, z, window, 2)
    assert bounds(gp.Clip("global", bound, gp.Hard()), norms).flatten().tolist() == pytest.approx(
        expected, rel=1e-9
    )


@given(norms_lists, st.floats(0.5, 8), st.integers(2, 12))
def test_robust_z_score(norms, z, window):
    policy = gp.RobustClip(z, window=window, warmup=2, patience=None)
    expected = reference.windowed_bounds(norms, window, 2, reference.robust_plus(z))
    assert bounds(policy, norms).flatten().tolist() == pytest.approx(expected, rel=1e-9)


@given(norms_lists, st.floats(0.05, 0.95), st.floats(0.01, 1), st.none() | st.floats(1e-3, 1e3))
def test_geometric_quantile(norms, q, eta, initial):
    expected = reference.geometric_quantile_bounds(norms, q, eta, initial)
    policy = gp.QuantileClip(q, eta=eta, initial=initial)
    assert bounds(policy, norms).flatten().tolist() == pytest.approx(expected, **CLOSE)


@given(norms_lists, st.floats(0.5, 0.99))
def test_running_z_score(norms, decay):
    policy = gp.ZClip(decay=decay, warmup=2, patience=None)
    expected = reference.running_z_bounds(norms, decay=decay, warmup=2)
    # Roundings of squares of logarithms, magnified where the spread is small; and of the integral.
    assert bounds(policy, norms).flatten().tolist() == pytest.approx(expected, rel=1e-7)


@given(norms_lists, st.floats(0.5, 0.99), st.floats(0.5, 4))
def test_ema(norms, decay, ratio):
    policy = gp.Clip("global", gp.Ema(ratio, decay=decay, patience=None), gp.Hard())
    expected = reference.ema_bounds(norms, ratio, decay)
    assert bounds(policy, norms).flatten().tolist() == pytest.approx(expected, **CLOSE)


def clipped(policy, stream):
    """[steps, n] norms after clipping."""
    decisions, state = play(policy, stream)
    rows = [torch.as_tensor(n).double() * d.coefficients for n, d in zip(stream, decisions, strict=True)]
    return torch.stack([row.reshape(-1) for row in rows]), state


def test_zclip_fixture():
    norms, state = clipped(gp.ZClip(warmup=5, reference=True), [1.0, 1.1, 0.9, 1.05, 0.95, 10.0])
    # Seen in the published package, to the digits given there.
    assert norms[-1].item() == pytest.approx(1.003472, abs=5e-7)
    assert state["mean"].item() == pytest.approx(1.000104, abs=5e-7)
    assert state["variance"].item() == pytest.approx(0.00485034, abs=5e-9)


@given(st.integers(0, 2**31), st.floats(0.05, 1.5))
def test_published_zclip(seed, spread):
    stream = log_normal(60, 1, spread=spread, seed=seed)
    norms, state = clipped(gp.ZClip(warmup=10, reference=True), stream)
    expected, mean, variance = reference.zclip(stream.flatten().tolist(), warmup=10)
    assert norms.flatten().tolist() == pytest.approx(expected, rel=1e-9)
    assert (state["mean"].item(), state["variance"].item()) == pytest.approx((mean, variance), rel=1e-9)


@given(st.integers(0, 2**31), st.floats(0.05, 1.5))
def test_published_adagc(seed, spread):
    stream = log_normal(60, 3, spread=spread, seed=seed)
    norms, state = clipped(gp.AdaGC(warmup=20, reference=True), stream)
    expected, gamma = reference.adagc(stream.tolist(), warmup=20)
    torch.testing.assert_close(norms, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert state["gamma"].tolist() == pytest.approx(gamma, rel=1e-9)


def test_adagc_takes_over_after_its_warm_up():
    stream = log_normal(30, 3, median=2.0)
    decisions, _ = play(gp.AdaGC(2.0, warmup=20), stream)
    together = stream[19].norm().item()
    assert decisions[19].coefficients.item() == pytest.approx(1 / together, rel=1e-12)
    for tensor in range(3):
        expected = reference.ema_bounds(stream[:, tensor].tolist(), 2.0)[20]
        assert decisions[20].bound[tensor].item() == pytest.approx(expected, rel=1e-11)


def skips(norms, losses=None, **options):
    decisions, _ = play(gp.SkipStep(**options), norms, losses=losses)
    return [bool(decision.skip) for decision in decisions]


def test_skip_step_is_olmos_rule():
    norms = [*log_normal(100, 1, spread=0.1).flatten().tolist(), 100.0, 1.0, 50.0]
    losses = [*log_normal(100, 1, spread=0.1, seed=1).flatten().tolist(), 1.0, 30.0, 1.0]
    by_norm = reference.windowed_bounds(norms, 128, 64, reference.mean_plus(6))
    by_loss = reference.windowed_bounds(losses, 128, 64, reference.mean_plus(6))
    expected = [
        n > n_bound or loss > l_bound
        for n, n_bound, loss, l_bound in zip(norms, by_norm, losses, by_loss, strict=True)
    ]
    assert skips(norms, losses, reference=True) == expected
    assert expected[-3:] == [True, True, False]  # the 100 in the window hides the 50
    assert skips(norms, reference=True)[-3:] == [True, False, False]
    assert skips(norms, losses)[-3:] == [True, True, True]
    assert skips(norms)[-3:] == [True, False, True]


def test_a_negative_or_zero_loss_is_a_loss():
    losses = [-1.0, -1.1, -0.9, 0.0] * 20 + [3.0, math.nan, -1.0]
    assert skips([1.0] * 83, losses)[-3:] == [True, False, False]


@given(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
def test_smooth_is_between_half_and_all_of_hard(norm, bound):
    hard = play(gp.ClipByGlobalNorm(bound), [norm])[0][0].coefficients.item()
    smooth = play(gp.SmoothClip(bound), [norm])[0][0].coefficients.item()
    # One rounding each: at norm == bound the smooth one is exactly half.
    assert 0.5 * hard * (1 - 1e-15) <= smooth <= hard * (1 + 1e-15)
    assert hard == pytest.approx(min(1.0, bound / norm), rel=1e-15)


@given(st.floats(1e-20, 1e20), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_smoothness_step(norm, L0, L1):
    coefficient = play(gp.SmoothnessStep(L0, L1), [norm])[0][0].coefficients.item()
    assert coefficient == pytest.approx(1 / (L0 + L1 * norm), rel=1e-14)


@given(st.floats(1e-35, 1e35), st.floats(1e-3, 1e3))
def test_normalize(norm, target):
    coefficient = play(gp.Normalize(target), [norm])[0][0].coefficients.item()
    largest = torch.finfo(torch.float32).max
    assert coefficient == pytest.approx(min(target / norm, largest), rel=1e-14)


@given(norms_lists, st.floats(1e-6, 1e6))
def test_below_the_bound_the_coefficient_is_exactly_one(norms, bound):
    decision = play(gp.ClipByNorm(bound), [norms])[0][0]
    for norm, coefficient in zip(norms, decision.coefficients.tolist(), strict=True):
        assert (coefficient == 1.0) == (norm <= bound)
        assert 0 < coefficient <= 1
        # The exact convention: above the bound the clipped norm is the bound, to rounding.
        assert norm * coefficient == pytest.approx(min(norm, bound), rel=1e-15)


def test_schedule_and_torchs_epsilon():
    schedule = gp.Clip("global", gp.Schedule(lambda step: 1.0 / step), gp.Hard())
    assert [d.coefficients.item() for d in play(schedule, [1.0, 1.0, 4.0])[0]] == [1.0, 0.5, 1 / 12]
    with pytest.raises(ValueError, match=r"Schedule\(function\(1\)=-1\): .* positive"):
        play(gp.Clip("global", gp.Schedule(lambda step: -1), gp.Hard()), [1.0])
    eps = play(gp.ClipByGlobalNorm(1.0, eps=1e-6), [2.0])[0][0].coefficients.item()
    assert eps == 1.0 / (2.0 + 1e-6)


def test_the_norm_at_hand_is_judged_before_it_is_learned():
    for policy in (gp.AutoClip(warmup=1), gp.ZClip(warmup=1), gp.RobustClip(warmup=1), gp.QuantileClip()):
        decisions, _ = play(policy, [1.0, 1e6])
        assert decisions[1].bound.item() == pytest.approx(1.0, rel=0.05)
        assert measured([1e6]).norms.item() * decisions[1].coefficients.item() == pytest.approx(
            decisions[1].bound.item(), rel=1e-12
        )
