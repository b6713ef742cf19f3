"""Numbers as users have them: ints, NumPy's, torch's word for infinity."""

import math

import numpy as np
import pytest
import torch

import gradkeel as gk
from gradkeel.norms import GradientNorms
from gradkeel.policies import AutoClip, BlockRms, SmoothnessStep, ZClip, parse

NUMBERS = [1, np.float32(1), np.float64(1), np.int64(1)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
@pytest.mark.parametrize(
    "make",
    [
        gk.ClipByNorm,
        gk.ClipByGlobalNorm,
        gk.ClipByValue,
        lambda x: gk.ClipByValue(min=-x, max=x),
        gk.AdaptiveGradientClip,
        BlockRms,
        lambda x: SmoothnessStep(x, x),
        ZClip,
        lambda x: AutoClip(x / 2),
    ],
)
def test_any_number_makes_the_same_policy(make, number):
    policy, usual = make(number), make(1.0)
    assert (policy, repr(policy), policy.spec) == (usual, repr(usual), usual.spec)
    assert parse(policy.spec).policy == usual
    norms = torch.tensor([2.0], dtype=torch.float64)
    measured = GradientNorms(
        ("w",), norms, norms[0], 2.0, (0,), 1, sizes=(1,), weights=norms, units=norms, unit_weights=norms,
        unit_counts=(1,), unit_sizes=(1,),
    )  # fmt: skip
    given, wanted = (p.decide(measured, p.init(measured))[0] for p in (policy, usual))
    for one, other in zip(
        (given.coefficients, given.unit_coefficients, given.bound),
        (wanted.coefficients, wanted.unit_coefficients, wanted.bound),
        strict=True,
    ):
        assert (one is None and other is None) or torch.equal(one, other)
    assert given.clamp == wanted.clamp


def test_inf_may_be_a_word():
    policy = gk.ClipByGlobalNorm(1.0, norm_type="inf")
    assert policy == gk.ClipByGlobalNorm(1.0, norm_type=math.inf)
    assert policy.spec == "global-norm:1.0,norm_type=inf"


@pytest.mark.parametrize(
    "wrong", [True, "1", None, torch.ones(2), np.ones(2)], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(TypeError, match="max_norm must be a positive number"):
        gk.ClipByNorm(wrong)
