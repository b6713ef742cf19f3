"""Skipping, and going back."""

import torch
from torch import nn, optim

from gradkeel.apply.skip import Snapshot, clear_gradients
from optimizers import contents, is_same


def test_cleared_gradients_are_none():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad = torch.ones(2)
    clear_gradients(parameters)
    assert [p.grad for p in parameters] == [None, None]


def test_a_snapshot_restores_every_bit_and_can_be_taken_before_any_state_exists():
    model = nn.Linear(2, 1)
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        before, snapshot = contents(model, optimizer), Snapshot(optimizer)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert not is_same(contents(model, optimizer), before)
        snapshot.restore()
        assert is_same(contents(model, optimizer), before)
        optimizer.step()


def test_a_snapshot_is_a_copy():
    model = nn.Linear(2, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before, snapshot = contents(model, optimizer), Snapshot(optimizer)
    for _ in range(2):
        optimizer.step()
    snapshot.restore()
    assert is_same(contents(model, optimizer), before)
