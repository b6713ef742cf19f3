"""``gradkeel policies``."""

import json

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")

from typer.testing import CliRunner

from gradkeel import policies as gp
from gradkeel.cli.app import app
from gradkeel.policies.spec.parse import COMPOSITES, REGISTRY


def run(*arguments):
    return CliRunner().invoke(app, ["policies", *arguments])


def test_the_list_names_every_policy_with_formula_parameters_cost_and_source():
    result = run()
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    for description in gp.descriptions():
        for said in (
            description.summary,
            description.formula,
            description.spec,
            description.cost,
            description.source,
        ):
            assert " ".join(said.replace("`", "").split()) in words


@pytest.mark.parametrize("name", [*REGISTRY, *COMPOSITES])
def test_one_policy_in_full(name):
    result = run(name)
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    description = gp.describe({**REGISTRY, **COMPOSITES}[name])
    for parameter in description.parameters:
        assert parameter.meaning.replace("`", "") in words
    # What it says to try can be read.
    assert gp.parse(words.rpartition("--policy ")[2]).policy is not None


def test_a_spec_tells_its_policy_and_an_unknown_name_the_known_ones():
    assert run("zclip:z=3").output == run("zclip").output
    assert run("zclip+value:1").output == run("chain").output
    result = run("zclop")
    assert result.exit_code == 2
    assert "did you mean 'zclip'" in result.stderr


def test_json():
    listed = json.loads(run("--json").output)
    assert {entry["name"] for entry in listed} == set(REGISTRY) | set(COMPOSITES)
    (one,) = json.loads(run("zclip", "--json").output)
    assert one["parameters"][0] == {
        "name": "z",
        "default": "2.5",
        "meaning": "how many standard deviations above the mean a norm may be, above 0.",
    }
