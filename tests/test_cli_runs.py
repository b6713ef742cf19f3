"""explain, report, replay and export on the command line."""

import json
import shutil
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("typer", reason="the command line needs the extra cli")

from typer.testing import CliRunner

from gradkeel.cli.app import app
from scripted import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose second layer somebody else scales up at step 60."""
    path = tmp_path_factory.mktemp("runs") / "exp 1.keel"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def losses():
        for step in range(1, 121):
            if step == 60:
                with torch.no_grad():
                    model[2].weight.mul_(100)
            yield (model(torch.randn(16, 4)) - 1).square().mean()

    return trained(path, model, optimizer, losses(), "global-norm:1.0")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_explain_in_words(run):
    result = call("explain", run, "--bound", "0.25")
    assert result.exit_code == 0, result.output
    assert "The gradients exploded at step 60, first in 2.weight." in result.stdout
    assert "something else wrote to them" in result.stdout
    assert "0.25" in result.stdout
    assert f"gradkeel report '{run}'" in result.stdout


def test_explain_as_json(run):
    result = call("explain", run, "--json")
    data = json.loads(result.stdout)
    assert set(data) == {
        "version", "path", "steps", "first_step", "last_step", "parameters", "policy", "optimizer", "clipped",
        "skipped", "explosion", "events", "fading", "threshold", "rolled_back", "damage",
        "verdict", "onset", "where", "cause", "confidence", "missing", "reasons", "autopsies",
    }  # fmt: skip
    explosion = data["explosion"]
    assert {"found", "step", "parameter", "ended", "spread"} <= set(explosion)
    assert (explosion["found"], explosion["step"], explosion["parameter"]) == (True, 60, "2.weight")
    assert explosion["ended"] in {"recovered", "high"}
    assert {"parameter": "2.weight", "step": 60, "growth": explosion["spread"][0]["growth"]} == explosion[
        "spread"
    ][0]
    assert explosion["altered"] == ["2.weight"]
    assert data["threshold"]["candidates"][0]["clip_rate"].keys() == {"value", "low", "high"}
    assert (data["steps"], data["policy"], data["optimizer"]) == (120, "global-norm:1.0", "SGD")


def test_explain_a_wrong_bound(run):
    result = call("explain", run, "--bound", "-1")
    assert result.exit_code == 2
    assert "is not a positive finite number" in result.output


def test_replay(run):
    result = call("replay", run, "--policy", "global-norm:1.0", "--policy", "norm:0.1")
    assert result.exit_code == 0, result.output
    assert "Open-loop" in result.stdout
    live, other = (
        line.split() for line in result.stdout.splitlines() if line.startswith(("global-norm", "norm:"))
    )
    assert live[1] == "(live)"
    assert live[-2:] == ["0", "steps"]
    assert other[-2:] != ["0", "steps"]


def test_replay_as_json(run):
    data = json.loads(call("replay", run, "--policy", "zclip", "--json").stdout)
    assert (data["version"], data["open_loop"]) == (1, True)
    (result,) = data["policies"]
    assert (result["policy"], result["is_live"]) == ("zclip", False)
    assert len(result["coefficients"]) == len(result["steps"]) == 120
    assert all(0 < c <= 1 for c in result["coefficients"])


def test_replay_of_what_is_not_recorded(run):
    result = call("replay", run, "--policy", "agc")
    assert result.exit_code == 2
    assert "the norm of each unit" in result.output


def test_report_beside_the_record_and_elsewhere(run, tmp_path):
    pytest.importorskip("plotly", reason="pages with figures need the extra report")
    result = call("report", run)
    assert result.exit_code == 0, result.output
    assert run.with_suffix(".html").read_text().startswith("<!doctype html>")
    assert (
        call("report", run, "-o", tmp_path / "page.html").stdout.strip() == f"Wrote {tmp_path / 'page.html'}"
    )
    assert (tmp_path / "page.html").exists()


def test_report_of_several_and_with_a_shared_script(run, tmp_path):
    pytest.importorskip("plotly", reason="pages with figures need the extra report")
    other = tmp_path / "other.keel"
    shutil.copy(run, other)
    result = call("report", run, other, "--no-inline", "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    (script,) = tmp_path.glob("plotly-*.min.js")
    assert result.stdout.strip() == f"Wrote {tmp_path / 'page.html'}, which needs {script.name} beside it"
    text = (tmp_path / "page.html").read_text()
    assert f'<script src="{script.name}"></script>' in text
    assert f"<dt>{run.stem}</dt>" in text
    assert "<dt>other</dt>" in text
    for wrong, words in (([run, run], "given twice"), ([run, other, "--watch"], "it shows one record")):
        result = call("report", *wrong)
        assert result.exit_code == 2
        assert words in result.output


def test_report_without_plotly(run, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"] or ["plotly"]:
        monkeypatch.setitem(sys.modules, name, None)
    result = call("report", run, "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "pip install 'gradkeel[report]'" in result.output
    assert not (tmp_path / "page.html").exists()


def test_export(run, tmp_path):
    result = call("export", run, "-o", tmp_path / "run.csv", "--no-parameters")
    assert result.stdout.strip() == f"Wrote 120 steps to {tmp_path / 'run.csv'}"
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 121
    wrong = call("export", run, "-o", tmp_path / "run.txt")
    assert wrong.exit_code == 2
    assert "must end in .csv or .parquet" in wrong.output


@pytest.mark.parametrize(
    "command", [["explain"], ["replay", "--policy", "none"], ["report"], ["export", "-o", "x.csv"]]
)
def test_no_such_record(tmp_path, command):
    result = call(command[0], tmp_path / "none.keel", *command[1:])
    assert result.exit_code == 2
    assert "there is no record at" in result.output
