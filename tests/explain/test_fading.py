"""Vanishing, dead and frozen parameters, in real training."""

import torch
from torch import nn

import gradkeel as gk
from gradkeel.explain import explain


def train(path, model, optimizer, steps=128, change=None):
    guard = gk.attach(optimizer, None, model=model, record=path)
    for step in range(1, steps + 1):
        if change is not None:
            change(step)
        model(torch.randn(32, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    return explain(path).fading


def test_a_healthy_network_has_none(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    fading = train(tmp_path / "run.keel", model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert (fading.vanishing, fading.dead, fading.frozen) == ((), (), ())


def test_a_layer_whose_gradient_vanishes(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def cut_off(step):
        if step == 65:
            with torch.no_grad():
                model[2].weight.mul_(1e-7)

    fading = train(tmp_path / "run.keel", model, torch.optim.SGD(model.parameters(), lr=1e-6), change=cut_off)
    assert {faded.parameter for faded in fading.vanishing} == {"0.weight", "0.bias"}
    for faded in fading.vanishing:
        assert 63 <= faded.since <= 66
        assert faded.share < 1e-4


def test_a_layer_behind_dead_units(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    def kill(step):
        if step == 33:
            with torch.no_grad():
                model[0].bias.fill_(-1e3)

    fading = train(tmp_path / "run.keel", model, torch.optim.SGD(model.parameters(), lr=0.01), change=kill)
    assert {faded.parameter for faded in fading.dead} == {"0.weight", "0.bias", "2.weight"}
    assert all(31 <= faded.since <= 34 and faded.share == 0 for faded in fading.dead)


def test_frozen_ones(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    groups = [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    fading = train(tmp_path / "run.keel", model, torch.optim.SGD(groups, lr=0.01))
    assert fading.frozen == ("0.weight", "2.weight", "2.bias")
    assert fading.dead == ()
