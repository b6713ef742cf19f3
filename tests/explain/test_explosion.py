"""What is said about explosions of known shape."""

import math

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.compare.task import endless, load_task
from gradkeel.explain import explain
from gradkeel.explain.events import find_events
from gradkeel.guard.report import SelectionReport, StepReport
from gradkeel.norms import Decision, GradientNorms
from gradkeel.record import Recorder

NAMES = ("first.weight", "middle.weight", "last.weight")


def write(path, norms, losses=None, rates=None):
    """A record of these norms [k, 3], as a guard under no policy would have written it."""
    recorder = Recorder(path)
    for i, row in enumerate(torch.as_tensor(norms, dtype=torch.float64)):
        measured = GradientNorms(NAMES, row, torch.linalg.vector_norm(row), 2.0, (0, 0, 0), i + 1, (9, 9, 9))
        selection = SelectionReport("main", "None", measured, Decision(), (True, True, True))
        scalars = {} if losses is None else {"loss": float(losses[i])}
        if rates is not None:
            scalars["lr"] = float(rates[i])
        recorder.record(StepReport(i + 1, (selection,), 1.0, scalars))
    recorder.close()
    return path


def noise(steps, generator_seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.exp(spread * torch.randn(steps, 3, dtype=torch.float64, generator=generator))


def test_a_climb_to_nan_is_told_step_by_step(tmp_path):
    norms = noise(200)
    for i in range(10):  # from step 151 on: the middle layer first, the others two steps later
        norms[150 + i, 1] *= 10.0 ** (i + 1)
        if i >= 2:
            norms[150 + i] *= torch.tensor([10.0 ** (i - 1), 1, 10.0 ** (i - 1.5)])
    norms[160:] = math.nan
    explosion = explain(write(tmp_path / "run.keel", norms, rates=[0.1] * 150 + [3.0] * 50)).explosion
    assert (explosion.kind, explosion.step, explosion.parameter) == ("explosion", 151, "middle.weight")
    assert explosion.ended == "non-finite"
    assert [reached.parameter for reached in explosion.spread] == [
        "middle.weight",
        "first.weight",
        "last.weight",
    ]
    assert explosion.spread[0].step == 151
    assert 153 <= explosion.spread[1].step <= 154
    assert explosion.growth_per_step == pytest.approx(10, rel=0.15)  # noise of a third on ten decades
    assert explosion.peak_step == 160
    assert any("learning rate rose from 0.1 to 3 at step 151" in words for words in explosion.evidence)


def test_a_spike_that_recovers(tmp_path):
    norms = noise(300)
    norms[120] *= 1000
    explosion = explain(write(tmp_path / "run.keel", norms)).explosion
    assert (explosion.kind, explosion.step, explosion.ended, explosion.last_step) == (
        "spike",
        121,
        "recovered",
        121,
    )
    assert explosion.score > 8


def test_the_end_comes_before_an_earlier_and_higher_spike(tmp_path):
    norms = noise(300)
    norms[120] *= 1e6
    norms[260:] *= 100
    explanation = explain(write(tmp_path / "run.keel", norms))
    assert (explanation.explosion.step, explanation.explosion.ended) == (261, "high")
    assert [event.step for event in explanation.events] == [121, 261]


def test_two_spikes_are_told_apart_and_the_higher_one_first(tmp_path):
    norms = noise(400)
    norms[120] *= 100
    norms[300] *= 1e4
    explanation = explain(write(tmp_path / "run.keel", norms))
    assert explanation.explosion.step == 301
    assert [event.step for event in explanation.events] == [121, 301]


@pytest.mark.parametrize("losses", [None, "rising", "falling"])
def test_a_slow_drift(tmp_path, losses):
    norms = noise(1200) * torch.logspace(0, 2, 1200, dtype=torch.float64).unsqueeze(1)
    norms[:, 2] *= torch.logspace(0, 1, 1200, dtype=torch.float64)
    values = {"rising": torch.linspace(1, 5, 1200), "falling": torch.linspace(5, 1, 1200)}.get(losses)
    explosion = explain(write(tmp_path / "run.keel", norms, values)).explosion
    if losses == "falling":  # norms may grow while training goes well
        assert not explosion.found
    else:
        assert (explosion.kind, explosion.parameter, explosion.ended) == ("drift", "last.weight", "high")
        assert explosion.step < 200
        assert explosion.growth_per_step == pytest.approx(10 ** (2.6 / 1200), rel=0.01)


@pytest.mark.parametrize("shape", ["flat", "falling", "warming up", "noisy", "left tail", "constant", "zero"])
def test_healthy_shapes_raise_no_alarm(tmp_path, shape):
    steps = torch.arange(1, 2001, dtype=torch.float64).unsqueeze(1)
    norms = {
        "flat": noise(2000),
        "falling": noise(2000) * steps**-1.0,
        "warming up": noise(2000) * (steps / 100).clamp(max=1) ** 0.5,
        "noisy": noise(2000, spread=1.0),
        "left tail": noise(2000) * torch.where(noise(2000, 1)[:, :1] > 1.5, 1e-3, 1.0),
        "constant": torch.ones(2000, 3),
        "zero": torch.zeros(2000, 3),
    }[shape]
    assert not explain(write(tmp_path / "run.keel", norms)).explosion.found


def test_a_million_healthy_steps_raise_no_alarm():
    generator = torch.Generator().manual_seed(0)
    norms = torch.exp(0.5 * torch.randn(1_000_000, dtype=torch.float64, generator=generator))
    assert find_events(norms, torch.zeros(1_000_000, dtype=torch.bool)) == []
    norms[700_000:700_004] *= 100
    assert [event.start for event in find_events(norms, torch.zeros(1_000_000, dtype=torch.bool))] == [
        700_000
    ]


@pytest.mark.parametrize(("policy", "parameter"), [("none", None), ("norm:1.0,exclude=*.bias", "0.bias")])
def test_an_explosion_from_the_initialization_has_its_own_verdict(tmp_path, policy, parameter):
    spec = gk.policies.parse(policy)
    task = load_task("exploding-linear")
    torch.manual_seed(0)
    model = task.model()
    guard = gk.attach(
        task.optimizer(model, 0.01), spec.policy, model=model, exclude=spec.exclude, nonfinite="keep",
        record=tmp_path / "run.keel",
    )  # fmt: skip
    batches = endless(task, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    onset = None
    for _ in range(100):
        loss = task.loss(model, next(batches))
        if not torch.isfinite(loss):
            break
        loss.backward()
        guard.log(loss=loss)
        guard.optimizer.step()
        guard.optimizer.zero_grad()
        ratios = {
            n: float((p.detach() - before[n]).norm() / before[n].norm()) for n, p in model.named_parameters()
        }
        if onset is None and max(ratios.values()) > 1:
            onset = guard.step, max(ratios, key=ratios.get)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
    guard.detach()
    explosion = explain(tmp_path / "run.keel").explosion
    assert explosion.kind == "initialization"
    assert (explosion.step, explosion.parameter) == onset
    assert parameter in {None, explosion.parameter}
    assert explosion.norm_before is None
    assert explosion.score is None
    assert explosion.growth_per_step > 10
    words = " ".join(explosion.evidence)
    assert "no past to compare with" in words
    assert "The first update larger than the weights it changed" in words
    assert "norms do not tell why" in words


def test_weights_that_somebody_else_wrote_to(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    guard = gk.attach(
        torch.optim.SGD(model.parameters(), lr=0.01), None, model=model, record=tmp_path / "run.keel"
    )
    for step in range(1, 121):
        if step == 77:  # a factor that no gradient shows
            with torch.no_grad():
                model[0].weight.mul_(2)
        nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.randint(4, (32,))).backward()
        guard.optimizer.step()
        guard.optimizer.zero_grad()
    guard.detach()
    explosion = explain(tmp_path / "run.keel").explosion
    assert (explosion.kind, explosion.step, explosion.altered) == ("weights", 77, ("0.weight",))
    assert "(2 times), and no update explains it" in explosion.evidence[0]


def test_a_jump_of_the_learning_rate_is_no_tampering(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    guard = gk.attach(
        torch.optim.Adam(model.parameters(), lr=1e-4), None, model=model, record=tmp_path / "run.keel"
    )
    for step in range(1, 220):
        if step == 155:
            guard.optimizer.param_groups[0]["lr"] = 0.5
        model(torch.randn(32, 8)).square().mean().backward()
        guard.optimizer.step()
        guard.optimizer.zero_grad()
    guard.detach()
    assert not any(event.altered for event in explain(tmp_path / "run.keel").events)


def test_too_short_a_record_is_explained_too(tmp_path):
    explanation = explain(write(tmp_path / "run.keel", noise(1)))
    assert not explanation.explosion.found
    assert explanation.threshold is None
    assert "No explosion was found." in str(explanation)
