"""Policies made of policies, and what is refused."""

import dataclasses
import math

import pytest
import torch

from gradkeel import policies as gp
from gradkeel.norms import GradientNorms, per_tensor
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
    with pytest.raises(ValueError, match="last policy is for parameter group 1 "):
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


SKIPS = gp.Clip("global", gp.Constant(5.0), gp.SkipAbove())


@pytest.mark.parametrize(("norms", "asked"), [([4.0, 9.0], False), ([6.0, 9.0], True), ([6.0, 0.5], True)])
def test_a_group_that_asks_to_skip_is_heard_beside_one_that_scales(norms, asked):
    """Whichever of the two comes first; and the other group's coefficient stays what it is."""
    scale = gp.ClipByNorm(1.0)
    for policy, groups in ((gp.PerGroup(SKIPS, scale), [0, 1]), (gp.PerGroup(scale, SKIPS), [1, 0])):
        decision, _ = policy.decide(measured(norms, groups=groups), {})
        assert decision.skip.item() == asked
        assert decision.coefficients.tolist() == [1.0, min(1.0, 1 / norms[1])]
        assert decision.bound.tolist() == [5.0, 1.0]
    neither, _ = gp.PerGroup(scale, scale).decide(measured(norms, groups=[0, 1]), {})
    assert neither.skip is None


@pytest.mark.parametrize("norms", [[4.0, 4.0], [6.0, 4.0], [4.0, 6.0], [6.0, 6.0]])
def test_one_of_several_that_may_skip_is_enough(norms):
    now = measured(norms, groups=[0, 1])
    assert gp.PerGroup(SKIPS, SKIPS).decide(now, {})[0].skip.item() == (max(norms) > 5)
    first, second = (gp.Clip("tensor", gp.Constant(b), gp.SkipAbove()) for b in (5.0, 50.0))
    for stages in ((first, second), (second, first)):
        assert gp.Chain(*stages).decide(now, {})[0].skip.item() == (max(norms) > 5)


@pytest.mark.parametrize("spoiled", [True, False])
def test_a_step_that_one_group_asked_to_skip_is_skipped_for_all(spoiled):
    run = Run(gp.PerGroup(gp.Clip("global", gp.Constant(5.0), gp.SkipAbove()), gp.ClipByNorm(0.5)))
    given = gradients(0.1, seed=0)
    if spoiled:
        given["linear"] *= 1e3
    left = run.step(given)
    assert run.guard.report.stepped != spoiled
    assert bool(left) != spoiled
    assert run.guard.report.reason == ("the policy asked to skip this step" if spoiled else None)


def test_the_policies_of_groups_see_sizes_weights_and_units_of_their_own():
    now = dataclasses.replace(
        measured([6.0, 6.0, 6.0], groups=[0, 1, 0], sizes=[4, 9, 16]),
        weights=torch.tensor([1.0, 2.0, 4.0]).double(),
        units=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).double(),
        unit_weights=torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0]).double(),
        unit_counts=(2, 3, 1),
        unit_sizes=(2, 3, 16),
    )
    sizes, _ = gp.PerGroup(gp.BlockRms(1.0), gp.BlockRms(2.0)).decide(now, {})
    assert sizes.bound.tolist() == [2.0, 6.0, 4.0]
    ratio = gp.Clip("tensor", gp.ParameterRatio(0.5), gp.Hard())
    weights, _ = gp.PerGroup(None, ratio).decide(now, {})
    assert weights.bound.tolist() == [math.inf, 1.0, math.inf]
    assert weights.coefficients.tolist() == [1.0, 1 / 6, 1.0]
    units, _ = gp.PerGroup(None, gp.AdaptiveGradientClip(0.05)).decide(now, {})
    assert units.unit_coefficients.tolist() == pytest.approx([1, 1, 0.5, 0.5, 0.5, 1], rel=1e-15)
    # What is told of a tensor is the tightest of its units; a group without a policy has no bound.
    assert units.bound.tolist() == pytest.approx([math.inf, 1.5, math.inf], rel=1e-15)
    first, _ = gp.PerGroup(gp.AdaptiveGradientClip(0.05), None).decide(now, {})
    assert first.unit_coefficients.tolist() == pytest.approx([0.5, 0.5, 1, 1, 1, 0.5], rel=1e-15)
    assert first.bound.tolist() == pytest.approx([0.5, math.inf, 3.0], rel=1e-15)


def test_units_of_one_group_and_tensors_of_another_are_both_scaled():
    now = measured([4.0, 8.0], groups=[0, 1])
    decision, _ = gp.PerGroup(gp.AdaptiveGradientClip(0.5), gp.ClipByNorm(2.0)).decide(now, {})
    assert decision.unit_coefficients.tolist() == [0.125, 1.0]
    assert decision.coefficients.tolist() == [1.0, 0.25]
    assert decision.bound.tolist() == [0.5, 2.0]


def test_a_policy_for_each_group_keeps_its_own_state():
    policy = gp.PerGroup(None, gp.ClipByNorm(1.0), gp.QuantileClip(0.5), gp.QuantileClip(0.5))
    now = measured([1.0, 2.0, 3.0, 4.0], groups=[0, 1, 2, 3])
    _, state = policy.decide(now, policy.init(now))
    assert {key: value.tolist() for key, value in state.items()} == {"2.quantile": [3.0], "3.quantile": [4.0]}
    # A group that has no parameters on this rank is passed over, and one too many is none.
    here = measured([4.0], groups=[3])
    assert set(policy.init(here)) == {"3.quantile"}
    with pytest.raises(
        ValueError, match=r"last policy is for parameter group 3 .* the optimizer has a group 4;"
    ):
        policy.init(measured([1.0], groups=[4]))


def test_a_chain_tells_the_last_bound_that_there_is():
    clip, clamp = gp.ClipByNorm(3.0), gp.ClipByValue(1.0)
    decision = gp.Chain(clip, clamp).decide(measured([6.0]), {})[0]
    assert (decision.bound.tolist(), decision.coefficients.tolist()) == ([3.0], [0.5])
    assert decision.clamp == (-1.0, 1.0)
    skipping = gp.Chain(SKIPS, clip).decide(measured([4.0]), {})[0]
    assert (skipping.bound.tolist(), skipping.skip.item()) == ([3.0], False)
    assert gp.Chain(clip, SKIPS).decide(measured([4.0, 4.0, 4.0]), {})[0].skip.item() is True  # 9^0.5 x 3


def test_a_chain_scales_the_units_that_the_next_stage_sees():
    """A common factor first, then units, then each tensor as its units leave it."""
    now = dataclasses.replace(
        measured([5.0, 5.0]),
        units=torch.tensor([3.0, 4.0, 5.0]).double(),
        unit_weights=torch.ones(3).double(),
        unit_counts=(2, 1),
        unit_sizes=(1, 1),
    )
    halved = gp.ClipByGlobalNorm(math.sqrt(50) / 2)
    each_halved = gp.ClipByNorm(2.5)
    for stage in (halved, each_halved):
        decision = gp.Chain(stage, gp.AdaptiveGradientClip(1.75)).decide(now, {})[0]
        wanted = [1.0, 1.75 / 2.0, 1.75 / 2.5]
        assert decision.unit_coefficients.tolist() == pytest.approx(wanted, rel=1e-14)
    last = gp.Chain(gp.AdaptiveGradientClip(3.0), gp.ClipByNorm(2.0)).decide(now, {})[0]
    assert last.unit_coefficients.tolist() == pytest.approx([1.0, 0.75, 0.6], rel=1e-15)
    assert last.coefficients.tolist() == pytest.approx([2 / 18**0.5, 2 / 3], rel=1e-14)
    total = gp.Chain(gp.AdaptiveGradientClip(3.0), gp.ClipByGlobalNorm(1.0)).decide(now, {})[0]
    assert total.coefficients.item() == pytest.approx(1 / 27**0.5, rel=1e-14)


def test_the_first_policy_of_a_warm_up_learns_only_while_it_is_in_force():
    policy = gp.Warmup(3, gp.QuantileClip(0.5), gp.QuantileClip(0.9))
    _, at_its_end = play(policy, [1.0, 2.0, 4.0])
    _, later = play(policy, [1.0, 2.0, 4.0, 8.0, 16.0])
    assert later["before.quantile"] == at_its_end["before.quantile"]
    assert later["after.quantile"] != at_its_end["after.quantile"]
    decisions, state = play(gp.Warmup(2, gp.ClipByNorm(0.5), None), [1.0] * 3)
    assert [d.coefficients is None for d in decisions] == [False, False, True]
    assert state == {}


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


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_norms_of_tensors_from_those_of_their_units_are_exact(norm_type):
    """Against float64 tensor by tensor; some have no unit, and one has most of them."""
    counts = (0, 3, 1, 2000, 7, 0)
    units = torch.rand(sum(counts), dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (sum(counts),))
    norms = GradientNorms(
        tuple(map(str, range(6))), torch.ones(6, dtype=torch.float64), torch.ones(()), norm_type, (0,) * 6, 1,
        unit_counts=counts,
    )  # fmt: skip
    parts = units.split(list(counts))
    exact = [torch.linalg.vector_norm(part, norm_type).item() if len(part) else 0.0 for part in parts]
    assert per_tensor(units, norms).tolist() == pytest.approx(exact, rel=1e-14)
    least = [part.min().item() if len(part) else math.inf for part in parts]
    assert per_tensor(units, norms, least=True).tolist() == least
