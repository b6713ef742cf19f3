"""Learning rates of every kind that an optimizer may keep: no guard and no recorder asks for a number."""

import numpy as np
import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.record import Reader


class Ours(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.1 * p.grad)


def trained(tmp_path, lr):
    model = nn.Linear(2, 1)
    optimizer = Ours(model.parameters(), lr)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.1), record=tmp_path / "run.keel")
    gk.Autopsy(guard, loss=lambda batch: model(batch).sum())
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert guard.report.clipped
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        return run.scalar("lr").tolist() if "lr" in run.scalar_names else None


@pytest.mark.parametrize(
    "lr", [[0.1, 0.2], (0.1,), {"weight": 0.1}, "auto", None, torch.tensor([0.1, 0.2]), np.ones(2)], ids=repr
)
def test_what_is_no_number_is_not_recorded(tmp_path, lr):
    assert trained(tmp_path, lr) is None


@pytest.mark.parametrize("lr", [0.5, 1, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])], ids=repr)
def test_a_number_is(tmp_path, lr):
    assert trained(tmp_path, lr) == [float(lr)] * 2
