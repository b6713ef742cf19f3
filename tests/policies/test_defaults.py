"""What a policy is when only what it needs is said: the documented defaults, and that every argument has its effect."""

import dataclasses
import inspect

import pytest

from gradkeel import policies as gp
from gradkeel.policies.spec.parse import COMPOSITES, REGISTRY

# Changing a default changes everybody's training: it belongs into the changelog, and here.
DEFAULTS = {
    "value": {"max": None, "min": "none"},
    "norm": {"max_norm": None},
    "global-norm": {"max_norm": None, "norm_type": "2.0", "eps": "0.0"},
    "agc": {"ratio": "0.01", "unit_dim": "0", "floor": "0.001"},
    "block-rms": {"max_rms": None},
    "smooth": {"max_norm": None, "scope": "global"},
    "normalize": {"norm": "1.0", "scope": "global"},
    "smoothness-step": {"L0": None, "L1": None},
    "autoclip": {"q": "0.9", "window": "1000", "warmup": "50", "patience": "100", "scope": "global"},
    "quantile": {"q": "0.9", "eta": "0.2", "initial": "none", "scope": "global"},
    "zclip": {
        "z": "2.5", "decay": "0.97", "warmup": "25", "patience": "100", "scope": "global", "reference": "false",
    },
    "robust": {"z": "3.0", "window": "128", "warmup": "32", "patience": "100", "scope": "global"},
    "adagc": {
        "ratio": "1.05", "decay": "0.98", "warmup": "100", "warmup_norm": "1.0", "patience": "100",
        "reference": "false",
    },
    "skip-step": {"sigma": "6.0", "window": "128", "warmup": "64", "reference": "false"},
}  # fmt: skip

# Of the parts that users put together by themselves.
PARTS = {
    gp.Clip: {"norm_type": 2.0, "unit_dim": 0},
    gp.Constant: {"lowest": None},
    gp.ParameterRatio: {"floor": 1e-3},
    gp.Quantile: {"window": 1000, "warmup": 50, "patience": 100},
    gp.ZScore: {"window": 128, "warmup": 64, "patience": 100, "limited": True},
    gp.RobustZScore: {"window": 128, "warmup": 32, "patience": 100},
    gp.Ema: {"decay": 0.98, "warmup": 1, "patience": 100},
    gp.RunningZScore: {"decay": 0.97, "warmup": 25, "patience": 100},
    gp.GeometricQuantile: {"eta": 0.2, "initial": None},
    gp.Hard: {"eps": 0.0},
}

EXAMPLES = {
    "value": gp.ClipByValue(0.5),
    "norm": gp.ClipByNorm(0.5),
    "global-norm": gp.ClipByGlobalNorm(0.5),
    "block-rms": gp.BlockRms(0.5),
    "smooth": gp.SmoothClip(0.5),
    "smoothness-step": gp.SmoothnessStep(0.5, 0.25),
}
"""Of those that need an argument."""

CHANGED = {"scope": "tensor", "reference": True, "initial": 2.0, "min": -0.125, "eps": 0.5}
PUBLISHED = {"zclip": ("z", "decay", "warmup"), "adagc": ("ratio", "decay", "warmup", "warmup_norm")}


def another(argument, value):
    """A value that is allowed and not the given one."""
    if argument in CHANGED:
        return CHANGED[argument]
    return value + 1 if isinstance(value, int) else 0.75 * value


def test_every_named_policy_is_in_the_table():
    assert set(DEFAULTS) == set(REGISTRY)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_documented_defaults_are_those_of_the_signature(name):
    found = {parameter.name: parameter.default for parameter in gp.describe(REGISTRY[name]).parameters}
    assert found == DEFAULTS[name]


@pytest.mark.parametrize("part", PARTS)
def test_the_defaults_of_parts(part):
    parameters = inspect.signature(part).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == PARTS[part]


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, table in DEFAULTS.items() for argument in table]
)
def test_every_argument_reaches_the_parts(name, argument):
    usual = EXAMPLES.get(name) or REGISTRY[name]()
    changed = dataclasses.replace(usual, **{argument: another(argument, getattr(usual, argument))})
    assert changed.parts != usual.parts
    assert repr(changed) != repr(usual)
    assert gp.parse(changed.spec).policy == changed


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, arguments in PUBLISHED.items() for argument in arguments],
)
def test_the_published_form_takes_its_arguments_too(name, argument):
    usual = REGISTRY[name](reference=True)
    other = another(argument, getattr(usual, argument))
    assert f"{argument}={other}" in repr(
        dataclasses.replace(usual, reference=True, **{argument: other}).parts
    )


def test_composites_are_known_by_their_names():
    assert {name: policy.__name__ for name, policy in COMPOSITES.items()} == {
        "chain": "Chain", "warmup": "Warmup", "per-group": "PerGroup",
    }  # fmt: skip
