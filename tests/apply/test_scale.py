"""`apply`: the only writer of gradients."""

import math

import pytest
import torch
from torch import nn

import reference
from gradkeel.apply import apply, factors
from gradkeel.norms import Decision, Needs
from gradkeel.selection import Selection
from measuring import measure

CPU = torch.device("cpu")


def applied(decision, *gradients, prescale=1.0, needs=Needs(), unit_dim=None):  # noqa: B008  frozen
    """The gradients after a decision has been carried out on them, and how often each was written."""
    parameters = [nn.Parameter(torch.zeros(2) if g is None else torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    names = tuple(map(str, range(len(parameters))))
    measured, _ = measure(
        Selection("main", names, tuple(parameters), (0,) * len(names)), needs, device=CPU, prescale=prescale
    )
    versions = [p.grad._version if p.grad is not None else 0 for p in parameters]
    apply(parameters, decision, measured, prescale=prescale, unit_dim=unit_dim)
    left = [p.grad for p in parameters]
    return left, [
        g._version - version if g is not None else 0 for g, version in zip(left, versions, strict=True)
    ]


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_each_gradient_is_multiplied_once_and_rounded_once(dtype):
    gradients = [torch.randn(5, dtype=dtype), torch.randn(2, 3, dtype=dtype)]
    left, written = applied(Decision(coefficients=wide(0.3, 0.7)), *gradients)
    for got, gradient, coefficient in zip(left, gradients, (0.3, 0.7), strict=True):
        wanted = reference.scaled([gradient], coefficient)[0]
        # the kernel multiplies by a coefficient of its own wider type: one more rounding for float32
        torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=0)
    assert written == [1, 1]


def test_prescale_and_coefficient_are_one_factor():
    gradient = torch.randn(100)
    left, written = applied(Decision(coefficients=wide(0.3)[0]), gradient, prescale=wide(1 / 7)[0])
    torch.testing.assert_close(left, reference.scaled([gradient], 0.3 / 7), rtol=1.2e-7, atol=0)
    assert written == [1]


@pytest.mark.parametrize(
    ("decision", "prescale", "wanted"),
    [
        (Decision(), 1.0, 1.0),
        (Decision(), 0.5, 0.5),
        (Decision(), torch.tensor(0.5), 0.5),
        (Decision(coefficients=torch.tensor(0.5)), 1.0, 0.5),
        (Decision(coefficients=torch.tensor(0.5)), torch.tensor(0.5), 0.25),
        (Decision(clamp=(-1.0, 1.0)), 1.0, 1.0),
    ],
)
def test_factors(decision, prescale, wanted):
    assert float(factors(decision, prescale)) == wanted


def test_what_needs_nothing_is_not_touched():
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), None]
    assert applied(Decision(), *gradients)[1] == [0, 0, 0]
    assert applied(Decision(coefficients=wide(1.0)[0]), *gradients)[1] == [0, 0, 0]
    assert applied(Decision(coefficients=wide(0.5, 1.0, 1.0)), *gradients)[1] == [1, 0, 0]
    clamped = applied(Decision(clamp=(-1.0, 1.0)), *gradients, needs=Needs(peaks=True))
    assert clamped[1] == [1, 0, 0]


def test_a_clamp_keeps_what_is_not_a_number():
    ((left,), _) = applied(
        Decision(clamp=(-1.0, 2.0)), torch.tensor([-5.0, math.nan, 1.5, math.inf]), needs=Needs(peaks=True)
    )
    assert left.tolist()[::2] == [-1.0, 1.5]
    assert math.isnan(left[1])
    assert left[3] == 2.0


def test_a_prescaled_clamp_never_exceeds_its_limit():
    # clamping at limit / scale and scaling afterwards would exceed it by a rounding for some of these
    gradient = torch.rand(1000) * 1e4
    for scale in (3.0, 7.0, 65535.0):
        ((left,), _) = applied(
            Decision(clamp=(-0.1, 0.1)), gradient, prescale=wide(1 / scale)[0], needs=Needs(peaks=True)
        )
        assert left.max() <= torch.tensor(0.1)
        torch.testing.assert_close(left, (gradient.double() / scale).clamp(max=0.1).float())


def test_each_unit_has_its_coefficient():
    gradients = [torch.ones(2, 3), torch.ones(4), torch.ones(2, 2, dtype=torch.bfloat16), None]
    decision = Decision(unit_coefficients=wide(0.5, 0.25, 0.125, 1.0, 1.0, 1.0))
    left, written = applied(decision, *gradients, needs=Needs(unit_dim=0), unit_dim=0)
    assert left[0].tolist() == [[0.5] * 3, [0.25] * 3]
    assert left[1].tolist() == [0.125] * 4
    assert written == [1, 1, 0, 0]
    ((left,), _) = applied(
        Decision(unit_coefficients=wide(0.5, 0.25)), torch.ones(3, 2), needs=Needs(unit_dim=1), unit_dim=1
    )
    assert left.tolist() == [[0.5, 0.25]] * 3


def test_units_of_complex_and_sparse_gradients():
    decision = Decision(unit_coefficients=wide(0.5, 0.25))
    ((left,), _) = applied(
        decision, torch.ones(2, 2, dtype=torch.complex64), needs=Needs(unit_dim=0), unit_dim=0
    )
    assert left.tolist() == [[0.5 + 0j] * 2, [0.25 + 0j] * 2]
    sparse = torch.sparse_coo_tensor([[1, 0, 1]], torch.ones(3, 2), (2, 2), check_invariants=True)
    ((left,), _) = applied(decision, sparse, needs=Needs(unit_dim=0), unit_dim=0)
    assert left.to_dense().tolist() == [[0.5] * 2, [0.5] * 2]


def test_a_sparse_gradient_is_clamped_as_its_dense_one():
    sparse = torch.sparse_coo_tensor([[0, 2, 0]], [0.8, -3.0, 0.8], (4,), check_invariants=True)
    ((left,), _) = applied(Decision(clamp=(-1.0, 1.0)), sparse, needs=Needs(peaks=True))
    assert left.is_sparse
    assert left.to_dense().tolist() == [1.0, 0.0, -1.0, 0.0]
