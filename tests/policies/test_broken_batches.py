"""The example of ``docs/how-to-choose.md``: bad batches throw an unguarded run off, and a guarded one not."""

import itertools
import math

import pytest
import torch

import gradkeel as gk
from gradkeel.compare import load_task

EXAMPLE = "examples.broken_batches:make_task"


def train(policy, steps=250):
    task = load_task(EXAMPLE)
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(model, 0.1)
    guard = gk.attach(optimizer, policy, model=model, nonfinite="keep")
    for batch in itertools.islice(task.batches(0), steps):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        guard.log(loss=loss)
        optimizer.step()
    return task.validation_loss(model)


def test_without_a_policy_the_run_is_lost():
    loss = train(None)
    assert not loss < 10 or math.isnan(loss)


@pytest.mark.parametrize("policy", ["zclip", "robust", "autoclip", "skip-step", "global-norm:1.0"])
def test_with_one_it_is_not(policy):
    assert train(policy) < 0.2


def test_negative_losses_that_were_constant_do_not_make_every_later_step_be_skipped():
    weight = torch.nn.Parameter(torch.ones(3))
    guard = gk.attach(torch.optim.SGD([weight], lr=0.1), "skip-step:6,window=16,warmup=4")
    stepped = []
    for loss in [-2.0] * 20 + [-1.0] * 20:
        weight.grad = torch.ones(3)
        guard.log(loss=loss)
        guard.optimizer.step()
        stepped.append(guard.report.stepped)
    assert all(stepped[:20])
    assert not stepped[20]  # it is a jump
    assert all(stepped[-10:])  # which the window has taken up
