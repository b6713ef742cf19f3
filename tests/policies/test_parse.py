"""Spec strings, and what the classes tell about themselves."""

import doctest
import importlib
import pkgutil

import pytest

import gradkeel.policies
from gradkeel import PolicySpecError
from gradkeel import policies as gp
from gradkeel.policies.spec.parse import COMPOSITES, REGISTRY

parse = gp.parse


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("none", None),
        ("value:1.0", gp.ClipByValue(1.0)),
        ("value:-0.5,1", gp.ClipByValue(1.0, min=-0.5)),
        ("norm:1", gp.ClipByNorm(1.0)),
        ("tensor-norm:1", gp.ClipByNorm(1.0)),
        ("global-norm:0.25,norm_type=inf", gp.ClipByGlobalNorm(0.25, norm_type=float("inf"))),
        ("global-norm:1e+5", gp.ClipByGlobalNorm(1e5)),
        ("agc", gp.AdaptiveGradientClip()),
        ("agc:0.02,unit_dim=1", gp.AdaptiveGradientClip(0.02, unit_dim=1)),
        ("smoothness-step:16,1", gp.SmoothnessStep(16.0, 1.0)),
        (
            "zclip:scope=tensor, patience=None , reference=True",
            gp.ZClip(scope="tensor", patience=None, reference=True),
        ),
        ("skip-step+zclip+value:1", gp.Chain(gp.SkipStep(), gp.ZClip(), gp.ClipByValue(1.0))),
        ("norm:1e+5+norm:2", gp.Chain(gp.ClipByNorm(1e5), gp.ClipByNorm(2.0))),
        ("warmup:10/norm:1/none", gp.Warmup(10, gp.ClipByNorm(1.0), None)),
        (
            "warmup:10/none/(skip-step+zclip)",
            gp.Warmup(10, None, gp.Chain(gp.SkipStep(), gp.ZClip())),
        ),
        (
            "skip-step+(warmup:10/norm:1/zclip)",
            gp.Chain(gp.SkipStep(), gp.Warmup(10, gp.ClipByNorm(1.0), gp.ZClip())),
        ),
        ("per-group:norm:0.1/none", gp.PerGroup(gp.ClipByNorm(0.1), None)),
    ],
)
def test_specs(spec, policy):
    read = parse(spec)
    assert read.policy == policy
    assert read.exclude == ()
    assert parse(read.spec) == read


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("norm:1.0,exclude=*.bias,exclude=norm.*", "norm:1.0,exclude=*.bias,exclude=norm.*"),
        ("norm:exclude=*.bias,max_norm=1", "norm:1.0,exclude=*.bias"),
        ("zclip:exclude=*.bias", "zclip:exclude=*.bias"),
        ("zclip:exclude=*.bias+value:1", "zclip+value:1.0,exclude=*.bias"),
        ("value:1+none", None),
        ("none:exclude=*.bias", None),
    ],
)
def test_exclude_holds_for_the_whole_policy(spec, canonical):
    if canonical is None:
        with pytest.raises(PolicySpecError, match="none"):
            parse(spec)
        return
    read = parse(spec)
    assert read.spec == canonical
    assert parse(canonical) == read
    assert len(read.exclude) == canonical.count("exclude=")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("zclop", "unknown policy 'zclop'; did you mean 'zclip'. Known policies: none, adagc, agc"),
        ("skip-step+zclop", "unknown policy 'zclop' in 'skip-step.zclop'; did you mean 'zclip'"),
        ("", "unknown policy ''. Known policies"),
        ("norm", "it needs max_norm, as in norm:1.0"),
        ("smoothness-step:1", "it needs L1, as in smoothness-step:1.0,1.0"),
        ("norm:-1", "max_norm must be a positive number; to turn clipping off pass None"),
        ("norm:one", "max_norm='one' is not a number"),
        ("norm:1,2", "too many arguments; it takes max_norm"),
        ("norm:1,max_norm=2", "argument 'max_norm' is given twice"),
        ("zclip:q=1", "argument 'q' is not one of z, decay, warmup"),
        ("zclip:scope=layer", "scope='layer' is not one of value, unit, tensor"),
        ("zclip:reference=yes", "reference='yes' is not one of true, false"),
        ("autoclip:window=1.5", "window='1.5' is not a whole number"),
        ("none:1", "'none' takes no arguments"),
        ("(zclip", "parentheses do not match"),
        ("zclip)+(norm:1", "parentheses do not match"),
        ("warmup:10/zclip", "write it as warmup:STEPS/BEFORE/AFTER"),
        ("warmup:ten/none/zclip", "steps='ten' is not a whole number"),
        ("value:1+zclip", "put it last"),
        ("__import__('os')", "unknown policy"),
    ],
)
def test_what_cannot_be_read_says_why(spec, words):
    with pytest.raises(PolicySpecError, match=words.replace("(", r"\(")):
        parse(spec)


@pytest.mark.parametrize("name", [*REGISTRY, *COMPOSITES])
def test_every_policy_describes_itself(name):
    description = gp.describe({**REGISTRY, **COMPOSITES}[name])
    assert description in gp.descriptions()
    assert description.name == name
    for words in (description.summary, description.formula, description.cost, description.source):
        assert words
    assert description.summary.endswith(".")
    assert all(parameter.meaning.endswith(".") for parameter in description.parameters)


def test_examples_in_docstrings():
    """Every ``>>>`` in the package does what it says; public names are there as after ``from ... import *``."""
    count = 0
    for module in pkgutil.walk_packages(gradkeel.policies.__path__, "gradkeel.policies."):
        names = {name: getattr(gp, name) for name in gp.__all__}
        result = doctest.testmod(importlib.import_module(module.name), extraglobs=names)
        assert result.failed == 0
        count += result.attempted
    assert count > 15
