"""Steps that stand out at equal distances: the data's rhythm, unless they do harm."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.explain import explain
from gradkeel.explain.events import find_events
from gradkeel.explain.rhythm import find_rhythm
from gradkeel.record import Reader
from scripted import scripted_run

STEPS, PERIOD = 300, 25
BEATS = range(PERIOD, STEPS + 1, PERIOD)


def noise(seed, size):
    return size * torch.randn(STEPS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explained(path, steps=BEATS, height=5.0, losses=None, also=()):
    """Of a run with a falling loss whose norm is so many times its usual at these steps."""
    norms = torch.exp(noise(0, 0.1))
    for step in steps:
        norms[step - 1] *= height
    for step, factor in also:
        norms[step - 1] = factor
    losses = falling() if losses is None else losses
    return explain(scripted_run(path, norms, losses=losses))


def falling():
    return 2 * torch.exp(-torch.arange(STEPS) / 100) + noise(1, 0.02)


def test_they_are_one_event_and_no_fault(tmp_path):
    explanation = explained(tmp_path / "run.keel")
    assert explanation.verdict == "healthy"
    assert not explanation.explosion.found
    (event,) = explanation.events
    assert (event.kind, event.step, event.period, event.ended) == ("rhythm", PERIOD, PERIOD, "recovered")
    assert event.last_step % PERIOD == 0
    with Reader(tmp_path / "run.keel") as run:
        highest = run.totals()[PERIOD - 1 :: PERIOD]  # also of steps that are no events by themselves
    assert (event.peak_norm, event.peak_step) == (float(highest.max()), PERIOD * (int(highest.argmax()) + 1))
    assert "\nAlso:\n  - Every 25 steps the gradient norm is high for a step, up to" in str(explanation)


def test_a_higher_loss_in_these_very_steps_is_none_either(tmp_path):
    losses = falling()
    losses[PERIOD - 1 :: PERIOD] += 3
    assert explained(tmp_path / "run.keel", losses=losses).verdict == "healthy"


@pytest.mark.parametrize("steps", [[60, 130, 240], [50, 101, 149, 202, 247]])
def test_unequal_distances_are_spikes(tmp_path, steps):
    explanation = explained(tmp_path / "run.keel", steps)
    assert explanation.verdict == "spike_recovered"
    assert [(event.kind, event.step) for event in explanation.events] == [("spike", step) for step in steps]


def test_one_spike_and_two_are_no_rhythm(tmp_path):
    assert explained(tmp_path / "one.keel", [100]).diagnosis.onset == 100
    assert explained(tmp_path / "two.keel", [100, 200]).diagnosis.onset == 100


def test_a_spike_beside_them_is_told(tmp_path):
    explanation = explained(tmp_path / "run.keel", also=[(190, 30.0)])
    assert (explanation.verdict, explanation.diagnosis.onset) == ("spike_recovered", 190)
    assert {event.kind for event in explanation.events} == {"rhythm", "spike"}


def test_one_that_is_not_finite_is_told_with_its_place(tmp_path):
    explanation = explained(tmp_path / "run.keel", also=[(200, math.nan)])
    assert (explanation.verdict, explanation.diagnosis.onset) == ("non_finite", 200)
    assert explanation.diagnosis.where == ("a",)


@pytest.mark.parametrize(("last", "ended"), [(290, "recovered"), (STEPS, "high")])
def test_an_explosion_that_goes_over_some_of_them_is_told_by_itself(tmp_path, last, ended):
    norms = torch.exp(noise(0, 0.1))
    norms[PERIOD - 1 :: PERIOD] *= 5
    norms[255:last] *= 1e4
    explosion, beats = explain(scripted_run(tmp_path / "run.keel", norms)).events[::-1]
    assert (explosion.step, explosion.last_step, explosion.ended) == (256, last, ended)
    assert (beats.kind, beats.period) == ("rhythm", PERIOD)
    assert beats.step <= beats.peak_step <= beats.last_step < 256
    assert beats.peak_norm < 10


def test_a_spike_after_a_hundred_of_them_is_told(tmp_path):
    norms = torch.exp(noise(0, 0.1)).repeat(5)[:1400]
    norms[9::10] *= 5
    norms[1204] *= 100
    explanation = explain(scripted_run(tmp_path / "run.keel", norms))
    assert (explanation.verdict, explanation.diagnosis.onset) == ("spike_recovered", 1205)
    assert [(event.kind, event.period) for event in explanation.events] == [("rhythm", 10), ("spike", None)]


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_of_thousands_many_may_be_low(share):
    norms = torch.exp(
        0.1 * torch.randn(12_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    high = torch.rand(2_000, generator=torch.Generator().manual_seed(1)) < share
    norms[5::6] *= torch.where(high, 5.0, 1.0)
    steps, losses = torch.arange(12_000), torch.full((12_000,), math.nan)
    course = SimpleNamespace(totals=norms, losses=losses, steps=steps, skip_reasons={})
    found = find_rhythm(course, find_events(norms, torch.zeros(12_000, dtype=torch.bool), apart=0))
    assert found.period == 6
    assert int(high.sum()) < len(found.rows) < 1.2 * int(high.sum())


def test_of_a_loss_that_was_not_logged_nothing_is_said(tmp_path):
    norms = torch.exp(noise(0, 0.1))
    norms[PERIOD - 1 :: PERIOD] *= 5
    explanation = explain(scripted_run(tmp_path / "run.keel", norms))
    assert "and the loss, where it was logged, is no worse for it" in str(explanation)


@pytest.mark.parametrize("height", [40.0, 1e6])
def test_what_is_higher_than_a_small_batch_makes_it_is_told(tmp_path, height):
    assert explained(tmp_path / "run.keel", height=height).verdict == "spike_recovered"


def test_one_that_is_far_higher_than_the_others_is_told(tmp_path):
    explanation = explained(tmp_path / "run.keel", height=2.0, also=[(200, 25.0)])
    assert (explanation.verdict, explanation.diagnosis.onset) == ("spike_recovered", 200)


def test_harm_after_each_of_them_is_told(tmp_path):
    losses = falling()
    for step in BEATS:
        losses[step : step + 8] += 1
    explanation = explained(tmp_path / "run.keel", losses=losses)
    assert explanation.verdict.startswith("spike")
    assert explanation.events[0].kind == "spike"


def test_a_loss_that_is_worse_since_is_told(tmp_path):
    losses = falling()
    losses[149:] += 1
    explanation = explained(tmp_path / "run.keel", [150, 175, 200, 225, 250, 275], losses=losses)
    assert (explanation.verdict, explanation.diagnosis.onset) == ("spike_unrecovered", 150)


@pytest.mark.parametrize("seed", range(3))
def test_the_short_last_batch_of_an_epoch(tmp_path, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs = torch.randn(641, 8)
    labels = (inputs @ torch.randn(8, 4) + torch.randn(641, 4)).argmax(dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, model=model, record=tmp_path / "run.keel")
    for _ in range(12):
        for batch in torch.randperm(641).split(32):
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            guard.log(loss=loss)
            optimizer.step()
    guard.detach()
    explanation = explain(tmp_path / "run.keel")
    assert explanation.verdict == "healthy"
    assert {(event.kind, event.period) for event in explanation.events} == {("rhythm", 21)}
