"""A subclass of an optimizer whose step calls its parent's runs torch's hooks twice, and the guard once."""

import pytest
import torch
from torch import nn

import gradkeel as gk


class Delegating(torch.optim.Adam):
    """Calls the step of Adam, which torch has hooked as soon as there has been one Adam."""

    fail = False

    def step(self, closure=None):
        if self.fail:
            raise RuntimeError("before the parent's step")
        return super().step(closure)


def guarded(policy, **arguments):
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    model = nn.Linear(2, 1)
    optimizer = Delegating(model.parameters(), lr=0.1)
    return model, optimizer, gk.attach(optimizer, policy, model=model, **arguments)


def true_norm(model):
    return float(gk.get_total_norm([p.grad for p in model.parameters()]))


def test_is_measured_and_scaled_once():
    model, optimizer, guard = guarded(gk.policies.SmoothClip(1.0))
    for step in (1, 2):
        model(torch.full((1, 2), 10.0)).pow(2).sum().backward()
        norm = true_norm(model)
        optimizer.step()
        assert guard.step == step
        # float32 entries, summed in float32 by neither
        assert guard.report.norm == pytest.approx(norm, rel=1e-6)
        assert true_norm(model) == pytest.approx(norm / (1 + norm), rel=1e-6)
        optimizer.zero_grad()


def test_works_with_a_closure():
    model, optimizer, guard = guarded(gk.policies.SmoothClip(1.0))
    norms = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        norms.append(true_norm(model))
        return loss

    optimizer.step(closure)
    assert guard.step == len(norms) == 1
    assert guard.report.norm == pytest.approx(norms[0], rel=1e-6)


def test_works_under_a_loss_scale():
    model, optimizer, guard = guarded(gk.ClipByGlobalNorm(1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert guard.report.norm == pytest.approx(3**0.5, rel=1e-6)
    assert true_norm(model) == pytest.approx(1.0, rel=1e-6)


def test_divides_a_window_once():
    model, optimizer, guard = guarded(None)
    accumulate = gk.Accumulator(guard, steps=2)
    for micro in accumulate([1.0, 2.0]):
        with micro:
            micro.backward(model(torch.full((3, 2), micro.batch)).sum(), weight=3)
    optimizer.step()
    assert model.weight.grad.tolist() == [[1.5, 1.5]]


def test_goes_on_after_a_step_that_raised():
    model, optimizer, guard = guarded(gk.policies.SmoothClip(1.0))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="parent"):
        optimizer.step()
    optimizer.fail = False
    optimizer.zero_grad()
    model(torch.full((1, 2), 10.0)).sum().backward()
    norm = true_norm(model)
    optimizer.step()
    assert guard.report.norm == pytest.approx(norm, rel=1e-6)


def test_is_told_by_no_name_of_its_first_parameter():
    class Terse(torch.optim.SGD):
        def step(s, closure=None):  # noqa: N805
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    model = nn.Linear(2, 1)
    optimizer = Terse(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, gk.policies.SmoothClip(1.0), model=model)
    for step in (1, 2):
        model(torch.full((1, 2), 10.0)).pow(2).sum().backward()
        norm = true_norm(model)
        optimizer.step()
        assert guard.step == step
        assert true_norm(model) == pytest.approx(norm / (1 + norm), rel=1e-6)  # float32 entries
        optimizer.zero_grad()


def test_a_guarded_parent_class_is_asked_once():
    """Both classes have a gate then, and a step of the subclass goes through both."""
    model, optimizer, guard = guarded(gk.policies.SmoothClip(1.0))
    gk.attach(torch.optim.Adam([nn.Parameter(torch.zeros(1))]), None)
    model(torch.ones(1, 2)).sum().backward()
    norm = true_norm(model)
    optimizer.step()
    assert guard.step == 1
    assert true_norm(model) == pytest.approx(norm / (1 + norm), rel=1e-6)  # float32 entries
