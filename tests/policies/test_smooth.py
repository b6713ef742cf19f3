"""The policies that scale every gradient: SmoothClip, Normalize, SmoothnessStep."""

import math

import pytest

from gradkeel import policies as gp
from streams import measured, play


def coefficients(policy, norms, **options):
    now = measured(norms, **options)
    return policy.decide(now, policy.init(now))[0].coefficients.tolist()


def test_a_smooth_clip_is_c_over_c_plus_n():
    assert coefficients(gp.SmoothClip(2.0), [3.0, 4.0]) == pytest.approx(2 / 7, rel=1e-15)
    each = coefficients(gp.SmoothClip(2.0, scope="tensor"), [3.0, 4.0])
    assert each == pytest.approx([2 / 5, 2 / 6], rel=1e-15)
    groups = coefficients(gp.SmoothClip(2.0, scope="group"), [3.0, 4.0, 6.0], groups=[0, 0, 1])
    assert groups == pytest.approx([2 / 7, 2 / 7, 2 / 8], rel=1e-15)


def test_a_normalized_gradient_has_the_norm_that_is_asked_for_small_or_large():
    assert coefficients(gp.Normalize(), [3.0, 4.0]) == pytest.approx(1 / 5, rel=1e-15)
    assert coefficients(gp.Normalize(2.0), [0.3, 0.4]) == pytest.approx(4.0, rel=1e-15)
    each = coefficients(gp.Normalize(2.0, scope="tensor"), [0.5, 8.0])
    assert each == pytest.approx([4.0, 0.25], rel=1e-15)
    groups = coefficients(gp.Normalize(2.0, scope="group"), [3.0, 4.0, 0.5], groups=[0, 0, 1])
    assert groups == pytest.approx([2 / 5, 2 / 5, 4.0], rel=1e-15)


def test_a_smoothness_step_is_the_inverse_of_the_curvature_of_all_together():
    assert coefficients(gp.SmoothnessStep(16.0, 2.0), [3.0, 4.0]) == pytest.approx(1 / 26, rel=1e-15)
    assert coefficients(gp.SmoothnessStep(0.01, 0.02), [3.0, 4.0]) == pytest.approx(1 / 0.11, rel=1e-15)


@pytest.mark.parametrize(
    "policy", [gp.SmoothClip(2.0, scope="unit"), gp.Normalize(2.0, scope="unit")], ids=repr
)
def test_units_are_scaled_by_themselves(policy):
    decision = play(policy, [[1.0, 8.0]])[0][0]
    wanted = {"SmoothClip": [2 / 3, 2 / 10], "Normalize": [2.0, 0.25]}[type(policy).__name__]
    assert decision.coefficients is None
    assert decision.unit_coefficients.tolist() == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        (gp.SmoothClip(1.0), "SmoothClip(max_norm=1.0)  # all tensors together"),
        (gp.SmoothClip(1, scope="unit"), "SmoothClip(max_norm=1.0, scope='unit')  # each output unit separately"),
        (gp.Normalize(), "Normalize()  # all tensors together"),
        (gp.Normalize(0.5, scope="tensor"), "Normalize(norm=0.5, scope='tensor')  # each tensor separately"),
        (gp.SmoothnessStep(16, 1), "SmoothnessStep(L0=16.0, L1=1.0)  # all tensors together"),
    ],
)  # fmt: skip
def test_they_say_what_they_scale_and_remember_nothing(policy, shown):
    assert repr(policy) == shown
    assert policy.init(measured([1.0])) == {}
    assert play(policy, [1.0, 5.0])[1] == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: gp.SmoothClip(0.0),
            r"SmoothClip\(max_norm=0.0\): max_norm must be a positive number; to turn clipping off pass None",
        ),
        (lambda: gp.SmoothClip(math.inf), "max_norm must be a positive number"),
        (lambda: gp.SmoothClip(1.0, scope="value"), r"SmoothClip\(.*scope='value'\): single entries can only"),
        (lambda: gp.SmoothClip(1.0, scope="row"), r"SmoothClip\(.*scope='row'\): scope must be one of value"),
        (lambda: gp.Normalize(-1.0), r"Normalize\(norm=-1.0\): norm must be a positive number$"),
        (lambda: gp.Normalize(math.nan), r"norm must be a positive number$"),
        (lambda: gp.Normalize(scope="value"), r"Normalize\(scope='value'\): single entries can only be clamped"),
        (lambda: gp.Normalize(scope="row"), r"Normalize\(scope='row'\): scope must be one of value"),
        (lambda: gp.SmoothnessStep(0.0, 1.0), r"SmoothnessStep\(L0=0.0, L1=1.0\): L0 must be a positive"),
        (lambda: gp.SmoothnessStep(1.0, -1.0), r"SmoothnessStep\(L0=1.0, L1=-1.0\): L1 must be a positive"),
    ],
)  # fmt: skip
def test_what_they_cannot_do_is_refused_when_they_are_made(make, words):
    with pytest.raises(ValueError, match=words):
        make()
