"""Adam's second moment behind its gradients: measured with the samples of the weights, and a cause of its own."""

import pytest
import torch
from torch import nn

import gradkeel as gk

STEPS, JUMP = 180, 120


def trained(path, weight, kind=torch.optim.AdamW, **options):
    """A regression; from step ``JUMP`` on ``weight(step)`` multiplies the loss that is differentiated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    inputs = torch.randn(4096, 10)
    targets = inputs.sum(dim=1, keepdim=True)
    guard = gk.attach(optimizer, None, model=model, record=path)
    for step in range(1, STEPS + 1):
        rows = torch.randint(4096, (32,))
        loss = nn.functional.mse_loss(model(inputs[rows]), targets[rows])
        (loss * weight(step)).backward()
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    with gk.record.Reader(path) as run:
        return run.scalar("second_moment_lag"), gk.explain.explain(path)


@pytest.mark.parametrize("beta2", [0.999, 0.9999])
def test_gradients_that_grow_for_good_are_ahead_of_it(tmp_path, beta2):
    lags, found = trained(
        tmp_path / "run.keel", lambda step: 100.0 if step >= JUMP else 1.0, betas=(0.9, beta2)
    )
    assert lags[:100].nan_to_num(1.0).median() < 2
    assert lags[JUMP - 1] > 10
    assert found.diagnosis.cause == "second_moment_lag"


@pytest.mark.parametrize("weight", [lambda step: 1.0, lambda step: 100.0 if step == JUMP else 1.0])
def test_a_single_batch_or_none_is_no_lag(tmp_path, weight):
    _, found = trained(tmp_path / "run.keel", weight)
    assert found.diagnosis.cause is None


def test_what_it_is(tmp_path):
    """By hand in float64: after steps with gradients g1, g2 the third is compared with their bias-corrected mean."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter], lr=1e-3, betas=(0.9, 0.99))
    guard = gk.attach(optimizer, "global-norm:2.0", record=tmp_path / "run.keel")
    gradients = [torch.tensor(values) for values in ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [6.0, 8.0, 0.0])]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    guard.detach()
    moment = (0.01 * 0.99 * gradients[0].double() ** 2 + 0.01 * gradients[1].double() ** 2) / (1 - 0.99**2)
    with gk.record.Reader(tmp_path / "run.keel") as run:
        lags = run.scalar("second_moment_lag")
    assert lags[0].isnan()  # nothing is remembered yet
    assert float(lags[2]) == pytest.approx(2.0 / float(moment.sum().sqrt()), rel=1e-5)  # clipped from 10 to 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_without_a_second_moment_have_none(tmp_path, kind):
    lags, _ = trained(tmp_path / "run.keel", lambda step: 1.0, kind)
    assert lags.isnan().all()
