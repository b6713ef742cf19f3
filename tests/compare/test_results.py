"""compare.json: what docs/compare.md promises."""

import json
import math
import re
from pathlib import Path

import pytest

from compare_runs import BLOWN_UP, EXPLODING, comparison, run
from gradkeel.compare.findings import document
from gradkeel.compare.sweep import parse_sweep

DOCS = Path(__file__).parents[2] / "docs" / "compare.md"


@pytest.fixture
def result():
    runs = [run("none", seed=s, losses=EXPLODING, onset=BLOWN_UP) for s in range(2)]
    return comparison(runs + [run("norm:1", seed=s) for s in range(2)], sweep=parse_sweep("norm:0.1..10"))


def keys_of(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item)


def test_it_holds_what_the_contract_names(result):
    data = document(result)
    assert {"task", "steps", "runs", "summary"} <= data.keys()
    assert data["task"] == "char-lstm"
    assert data["steps"] == 3
    for one in data["runs"]:
        assert {
            "policy", "lr", "seed", "losses", "norms", "final_loss", "validation_loss", "diverged", "diverged_at",
            "onset", "clip_rate", "seconds_per_step",
        } <= one.keys()  # fmt: skip
    assert [row["policy"] for row in data["summary"]] == ["norm:1", "none"]


def test_numbers_that_are_not_finite_are_null(result):
    text = json.dumps(document(result), allow_nan=False)
    first = json.loads(text)["runs"][0]
    assert first["losses"] == [4.0, 9.0, 1e30, None]
    assert (first["final_loss"], first["validation_loss"]) == (None, None)
    assert (first["diverged"], first["diverged_at"]) == (True, 3)
    assert first["onset"] == {"step": 2, "parameter": "layer.weight", "ratio": 7.5}
    assert json.loads(text)["summary"][1]["loss"] is None


def test_runs_that_trained_have_no_onset_and_no_step_of_divergence(result):
    last = document(result)["runs"][-1]
    assert (last["diverged"], last["diverged_at"], last["onset"]) == (False, None, None)
    assert last["final_loss"] == 2.0


def test_findings_and_sweep_are_in_it(result):
    data = document(result)
    assert set(data["findings"]) == {"found", "why", "caution", "next"}
    assert [point["bound"] for point in data["sweep"]] == [1]
    assert "sweep" not in document(comparison([run("none")]))


def test_nothing_finished_is_a_document_too():
    data = document(comparison([], interrupted=True, policies=("none",), seeds=(0,), learning_rates=(1.0,)))
    assert (data["runs"], data["summary"], data["findings"]) == ([], [], None)
    assert (data["interrupted"], data["planned_runs"]) == (True, 1)


def test_every_key_is_documented(result):
    documented = set(re.findall(r"`([a-z_]+)`", DOCS.read_text(encoding="utf-8")))
    assert set(keys_of(document(result))) - documented == set()


def test_losses_and_norms_are_of_one_length(result):
    for one in document(result)["runs"]:
        assert len(one["losses"]) == len(one["norms"])
        assert all(value is None or math.isfinite(value) for value in one["losses"])
