"""Threshold advice: right on distributions that are known, and silent on what norms do not hold."""

import math

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.explain import advise, explain
from gradkeel.explain.explosion import Explosion
from gradkeel.guard.report import SelectionReport, StepReport
from gradkeel.norms import Decision, GradientNorms
from gradkeel.record import Reader, Recorder
from gradkeel.record.rows import Subject

LEVELS = {0.5: 0.0, 0.75: 0.67448975, 0.9: 1.28155157, 0.95: 1.64485363, 0.99: 2.32634787}


def write(path, norms, *, optimizer="SGD", policy="none", bound=None, lr=0.1):
    """A record of one parameter with these norms."""
    recorder = Recorder(path)
    for i, norm in enumerate(norms.double()):
        measured = GradientNorms(("w",), norm.reshape(1), norm, 2.0, (0,), i + 1, (1,))
        decision = Decision() if bound is None else Decision(bound=torch.tensor(bound, dtype=torch.float64))
        selection = SelectionReport("main", policy, measured, decision, (True,))
        recorder.record(StepReport(i + 1, (selection,), 1.0, {"lr": lr}))
        recorder._outbox.subject = Subject(("w",), {"w": (1,)}, policy, optimizer, "skip")
    recorder.close()
    return path


def lognormal(steps, seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(spread * torch.randn(steps, generator=generator, dtype=torch.float64))


def test_quantiles_and_their_intervals_cover_the_truth(tmp_path):
    covered, total = 0, 0
    for seed in range(8):
        with Reader(write(tmp_path / f"{seed}.keel", lognormal(1000, seed))) as run:
            advice = advise(run)
        assert advice.steps == 1000
        for level, z in LEVELS.items():
            estimate = advice.quantiles[level]
            assert estimate.low <= estimate.value <= estimate.high
            covered += estimate.low <= math.exp(0.5 * z) <= estimate.high
            total += 1
    assert covered / total > 0.8  # nominally 95%; a bootstrap of 1000 values is too narrow in the tails


def test_numbers_of_a_candidate(tmp_path):
    norms = lognormal(2000)
    with Reader(write(tmp_path / "run.keel", norms)) as run:
        advice = advise(run, bounds=[1.5])
    candidate = next(c for c in advice.candidates if c.origin == "given")
    coefficients = 1.5 / norms.clamp(min=1.5)
    assert candidate.bound == 1.5
    assert candidate.clip_rate.value == pytest.approx(float((norms > 1.5).double().mean()))
    assert candidate.mean_coefficient.value == pytest.approx(float(coefficients.mean()))
    assert candidate.coefficient_spread == pytest.approx(
        (float(coefficients.quantile(0.05)), float(coefficients.quantile(0.95)))
    )
    assert candidate.effective_lr.value == pytest.approx(0.1 * float(coefficients.median()))
    assert advice.log_median == pytest.approx(float(norms.log().median()))
    assert advice.drift.low < 1 < advice.drift.high
    assert [c.bound for c in advice.candidates] == sorted(c.bound for c in advice.candidates)


def test_the_live_bound_is_a_candidate(tmp_path):
    with Reader(write(tmp_path / "run.keel", lognormal(200), bound=0.1)) as run:
        advice = advise(run)
    live = next(c for c in advice.candidates if c.origin == "live")
    assert live.bound == pytest.approx(0.1)
    assert live.clips_nearly_always
    assert any("normalized SGD, effective lr = lr * bound / norm" in words for words in advice.remarks)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop"])
def test_under_adam_no_effective_learning_rate_is_given(tmp_path, optimizer):
    with Reader(write(tmp_path / "run.keel", lognormal(200), optimizer=optimizer, bound=0.1)) as run:
        advice = advise(run)
    assert advice.scale_cancels is True
    assert all(candidate.effective_lr is None for candidate in advice.candidates)
    assert any(
        f"Under {optimizer} a constant factor on the gradients cancels" in words for words in advice.remarks
    )
    assert not any("normalized SGD" in words for words in advice.remarks)


def test_under_an_unknown_optimizer_nothing_is_claimed(tmp_path):
    with Reader(write(tmp_path / "run.keel", lognormal(200), optimizer="MyOwn")) as run:
        advice = advise(run)
    assert advice.scale_cancels is None
    assert all(candidate.effective_lr is None for candidate in advice.candidates)
    assert any(
        "What a smaller gradient does under MyOwn is not known here" in words for words in advice.remarks
    )


def test_what_cannot_be_said_is_not_said(tmp_path):
    text = str(explain(write(tmp_path / "run.keel", lognormal(300))))
    for forbidden in ("optimal", "recommended", "should be", "final loss will", "L0", "L1"):
        assert forbidden not in text
    assert "cannot be said from norms" in text


def test_drift_is_seen_with_its_interval(tmp_path):
    norms = lognormal(1000) * torch.linspace(1, 4, 1000)
    with Reader(write(tmp_path / "run.keel", norms)) as run:
        drift = advise(run).drift
    assert drift.low > 1.5
    assert drift.low < drift.value < drift.high


def test_non_finite_zero_and_exploded_steps_are_left_out(tmp_path):
    norms = lognormal(400)
    norms[10], norms[20], norms[300:] = math.nan, 0.0, 1e9
    with Reader(write(tmp_path / "run.keel", norms)) as run:
        advice = advise(run, explosion=Explosion(True, "explosion", step=301, ended="high"))
        assert advice.steps == 298
        assert advice.quantiles[0.99].value < 10
        assert advise(run).steps == 398


def test_too_few_steps(tmp_path):
    with Reader(write(tmp_path / "run.keel", lognormal(19))) as run:
        assert advise(run) is None


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_bounds_must_be_positive(tmp_path, bound):
    with (
        Reader(write(tmp_path / "run.keel", lognormal(30))) as run,
        pytest.raises(ValueError, match="a bound must be a positive finite number"),
    ):
        advise(run, bounds=[bound])


def test_a_policy_of_single_tensors_is_advised_on_single_tensors(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    guard = gk.attach(
        torch.optim.SGD(model.parameters(), lr=1e-3), "norm:0.5", model=model, record=tmp_path / "run.keel"
    )
    for _ in range(60):
        model(torch.randn(8, 4)).square().mean().backward()
        guard.optimizer.step()
        guard.optimizer.zero_grad()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        advice = advise(run)
        assert advice.scope == "tensor"
        live = next(c for c in advice.candidates if c.origin == "live")
        assert live.clip_rate.value == pytest.approx(float((run.norms() > 0.5).double().mean()))
        assert advise(run, scope="global").scope == "global"
