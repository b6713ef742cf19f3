"""Gradients whose entries share memory, and parameters beside another default device."""

import pytest
import torch
from torch import nn

import gradkeel as gk


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["global-norm:0.5", "norm:0.5", "value:0.5", "agc:0.1"])
def test_an_expanded_gradient_is_clipped_like_its_copy(policy, fused):
    results = []
    for gradient in (torch.ones(1, 1).expand(3, 2), torch.ones(3, 2)):
        parameter = nn.Parameter(torch.ones(3, 2))
        optimizer = torch.optim.SGD([parameter], lr=1.0, fused=fused)
        gk.attach(optimizer, policy)
        parameter.grad = gradient
        optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.zeros(3, 2))


def test_cpu_parameters_beside_another_default_device():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    guard = gk.attach(optimizer, gk.policies.parse("norm:0.5+value:0.1").policy)
    parameter.grad = torch.ones(3)
    with torch.device("meta"):
        optimizer.step()
    assert guard.report.norm == pytest.approx(3**0.5)
    assert parameter.tolist() == pytest.approx([0.9] * 3)
