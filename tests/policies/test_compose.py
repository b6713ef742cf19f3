"""Policies made of policies, and what is refused."""

import math

import pytest
import torch

from gradkeel import policies as gp
from policy_rows import Run, gradients
from streams import measured, play


def test_a_chain_clips_what_the_stage_before_leaves():
    decision = play(gp.Chain(gp.ClipByNorm(3.0), gp.ClipByGlobalNorm(2.5)), [[4.0, 30.0, 1.0]])[0][0]
    # After the first stage (3, 3, 1) with norm sqrt(19); after the second, norm 2.5.
    factor = 2.5 / math.sqrt(19)
    assert decision.coefficients.tolist() == pytest.approx([0.75 * factor, 0.1 * factor, factor], rel=1e-15)
    assert decision.bound.item() == 2.5


def test_a_chain_of_units_then_tensors():
    policy = gp.Chain(gp.AdaptiveGradientClip(0.5), gp.ClipByNorm(0.3))
    decision = play(policy, [[4.0, 0.2]])[0][0]
    assert decision.unit_coefficients.tolist() == [0.125, 1.0]
    assert decision.coefficients.tolist() == pytest.approx([0.6, 1.0], rel=1e-15)


def test_a_clamp_after_a_scaling_sees_scaled_entries():
    """Normalizing makes small entries large, so what was measured before it does not tell what to clamp."""
    run = Run(gp.Chain(gp.Normalize(10.0), gp.ClipByValue(0.5)))
    left = run.step(gradients(1e-3, seed=0))
    report = run.guard.report
    assert report.coefficient > 1
    assert max(entries.abs().max().item() for entries in left.values() if entries.numel()) == 0.5
    assert report.clipped
    norm = torch.cat([entries.flatten() for entries in left.values()]).norm().item()
    assert report.clipped_norm == pytest.approx(norm, rel=1e-12)
    gentle = Run(gp.Chain(gp.Normalize(1e-2), gp.ClipByValue(0.5)))
    gentle.step(gradients(1e-3, seed=0))
    assert gentle.guard.report.clipped_norm == pytest.approx(1e-2, rel=1e-12)


def test_a_chain_keeps_the_states_of_its_stages_apart():
    stream = [1.0, 1.2, 0.9, 1.1] * 20
    chain = gp.Chain(gp.ZClip(), gp.RobustClip())
    _, state = play(chain, stream)
    _, alone = play(gp.ZClip(), stream)
    assert {key.partition(".")[0] for key in state} == {"0", "1"}
    assert all(torch.equal(state[f"0.{key}"], value) for key, value in alone.items())


def test_the_later_policy_watches_during_the_warm_up():
    policy = gp.Warmup(60, gp.ClipByGlobalNorm(0.5), gp.AutoClip(0.9))
    decisions, state = play(policy, [1.0] * 60 + [5.0])
    assert [d.bound.item() for d in decisions[:60]] == [0.5] * 60
    assert decisions[60].bound.item() == 1.0
    assert state["after.seen"].item() == 61
    nothing, _ = play(gp.Warmup(2, None, gp.ClipByNorm(0.5)), [1.0] * 3)
    assert [d.coefficients is None for d in nothing] == [True, True, False]


def test_each_group_sees_itself_alone():
    policy = gp.PerGroup(gp.ClipByGlobalNorm(1.0), gp.ClipByNorm(1.0), None)
    now = measured([3.0, 4.0, 3.0, 4.0, 9.0], groups=[0, 1, 0, 1, 2])
    decision, _ = policy.decide(now, policy.init(now))
    together = 1 / math.sqrt(18)
    assert decision.coefficients.tolist() == pytest.approx([together, 0.25, together, 0.25, 1.0], rel=1e-15)
    assert decision.bound.tolist() == [1.0, 1.0, 1.0, 1.0, math.inf]
    with pytest.raises(ValueError, match="2 policies, but the optimizer has a parameter group 2"):
        gp.PerGroup(gp.ClipByNorm(1.0), None).init(now)


def test_a_group_may_ask_to_skip():
    policy = gp.PerGroup(gp.SkipStep(warmup=2, window=4), None)
    stream = [[1.0, 5.0], [1.1, 9.0], [0.9, 1e6], [60.0, 1.0]]
    state, asked = None, []
    for step, norms in enumerate(stream, 1):
        now = measured(norms, step, groups=[0, 1])
        state = policy.init(now) if state is None else state
        decision, state = policy.decide(now, state)
        asked.append(bool(decision.skip))
    assert asked == [False, False, False, True]


def test_group_scope_and_per_group_agree():
    now = measured([3.0, 4.0, 6.0, 8.0], groups=[0, 1, 0, 1])
    scope = gp.Clip("group", gp.Constant(1.0), gp.Hard())
    one = scope.decide(now, scope.init(now))[0]
    each = gp.PerGroup(gp.ClipByGlobalNorm(1.0), gp.ClipByGlobalNorm(1.0)).decide(now, {})[0]
    assert torch.equal(one.coefficients, each.coefficients)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gp.Chain(gp.ClipByValue(1.0), gp.ZClip()), r"ClipByValue\(max=1.0\) clamps .* put it last"),
        (lambda: gp.Chain(gp.ZClip()), "at least two policies"),
        (
            lambda: gp.Chain(gp.ClipByNorm(1.0), gp.ClipByGlobalNorm(1.0, norm_type=1.0)),
            "norm_type.* measured once",
        ),
        (
            lambda: gp.Chain(gp.AdaptiveGradientClip(), gp.AdaptiveGradientClip(unit_dim=1)),
            "unit_dim.* measured once",
        ),
        (lambda: gp.PerGroup(gp.ClipByValue(1.0)), "'clip' key"),
        (lambda: gp.PerGroup(None, None), "at least one group"),
        (
            lambda: gp.Warmup(0, None, gp.ZClip()),
            r"Warmup\(steps=0\): steps must be a whole number of at least 1",
        ),
        (lambda: gp.Clip("value", gp.Quantile(0.9), gp.Hard()), "follows norms; choose the scope"),
        (
            lambda: gp.Clip("value", gp.Constant(1.0), gp.Smooth()),
            r"can only be clamped; use the form Hard\(\)",
        ),
        (
            lambda: gp.Clip("layer", gp.Constant(1.0), gp.Hard()),
            "scope must be one of value, unit, tensor, group",
        ),
        (lambda: gp.AutoClip(q=1.0), r"AutoClip\(q=1.0\): q must be a number between 0 and 1"),
        (lambda: gp.AutoClip(window=10), r"AutoClip\(window=10\): warmup must not be above window"),
        (lambda: gp.ZClip(patience=0), r"ZClip\(patience=0\): patience must be a whole number of at least 1"),
        (lambda: gp.ZClip(scope="value"), r"ZClip\(scope='value'\): single entries .* choose the scope"),
        (lambda: gp.AdaGC(decay=1.0), r"AdaGC\(decay=1.0\): decay must be a number between 0 and 1"),
        (
            lambda: gp.AdaptiveGradientClip(-0.1),
            r"AdaptiveGradientClip\(ratio=-0.1\): ratio must be a positive number",
        ),
        (
            lambda: gp.ClipByGlobalNorm(math.nan),
            "max_norm must be a positive number; to turn clipping off pass None",
        ),
        (lambda: gp.ClipByGlobalNorm(1.0, eps=-1e-6), r"eps must be a positive number"),
        (
            lambda: gp.ClipByNorm(math.inf),
            "max_norm must be a positive number; to turn clipping off pass None",
        ),
        (
            lambda: gp.SmoothnessStep(1.0, 0.0),
            r"SmoothnessStep\(L0=1.0, L1=0.0\): L1 must be a positive number",
        ),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: gp.ClipByNorm("1"),
            r"ClipByNorm\(max_norm='1'\): .*, not str; to turn clipping off pass None",
        ),
        (lambda: gp.ClipByGlobalNorm(True), "not bool"),
        (lambda: gp.Chain(gp.ZClip(), "value:1"), "must be made of policies"),
        (lambda: gp.Clip("tensor", 1.0, gp.Hard()), r"bound must be a Bound, such as Constant\(1.0\)"),
        (lambda: gp.Clip("tensor", gp.Constant(1.0), "hard"), r"form must be a Form, such as Hard\(\)"),
        (lambda: gp.AutoClip(window=10.5), "window must be a whole number of at least 2, not float"),
    ],
)
def test_what_is_of_another_kind_is_refused_with_the_reason(make, words):
    with pytest.raises(TypeError, match=words):
        make()
