"""Skipping, and going back."""

import math

import pytest
import torch
from torch import nn, optim

from gradkeel.apply.skip import Snapshot, clear_gradients
from optimizers import contents, is_same


def test_cleared_gradients_are_none():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad = torch.ones(2)
    clear_gradients(parameters)
    assert [p.grad for p in parameters] == [None, None]


def parts(flat):
    return [flat[:2], flat[2:]]


def swapped(flat):
    """As loops put parts of a buffer in the place of gradients: no views, but each lies in a larger storage."""
    found = [torch.ones(2), torch.ones(3)]
    for gradient, part in zip(found, parts(flat), strict=True):
        gradient.data = part
    return found


@pytest.mark.parametrize(
    "cut",
    [parts, swapped, lambda flat: [flat.view(5)], lambda flat: [flat.view(5)] * 2],
    ids=["parts", "swapped", "one", "one, twice"],
)
def test_gradients_in_a_buffer_stay_there_and_are_0(cut):
    flat = torch.full((5,), math.nan)
    gradients = cut(flat)
    parameters = [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    clear_gradients(parameters)
    assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
    assert flat.tolist() == [0.0] * 5


def test_a_gradient_that_autograd_did_not_make_stays_and_is_0():
    flat = torch.ones(3)
    flat.grad = buffer = torch.tensor([math.inf, math.nan, 1.0])
    clear_gradients([flat])
    assert flat.grad is buffer
    assert buffer.tolist() == [0.0] * 3


def test_a_gradient_that_nobody_may_write_to_is_dropped():
    weight = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        flat = torch.full((6,), math.nan)
        weight.grad = flat[:3]
    clear_gradients([weight])
    assert weight.grad is None
    with torch.inference_mode():
        weight.grad = flat[:3]
        clear_gradients([weight])
    assert flat.tolist()[:3] == [0.0] * 3


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_sparse_gradients_and_those_with_a_graph_are_dropped():
    table, weight = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(3))
    table(torch.tensor([1, 1])).sum().backward()
    weight.square().sum().backward(create_graph=True)
    clear_gradients([table.weight, weight])
    assert [table.weight.grad, weight.grad] == [None, None]


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
