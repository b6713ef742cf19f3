"""The general policy: what it asks to be measured, which cells it judges, and its bounds and forms one by one."""

import dataclasses
import math

import pytest
import torch

from gradkeel import policies as gp
from gradkeel.norms import Needs
from streams import measured, play


def decided(policy, norms, **options):
    """What a policy decides on its first step."""
    now = measured(norms, **options)
    return policy.decide(now, policy.init(now))[0]


# -- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "needs"),
    [
        (gp.Clip("tensor", gp.Constant(1.0), gp.Hard()), Needs(2.0, False, None, False)),
        (gp.Clip("global", gp.Constant(1.0), gp.Hard(), 1.0, unit_dim=1), Needs(1.0, False, None, False)),
        (gp.Clip("unit", gp.Constant(1.0), gp.Hard()), Needs(2.0, False, 0, False)),
        (gp.Clip("unit", gp.Constant(1.0), gp.Hard(), math.inf, 1), Needs(math.inf, False, 1, False)),
        (gp.Clip("tensor", gp.ParameterRatio(0.1), gp.Hard()), Needs(2.0, True, None, False)),
        (gp.Clip("value", gp.Constant(1.0), gp.Hard()), Needs(2.0, False, None, True)),
        (gp.Chain(gp.ZClip(), gp.AdaptiveGradientClip()), Needs(2.0, True, 0, False)),
        (
            gp.Chain(gp.ClipByGlobalNorm(1.0, norm_type=1.0), gp.ClipByValue(1.0)),
            Needs(1.0, False, None, True),
        ),
        (gp.PerGroup(None, gp.AdaptiveGradientClip(unit_dim=1)), Needs(2.0, True, 1, False)),
        (gp.Warmup(5, None, gp.ClipByValue(1.0)), Needs(2.0, False, None, True)),
    ],
    ids=repr,
)
def test_only_what_is_looked_at_is_measured(policy, needs):
    assert policy.needs == needs


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"norm_type": 0}, ValueError, r"Clip\(norm_type=0\): norm_type must be a positive number$"),
        ({"norm_type": -1.0}, ValueError, "norm_type must be a positive number"),
        ({"norm_type": math.nan}, ValueError, "norm_type must be a positive number"),
        ({"norm_type": "2"}, TypeError, "norm_type must be a positive number, not str"),
        (
            {"unit_dim": -1},
            ValueError,
            r"Clip\(unit_dim=-1\): unit_dim must be a whole number of at least 0$",
        ),
        ({"unit_dim": True}, TypeError, "unit_dim must be a whole number of at least 0, not bool"),
    ],
)
def test_wrong_arguments_are_named(arguments, kind, words):
    with pytest.raises(kind, match=words):
        gp.Clip("unit", gp.Constant(1.0), gp.Hard(), **arguments)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gp.Constant(0.0), r"Constant\(highest=0.0\): highest must be a positive number"),
        (lambda: gp.RootMeanSquare(0.0), r"RootMeanSquare\(highest=0.0\): highest must be a positive number"),
        (lambda: gp.ParameterRatio(0.0), r"ParameterRatio\(ratio=0.0\): ratio must be a positive number"),
        (
            lambda: gp.ParameterRatio(1.0, 0.0),
            r"ParameterRatio\(floor=0.0\): floor must be a positive number",
        ),
        (lambda: gp.Smoothness(0.0, 1.0), r"Smoothness\(L0=0.0\): L0 must be a positive number"),
        (lambda: gp.Smoothness(1.0, math.inf), r"Smoothness\(L1=inf\): L1 must be a positive number"),
        (lambda: gp.Ema(0.0), r"Ema\(ratio=0.0\): ratio must be a positive number"),
        (lambda: gp.Ema(2.0, decay=0.0), r"Ema\(decay=0.0\): decay must be a number between 0 and 1"),
        (lambda: gp.Ema(2.0, warmup=0), r"Ema\(warmup=0\): warmup must be a whole number of at least 1"),
        (lambda: gp.RunningZScore(0.0), r"RunningZScore\(z=0.0\): z must be a positive number"),
        (lambda: gp.RunningZScore(2.0, decay=1.0), r"RunningZScore\(decay=1.0\): decay must be a number"),
        (lambda: gp.RunningZScore(2.0, patience=0), r"RunningZScore\(patience=0\): patience must be a whole"),
        (lambda: gp.GeometricQuantile(0.0), r"GeometricQuantile\(q=0.0\): q must be a number between"),
        (
            lambda: gp.GeometricQuantile(0.5, eta=0.0),
            r"GeometricQuantile\(eta=0.0\): eta must be a positive",
        ),
        (lambda: gp.GeometricQuantile(0.5, initial=0.0), r"\(initial=0.0\): initial must be a positive"),
        (lambda: gp.Quantile(0.0), r"Quantile\(q=0.0\): q must be a number between 0 and 1"),
        (lambda: gp.Quantile(0.5, warmup=0), r"Quantile\(warmup=0\): warmup must be a whole number"),
        (
            lambda: gp.ZScore(2.0, window=1),
            r"ZScore\(window=1\): window must be a whole number of at least 2",
        ),
        (
            lambda: gp.ZScore(2.0, warmup=1),
            r"ZScore\(warmup=1\): warmup must be a whole number of at least 2",
        ),
        (lambda: gp.ZScore(0.0), r"ZScore\(z=0.0\): z must be a positive number"),
        (lambda: gp.RobustZScore(-1.0), r"RobustZScore\(z=-1.0\): z must be a positive number"),
        (lambda: gp.SkipStep(0.0), r"SkipStep\(sigma=0.0\): sigma must be a positive number"),
        (lambda: gp.SkipStep(warmup=1), r"SkipStep\(warmup=1\): warmup must be a whole number of at least 2"),
        (lambda: gp.AdaGC(warmup=1), r"AdaGC\(warmup=1\): warmup must be a whole number of at least 2"),
        (lambda: gp.AdaGC(warmup_norm=0.0), r"AdaGC\(warmup_norm=0.0\): warmup_norm must be a positive"),
        (lambda: gp.BlockRms(0.0), r"BlockRms\(max_rms=0.0\): max_rms must be a positive number"),
        (lambda: gp.ClipByValue(0.0), r"ClipByValue\(max=0.0\): max must be .*; to turn clipping off pass"),
        (lambda: gp.ClipByValue(1.0, min=2.0), "min must not be above max, and both must be finite"),
        (lambda: gp.ClipByValue(1.0, min=-math.inf), "min must not be above max, and both must be finite"),
        (lambda: gp.ClipByValue(math.inf, min=0.0), "min must not be above max, and both must be finite"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_its_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_smallest_and_largest_arguments_that_mean_something_are_taken():
    gp.Clip("tensor", gp.Constant(1.0), gp.Hard(), math.inf, unit_dim=0)
    gp.ZScore(2.0, window=2, warmup=2, patience=1)
    gp.Quantile(0.5, window=5, warmup=5)
    gp.AdaGC(warmup=2, patience=1)
    gp.ClipByValue(0.5, min=0.5)


# -- which cells are judged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [gp.Hard(), gp.Smooth(), gp.Rescale()], ids=repr)
def test_a_cell_without_a_finite_positive_norm_is_left_as_it_is(form):
    policy = gp.Clip("tensor", gp.Constant(1.0), form)
    found = decided(policy, [0.0, math.nan, math.inf, 4.0]).coefficients.tolist()
    assert found[:3] == [1.0, 1.0, 1.0]
    assert found[3] == {gp.Hard: 0.25, gp.Smooth: 0.2, gp.Rescale: 0.25}[type(form)]


@pytest.mark.parametrize(
    ("norms", "skips"),
    [
        ([1.0, 2.0], False),  # at the bound is not above it
        ([1.0, 2.0001], True),
        ([9.0, 1.0], True),
        ([math.inf, 1.0], False),  # what is not finite is the guard's affair
        ([math.nan, 1.0], False),
        ([math.inf, 9.0], True),
        ([0.0, 0.0], False),
    ],
)
def test_one_cell_above_its_bound_asks_to_skip_and_none_is_scaled(norms, skips):
    decision = decided(gp.Clip("tensor", gp.Constant(2.0), gp.SkipAbove()), norms)
    assert decision.skip.item() == skips
    assert decision.bound.tolist() == [2.0, 2.0]
    assert (decision.coefficients, decision.unit_coefficients, decision.clamp) == (None, None, None)


def test_a_clamp_takes_both_limits_and_remembers_nothing():
    now = measured([1.0], 3)
    one_sided = gp.Clip("value", gp.Constant(0.5, -0.25), gp.Hard())
    assert one_sided.init(now) == {}
    assert one_sided.decide(now, {})[0].clamp == (-0.25, 0.5)
    assert gp.Clip("value", gp.Constant(0.5), gp.Hard()).decide(now, {})[0].clamp == (-0.5, 0.5)
    decision = gp.Clip("value", gp.Schedule(lambda step: 1 / step), gp.Hard()).decide(now, {})[0]
    assert decision.clamp == (-1 / 3, 1 / 3)
    assert (decision.coefficients, decision.skip) == (None, None)


# -- bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "bounds"),
    [
        ("tensor", [2.0 * 4**0.5, 2.0 * 9**0.5, 2.0 * 12**0.5]),
        ("group", [2.0 * 16**0.5, 2.0 * 9**0.5, 2.0 * 16**0.5]),
        ("global", 2.0 * 25**0.5),
    ],
)
def test_a_root_mean_square_is_over_all_entries_of_the_cell(scope, bounds):
    policy = gp.Clip(scope, gp.RootMeanSquare(2.0), gp.Hard())
    decision = decided(policy, [30.0, 60.0, 20.0], groups=[0, 1, 0], sizes=[4, 9, 12])
    assert decision.bound.tolist() == pytest.approx(bounds, rel=1e-15)
    norms = {"tensor": [30, 60, 20], "group": [1300**0.5, 60, 1300**0.5], "global": 4900**0.5}[scope]
    wanted = (torch.tensor(bounds, dtype=torch.float64) / torch.tensor(norms, dtype=torch.float64)).tolist()
    assert decision.coefficients.tolist() == pytest.approx(wanted, rel=1e-14)


def test_a_root_mean_square_of_units_counts_the_entries_of_each():
    now = dataclasses.replace(
        measured([1.0, 1.0]), units=torch.tensor([9.0, 1.0, 9.0]).double(), unit_counts=(2, 1), unit_sizes=(4, 9)
    )  # fmt: skip
    decision = gp.Clip("unit", gp.RootMeanSquare(1.0), gp.Hard()).decide(now, {})[0]
    assert decision.bound.tolist() == [2.0, 2.0, 3.0]
    assert decision.unit_coefficients.tolist() == [2 / 9, 1.0, 3 / 9]


def test_a_ratio_to_weights_counts_small_weights_as_the_floor():
    now = dataclasses.replace(measured([5.0, 5.0, 5.0]), weights=torch.tensor([10.0, 0.5, 0.0]).double())
    bound = gp.ParameterRatio(0.1, 2.0)
    decision = gp.Clip("tensor", bound, gp.Hard()).decide(now, {})[0]
    assert decision.bound.tolist() == pytest.approx([1.0, 0.2, 0.2], rel=1e-15)
    together = gp.Clip("global", bound, gp.Hard()).decide(now, {})[0]
    assert together.bound.item() == pytest.approx(0.1 * (100 + 0.25) ** 0.5, rel=1e-15)
    usual = gp.Clip("tensor", gp.ParameterRatio(0.1), gp.Hard()).decide(now, {})[0]
    assert usual.bound.tolist() == pytest.approx([1.0, 0.05, 1e-4], rel=1e-15)


def test_groups_are_told_apart_whatever_their_numbers():
    """Of four groups, 1 and 3 have parameters here: what is measured of them must not be mixed up."""
    policy = gp.Clip("group", gp.Constant(1.0), gp.Hard())
    decision = decided(policy, [3.0, 8.0, 4.0], groups=[3, 1, 3])
    assert decision.coefficients.tolist() == pytest.approx([1 / 5, 1 / 8, 1 / 5], rel=1e-15)


# -- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "after"), [(gp.Hard(), 0.5), (gp.Smooth(), 1 / 3), (gp.Rescale(), 0.5)])
def test_a_bound_that_is_not_there_yet_leaves_gradients_alone(form, after):
    """While a bound warms up it is infinite; each form must then multiply by exactly 1."""
    policy = gp.Clip("global", gp.Quantile(0.5, window=5, warmup=2), form)
    decisions, _ = play(policy, [1.0, 1.0, 2.0])
    found = [decision.coefficients.item() for decision in decisions]
    assert found == [1.0, 1.0, pytest.approx(after, rel=1e-15)]
    assert [decision.bound.item() for decision in decisions] == [math.inf, math.inf, 1.0]


def test_rescaling_never_exceeds_what_single_precision_holds():
    policy = gp.Clip("tensor", gp.Constant(1.0), gp.Rescale())
    assert decided(policy, [1e-300, 0.5]).coefficients.tolist() == [torch.finfo(torch.float32).max, 2.0]


def test_the_epsilon_of_a_hard_clip_is_zero_or_positive():
    assert gp.Hard().eps == 0.0
    assert decided(gp.Clip("tensor", gp.Constant(1.0), gp.Hard(0.5)), [0.4, 0.6, 2.0]).coefficients.tolist() == [
        1.0,
        pytest.approx(1 / 1.1, rel=1e-15),
        pytest.approx(0.4, rel=1e-15),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"Hard\(eps=-0.1\): eps must be a positive number"):
        gp.Hard(-0.1)


# -- statistics ---------------------------------------------------------------------------------------------------


LEARNING = [
    gp.Clip("tensor", gp.Quantile(0.5, window=8, warmup=2), gp.Hard()),
    gp.Clip("tensor", gp.ZScore(2.0, window=8, warmup=2), gp.Hard()),
    gp.Clip("tensor", gp.RobustZScore(2.0, window=8, warmup=2), gp.Hard()),
    gp.Clip("tensor", gp.RunningZScore(2.0, warmup=2), gp.Hard()),
    gp.Clip("tensor", gp.Ema(1.5, warmup=2), gp.Hard()),
    gp.Clip("tensor", gp.GeometricQuantile(0.5), gp.Hard()),
    gp.ZClip(reference=True, warmup=2, scope="tensor"),
]


@pytest.mark.parametrize("policy", LEARNING, ids=repr)
def test_a_bad_norm_in_one_cell_neither_stops_nor_misleads_the_others(policy):
    good = [1.0, 1.3, 0.8, 2.0, 1.1, 0.9]
    spoiled = [1.0, 1.3, math.nan, math.inf, 0.0, 1.1]
    _, state = play(policy, list(zip(good, spoiled, strict=True)))
    _, alone = play(policy, [[norm, norm] for norm in good])
    _, kept = play(policy, [[norm, norm] for norm in (1.0, 1.3, 1.1)])
    for key, value in state.items():
        assert torch.equal(value[0], alone[key][0])
        assert torch.equal(value[1], kept[key][1])
