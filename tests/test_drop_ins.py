"""The drop-ins stand where torch's functions stand: what torch's own tests of its clips ask, asked of both.

torch's files are not here; these tests ask the same things of torch and of the drop-ins, and the two must agree, but
for the exceptions that docs/comparison.md lists.
"""

import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import utils

import gradkeel as gk

ORDERS = [0, 0.1, 1, 2, 3.5, math.inf, -0.1, -1, -2, -3.5]


def linear():
    """A layer with gradients of very different sizes, from 1 to 100 and 0.001."""
    layer = nn.Linear(10, 10)
    layer.weight.grad = torch.arange(1.0, 101.0).view(10, 10)
    layer.bias.grad = torch.full((10,), 0.001)
    return layer


def scaled_by(layer, before):
    """By what the gradients were multiplied, the same everywhere."""
    ratios = torch.cat([(p.grad / g).flatten() for p, g in zip(layer.parameters(), before, strict=True)])
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    return float(ratios[0])


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2, 4, "inf"])
@pytest.mark.parametrize("halves", [False, True])
def test_the_norm_is_bounded_and_the_direction_kept(norm_type, foreach, halves):
    layer, theirs = linear(), linear()
    before = [p.grad.clone() for p in layer.parameters()]
    wanted = utils.clip_grad_norm_(theirs.parameters(), 2, norm_type=norm_type, foreach=foreach)
    if halves:
        norm = gk.get_total_norm([p.grad for p in layer.parameters()], norm_type=norm_type, foreach=foreach)
        gk.clip_grads_with_norm_(layer.parameters(), 2, norm, foreach=foreach)
    else:
        norm = gk.clip_grad_norm_(layer.parameters(), 2, norm_type=norm_type, foreach=foreach)
    torch.testing.assert_close(norm, wanted)
    torch.testing.assert_close(layer.weight.grad, theirs.weight.grad)
    after = utils.get_total_norm([p.grad for p in layer.parameters()], norm_type)
    torch.testing.assert_close(after, torch.tensor(2.0))
    assert scaled_by(layer, before) == pytest.approx(2.0 / float(norm), rel=1e-5)


@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2, 4, "inf"])
def test_small_gradients_are_left_unchanged(norm_type):
    layer = nn.Linear(10, 10)
    layer.weight.grad, layer.bias.grad = torch.rand(10, 10) / 1e5, torch.full((10,), 1e-5)
    before = [p.grad.clone() for p in layer.parameters()]
    gk.clip_grad_norm_(layer.parameters(), 2, norm_type=norm_type)
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_a_tensor_may_stand_for_a_list_and_need_no_gradient(clip):
    one, other = (
        torch.randn(10, 10),
        torch.randn(10, 10),
    )  # neither is a parameter; torch sets .grad all the same
    for tensor in (one, other):
        tensor.grad = torch.arange(1.0, 101.0).view(10, 10)
    getattr(gk, clip)(one, 2)
    getattr(gk, clip)([other], 2)
    assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("clip", ["clip_grad_norm_"])  # torch's clip_grad_value_ says nothing
def test_the_words_for_an_exhausted_generator_are_torchs(clip):
    said = []
    for module in (utils, gk):
        generator = linear().parameters()
        list(generator)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(module, clip)(generator, 2)
        said.append([(str(one.message), one.category, one.filename) for one in caught])
    if not said[0]:
        pytest.skip("torch 2.6 says nothing")
    assert said[0] == said[1]
    assert said[0][0][2] == __file__  # both point at the caller


def in_a_loop(value, *, is_alone, has_finite_before):
    """float64 gradients of 10 entries: all of them ``value``, or one beside zeros; and a 1 in front."""
    gradient = torch.full((10,), value, dtype=torch.float64)
    if is_alone:
        gradient = torch.zeros(10, dtype=torch.float64).index_fill(0, torch.tensor(1), value)
    given = [torch.ones(1, dtype=torch.float64)] * has_finite_before + [gradient]
    parameters = [nn.Parameter(torch.ones_like(one)) for one in given]
    for parameter, one in zip(parameters, given, strict=True):
        parameter.grad = one.clone()
    return parameters


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2e22, -2e22, 2e200, -2e200])
@pytest.mark.parametrize(("is_alone", "has_finite_before"), [*itertools.product([True, False], repeat=2)])
@pytest.mark.parametrize("norm_type", ORDERS)
def test_a_norm_that_is_not_finite_is_an_error_where_it_is_one_in_torch(
    norm_type, is_alone, has_finite_before, value
):
    theirs = in_a_loop(value, is_alone=is_alone, has_finite_before=has_finite_before)
    ours = copy.deepcopy(theirs)
    for parameter, like in zip(ours, theirs, strict=True):
        parameter.grad = like.grad.clone()
    raised = []
    for module, parameters in ((utils, theirs), (gk, ours)):
        before = [p.grad.clone() for p in parameters]
        try:
            module.clip_grad_norm_(parameters, 1, norm_type=norm_type, error_if_nonfinite=True)
            raised.append(None)
        except RuntimeError as error:
            raised.append(str(error).partition(" is non-finite")[0])
            for parameter, gradient in zip(parameters, before, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)
    if math.isfinite(value):  # torch's powers of 2e200 leave float64's range, and its error is wrong
        assert raised[1] is None
        assert raised[0] is None or (abs(value) == 2e200 and abs(norm_type) in (2, 3.5))
    else:
        assert raised[1] == raised[0]


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_are_clamped_as_torch_does(has_bias, foreach):
    layer, theirs = nn.Linear(10, 10), nn.Linear(10, 10)
    for one in (layer, theirs):
        one.weight.grad = torch.arange(-50.0, 50.0).view(10, 10) / 5
        one.bias.grad = torch.full((10,), 2.0) if has_bias else None
    gk.clip_grad_value_(layer.parameters(), 2.5, foreach=foreach)
    utils.clip_grad_value_(theirs.parameters(), 2.5, foreach=foreach)
    assert torch.equal(layer.weight.grad, theirs.weight.grad)
    assert float(layer.weight.grad.abs().max()) == 2.5
    assert (layer.bias.grad is not None) == has_bias
