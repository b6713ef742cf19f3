"""A spike that was rolled back is named, though the steps that hold show nothing of it."""

import copy

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel import language
from gradkeel.explain import explain
from gradkeel.explain.words import rolled_back


def train(path, steps, checkpoint=None, spike=None):
    """Steps of a small network, with a batch a thousand times too large at ``spike``; a checkpoint of the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = gk.attach(optimizer, "global-norm:100", model=model, record=path)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        guard.load_state_dict(checkpoint["guard"])
    for step in steps:
        torch.manual_seed(step)
        loss = (model(torch.randn(16, 4)) - 1).square().mean() * (1000 if step == spike else 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = copy.deepcopy({"guard": guard.state_dict(), "model": model.state_dict()})
    guard.detach()
    return checkpoint


@pytest.mark.parametrize("back_to", [101, 1])
def test_a_spike_that_was_rolled_back_is_named(tmp_path, back_to):
    """F4: it was overwritten, and explain found nothing."""
    path = tmp_path / "run.keel"
    checkpoint = train(path, range(1, 101))
    train(path, range(101, 151), checkpoint, spike=120)
    train(path, range(back_to, 201), checkpoint if back_to > 1 else None)
    explanation = explain(path)
    assert not explanation.explosion.found
    (old,) = explanation.rolled_back
    assert (old.step, old.last_step, old.steps, old.session) == (back_to, 150, 151 - back_to, 3)
    assert [(event.kind, event.step) for event in old.events] == [("spike", 120)]
    text = str(explanation)
    assert f"Steps {back_to} to 150 were recorded again from step {back_to} on (session 3)" in text
    assert "at step 120" in text
    plain = explanation.to_json()
    assert plain["rolled_back"][0]["events"][0]["step"] == 120


def test_a_spike_that_was_kept_is_not_told_twice(tmp_path):
    path = tmp_path / "run.keel"
    checkpoint = train(path, range(1, 101), spike=60)
    train(path, range(101, 131), checkpoint)
    train(path, range(101, 161), checkpoint)
    explanation = explain(path)
    assert explanation.explosion.step == 60
    assert explanation.rolled_back[0].events == ()
    assert str(explanation).count("The gradients spiked at step 60") == 1
    assert "No explosion was found in them." in str(explanation)


def test_one_step_that_was_recorded_again_is_one_step(tmp_path):
    path = tmp_path / "run.keel"
    checkpoint = train(path, range(1, 101))
    train(path, range(101, 102), checkpoint)
    train(path, range(101, 131), checkpoint)
    explanation = explain(path)
    assert [(old.step, old.last_step) for old in explanation.rolled_back] == [(101, 101)]
    (words,) = rolled_back(explanation)
    assert words.startswith("Step 101 was recorded again (session 3), and does not count above.")
    language.choose("zh")
    try:
        assert language.shown(words).startswith("第 101 步后来重新记录过（会话 3），上面不计入。")
    finally:
        language.choose(None)


def test_only_the_last_of_many_rollbacks_are_explained(tmp_path):
    path = tmp_path / "run.keel"
    for _ in range(11):
        train(path, range(1, 6))
    explanation = explain(path)
    assert len(explanation.rolled_back) == 8
    assert explanation.rolled_back[-1].session == 11
