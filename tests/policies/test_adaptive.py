"""What the policies that learn make of their parameters: patience, warm-up, scope, and the defaults."""

import math

import pytest
import torch

from gradkeel import policies as gp
from streams import bounds, measured, play


def clipped_after_a_rise(policy, *, calm, rise=1e6, steps=200):
    """How many steps in a row are clipped after norms have risen for good."""
    decisions, _ = play(policy, [1.0] * calm + [rise] * steps)
    flags = [bool((decision.coefficients < 1).any()) for decision in decisions[calm:]]
    return flags.index(False) if False in flags else math.inf


# One that believes its history is made afresh after `patience` clips; the last of these is the first norm that the
# new statistics see, and the old bound is in force until they have seen `warmup`.
PATIENT = [
    (gp.AutoClip, {"window": 150, "warmup": 3}, 3),
    (gp.ZClip, {"warmup": 3, "decay": 0.999}, 3),
    (gp.RobustClip, {"window": 300, "warmup": 3}, 3),
    # After its warm-up a tensor needs one norm.
    (gp.AdaGC, {"warmup": 2, "warmup_norm": 10.0}, 1),
]


@pytest.mark.parametrize(
    ("kind", "options", "warmup"), PATIENT, ids=lambda value: getattr(value, "__name__", "")
)
def test_patience_is_how_many_clips_in_a_row_it_takes_to_start_afresh(kind, options, warmup):
    assert clipped_after_a_rise(kind(**options, patience=1), calm=140) == 1 + warmup - 1
    assert clipped_after_a_rise(kind(**options, patience=7), calm=140) == 7 + warmup - 1
    # A hundred, unless another number is given.
    assert clipped_after_a_rise(kind(**options), calm=140) <= 100 + warmup - 1


@pytest.mark.parametrize(
    ("policy", "calm", "rise", "until"),
    [
        # The median of the window moves when half of it is new; at just half it lies in between.
        (gp.AutoClip(0.5, window=500, warmup=3, patience=None), 140, 1e6, 141),
        (gp.RobustClip(window=500, warmup=3, patience=None), 140, 1e6, 140),
        (gp.AdaGC(warmup=2, warmup_norm=10.0, patience=None), 140, 1e6, math.inf),
    ],
    ids=repr,
)
def test_without_patience_only_the_statistics_themselves_end_a_run_of_clips(policy, calm, rise, until):
    assert clipped_after_a_rise(policy, calm=calm, rise=rise, steps=200) == until
    _, state = play(policy, [1.0, 2.0])
    assert not any(key.endswith(("run", "held")) for key in state)


@pytest.mark.parametrize(("patience", "first"), [(None, 140), (7, 9), (100, 102)])
def test_autoclip_hands_its_patience_on(patience, first):
    """By the bound itself: q = 0.5 follows a rise after 140 new norms, or 2 after patience has run out."""
    policy = gp.AutoClip(0.5, window=1000, warmup=3, patience=patience)
    limits = bounds(policy, [1.0] * 140 + [8.0] * 141).flatten()
    assert limits[3 : 140 + first].eq(1.0).all()
    assert limits[140 + first] > 1.0
    assert limits[-1] > 1.0


def test_a_clip_in_between_that_is_none_starts_the_count_again():
    stream = [1.0] * 10 + ([9.0] * 6 + [0.5]) * 4 + [9.0] * 7
    limits = bounds(gp.AutoClip(0.01, window=1000, warmup=1, patience=7), stream).flatten()
    assert limits[1:].le(1.0).all()
    after = bounds(gp.AutoClip(0.01, window=1000, warmup=1, patience=7), [*stream, 9.0]).flatten()
    assert after[-1] == 9.0


def test_a_fresh_start_forgets_all_that_was_before():
    policy = gp.AutoClip(0.5, window=100, warmup=2, patience=3)
    limits = bounds(policy, [1.0] * 60 + [10.0, 20.0, 30.0, 50.0, 40.0]).flatten()
    # 30 is the third clip and the first of the new window; with 50 there are two, whose median is 40.
    assert limits[60:].tolist() == [1.0, 1.0, 1.0, 1.0, 40.0]


@pytest.mark.parametrize("kind", [gp.AutoClip, gp.ZClip, gp.RobustClip])
def test_a_patience_below_the_warm_up_does_not_start_afresh_for_ever(kind):
    """The clips under the old bound, while the new statistics fill, are none that these have made."""
    policy = kind(patience=7, warmup=30)
    stream = [1.0] * 140 + [1e6] * 60
    decisions, state = play(policy, stream)
    assert [bool(d.coefficients < 1) for d in decisions[140:]] == [True] * (7 + 29) + [False] * 24
    assert state["seen"].item() == 54  # from the seventh clip on


@pytest.mark.parametrize("kind", [gp.AutoClip, gp.QuantileClip, gp.ZClip, gp.RobustClip])
def test_a_scope_is_what_is_measured_together(kind):
    now = measured([3.0, 4.0, 12.0], groups=[0, 0, 1])
    shapes = {"global": (), "tensor": (3,), "group": (3,), "unit": (3,)}
    for scope, shape in shapes.items():
        decision, state = kind(scope=scope).decide(now, kind(scope=scope).init(now))
        found = decision.unit_coefficients if scope == "unit" else decision.coefficients
        assert found.shape == shape
        cells = {"global": 1, "tensor": 3, "group": 2, "unit": 3}[scope]
        assert {tensor.shape[0] for tensor in state.values()} == {cells}
    assert kind().decide(now, kind().init(now))[0].coefficients.shape == ()


@pytest.mark.parametrize(
    ("spec", "warmup"), [("autoclip", 50), ("zclip", 25), ("robust", 32), ("skip-step", 64), ("adagc", 100)]
)
def test_the_default_warm_up_is_so_many_norms(spec, warmup):
    policy = gp.parse(spec).policy
    stream = torch.full((warmup + 1,), 1e-3, dtype=torch.float64)
    before, after = bounds(policy, stream)[warmup - 1 : warmup + 1].flatten().tolist()
    assert before == (1.0 if spec == "adagc" else math.inf)  # the global norm of the warm-up
    assert 1e-3 <= after < 2e-3


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (gp.AutoClip, "autoclip:q=0.9,window=1000,warmup=50,patience=100,scope=global"),
        (gp.QuantileClip, "quantile:q=0.9,eta=0.2,initial=none,scope=global"),
        (gp.ZClip, "zclip:z=2.5,decay=0.97,warmup=25,patience=100,scope=global,reference=false"),
        (gp.RobustClip, "robust:z=3.0,window=128,warmup=32,patience=100,scope=global"),
        (
            gp.AdaGC,
            "adagc:ratio=1.05,decay=0.98,warmup=100,warmup_norm=1.0,patience=100,reference=false",
        ),
        (gp.SkipStep, "skip-step:sigma=6.0,window=128,warmup=64,reference=false"),
        (gp.AdaptiveGradientClip, "agc:ratio=0.01,unit_dim=0,floor=0.001"),
        (gp.ClipByGlobalNorm, "global-norm:MAX_NORM,norm_type=2.0,eps=0.0"),
        (gp.ClipByValue, "value:MAX,min=none"),
        (gp.SmoothClip, "smooth:MAX_NORM,scope=global"),
        (gp.Normalize, "normalize:norm=1.0,scope=global"),
        (gp.SmoothnessStep, "smoothness-step:L0,L1"),
    ],
)
def test_the_defaults_are_those_that_are_promised(kind, spec):
    assert gp.describe(kind).spec == spec


@pytest.mark.parametrize(
    ("bound", "shown"),
    [
        (gp.Ema(2.0), "Ema(warmup=1, patience=100, ratio=2.0, decay=0.98)"),
        (gp.RunningZScore(2.0), "RunningZScore(warmup=25, patience=100, z=2.0, decay=0.97)"),
        (gp.GeometricQuantile(0.5), "GeometricQuantile(q=0.5, eta=0.2, initial=None)"),
        (gp.Quantile(0.5), "Quantile(warmup=50, patience=100, window=1000, q=0.5)"),
        (gp.ZScore(2.0), "ZScore(warmup=64, patience=100, window=128, z=2.0, limited=True)"),
        (gp.RobustZScore(2.0), "RobustZScore(warmup=32, patience=100, window=128, z=2.0)"),
        (gp.ParameterRatio(0.1), "ParameterRatio(ratio=0.1, floor=0.001)"),
    ],
)
def test_the_defaults_of_the_bounds(bound, shown):
    assert repr(bound) == shown
