"""`gradkeel smoothness` from the command line, on small tasks."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from gradkeel.compare.smoothness import (
    ProbedRun,
    default_policy,
    document,
    probed_run,
    smoothness_page,
    words,
)
from gradkeel.compare.task import Task, load_task
from gradkeel.explain.smoothness.figures import log_ticks, save_smoothness, smoothness_figure
from gradkeel.explain.smoothness.fit import fit_smoothness
from gradkeel.explain.smoothness.probe import LocalSmoothness

testing = pytest.importorskip("typer.testing")


class Quartic(Task):
    """Weights under |w|^4: smoothness grows as the norm to the power 2/3, and the optimizer can be chosen."""

    name = "quartic"
    policies = ("none", "value:1.0", "global-norm:0.5", "norm:1.0")
    learning_rates = (0.02, 0.05)
    steps = 60

    def model(self):
        model = nn.Linear(4, 1, bias=False)
        nn.init.constant_(model.weight, 3.0)
        return model

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield 1 + 0.1 * torch.rand(4, generator=generator)

    def loss(self, model, batch):
        return (batch * model.weight**4).sum()


class Adaptive(Quartic):
    name = "adaptive"

    def optimizer(self, model, lr):
        return torch.optim.AdamW(model.parameters(), lr=lr)


class Exploding(Quartic):
    name = "exploding"
    learning_rates = (10.0,)


def make_task():
    return Quartic()


@pytest.fixture(scope="module")
def run():
    return probed_run(Quartic(), policy="global-norm:0.5", lr=0.05, steps=60, every=1, points=2)


def test_a_run_is_measured_on_its_own_batches(run):
    assert len(run.losses) == 60
    assert [m.step for m in run.measurements] == list(range(1, 61))
    assert [m.loss for m in run.measurements] == list(run.losses)
    assert run.fit.related
    # ||H|| = 12 w^2 and ||g|| = 4 |w|^3 sqrt(4): slope 2/3, and noise of 10% in the batches.
    assert run.fit.slope == pytest.approx(2 / 3, abs=0.1)
    assert run.optimizer == "SGD"


def test_the_words_give_fit_bound_and_product(run):
    lines = {line.label: line.text for line in words(run)}
    assert list(lines) == ["FOUND", "FIT", "BOUND", "STEP"]
    assert lines["FOUND"] == run.fit.reason
    assert "lr * bound = 0.025" in lines["STEP"]
    safe = run.fit.safe_bound(run.lr)
    assert (f"{safe:.3g} or less at lr 0.05" if safe else "none makes lr 0.05 safe") in lines["BOUND"]


def test_a_learning_rate_above_one_over_l0_has_no_bound(run):
    lines = {line.label: line.text for line in words(dataclasses.replace(run, lr=2 / run.fit.envelope[0]))}
    assert lines["BOUND"].startswith("none makes lr")
    assert "take a lower learning rate" in lines["BOUND"]


def test_no_relation_gives_no_bound():
    run = probed_run(Adaptive(), policy="none", lr=0.02, steps=30, every=1, points=1)
    lines = {line.label: line.text for line in words(run)}
    assert "AdamW" in lines["FOUND"]
    assert lines["BOUND"].startswith("none follows")
    assert document(run)["fit"]["L1"] is None


def test_a_run_that_explodes_ends():
    run = probed_run(Exploding(), policy="none", lr=10.0, steps=60)
    assert len(run.losses) < 60
    assert not math.isfinite(run.losses[-1])
    assert not run.fit.related
    json.dumps(document(run), allow_nan=False)


def test_the_default_policy_bounds_the_global_norm():
    assert default_policy(Quartic()) == "global-norm:0.5"
    task = Quartic()
    task.policies = ("none", "value:1.0", "norm:1.0")
    assert default_policy(task) == "value:1.0"
    task.policies = ("none",)
    assert default_policy(task) == "none"


def invoke(*arguments):
    from gradkeel.cli.app import app

    return testing.CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_the_command_writes_page_pictures_and_json(tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom gradkeel.compare.task import Task\n\n\nclass Mine(Task):\n"
        "    learning_rates = (0.05,)\n    steps = 30\n    policies = ('none', 'global-norm:0.5')\n\n"
        "    def model(self):\n        return nn.Linear(4, 1)\n\n"
        "    def batches(self, seed):\n        yield torch.randn(8, 4)\n\n"
        "    def loss(self, model, batch):\n        return (model(batch) ** 4).mean()\n"
    )
    result = invoke("smoothness", "mine:Mine", "--every", "1", "--points", "2", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "FOUND" in result.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"smoothness.json", "smoothness.html", "smoothness.png", "smoothness.svg"}
    told = json.loads((tmp_path / "out" / "smoothness.json").read_text())
    assert told["policy"] == "global-norm:0.5"
    assert told["lr"] == 0.05
    assert len(told["measurements"]) == 30
    assert set(told["measurements"][0]) == {
        "smoothness",
        "norm",
        "length",
        "loss",
        "ratios",
        "resolution",
        "step",
    }


def test_json_is_all_that_is_printed(tmp_path):
    result = invoke(
        "smoothness",
        "exploding-linear",
        "--policy",
        "norm:1.0",
        "--json",
        "--steps",
        "25",
        "--out",
        str(tmp_path),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["task"] == "exploding-linear"
    assert told["lr"] == 0.01
    assert len(told["losses"]) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smoothness", "char-lstn"), "char-lstm"),
        (("smoothness", "exploding-linear", "--policy", "clip:1"), "unknown policy"),
        (("smoothness", "exploding-linear", "--every", "0"), "every"),
        (("smoothness", "exploding-linear", "--steps", "0"), "steps"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, tmp_path, capsys):
    result = invoke(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert message in result.output + capsys.readouterr().err


def measured(step, norm, smoothness):
    return LocalSmoothness(smoothness, norm, 0.1, 1.0, (smoothness,), 0.0, step)


def test_the_figure_has_points_line_and_envelope():
    pytest.importorskip("plotly")
    points = [measured(i, 0.1 * i, 0.2 * i + 0.01 * (i % 3)) for i in range(1, 40)]
    points.append(measured(40, 1.0, math.nan))
    chosen = [m for m in points if m.resolved]
    fit = fit_smoothness([m.norm for m in chosen], [m.smoothness for m in chosen])
    figure = smoothness_figure(points, fit)
    assert [trace.name for trace in figure.data] == ["measured", "L0 + L1 · norm", "envelope"]
    assert len(figure.data[0].x) == 39
    assert all(above >= point for point, above in zip(figure.data[1].y, figure.data[2].y, strict=True))


def test_without_a_fit_the_figure_has_points_alone():
    pytest.importorskip("plotly")
    points = [measured(1, 1.0, 2.0), measured(2, 2.0, 2.0)]
    figure = smoothness_figure(points, fit_smoothness([1.0, 2.0], [2.0, 2.0]))
    assert [trace.name for trace in figure.data] == ["measured"]
    empty = ProbedRun("t", "none", 0.1, 0, "SGD", (), (), fit_smoothness([], []))
    assert "<h1>gradkeel smoothness t</h1>" in smoothness_page(empty)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_are_written_in_both_formats(tmp_path, ending):
    pytest.importorskip("matplotlib")
    points = [measured(i, 0.1 * i, 0.2 * i) for i in range(1, 30)]
    fit = fit_smoothness([m.norm for m in points], [m.smoothness for m in points])
    paths = [tmp_path / f"{name}.{ending}" for name in ("one", "two")]
    for path in paths:
        save_smoothness(path, points, fit, title="t")
        assert path.stat().st_size > 5_000
    save_smoothness(paths[0].with_name(f"three.{ending}"), [], fit_smoothness([], []))


def test_ticks_are_round_numbers():
    assert log_ticks([0.3, 4.0])[3:9] == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert log_ticks([1e-6, 1.0])[0] == pytest.approx(1e-7)
    assert log_ticks([]) == []


def test_built_in_tasks_can_be_measured():
    assert default_policy(load_task("char-lstm")) == "global-norm:0.25"
