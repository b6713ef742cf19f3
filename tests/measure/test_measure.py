"""`measure`: the norms of one selection, with what is missing, prescaled, sparse or complex."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference
from gradkeel.norms import Needs, combine
from gradkeel.ranks.total import measure_total
from gradkeel.selection import Selection
from gradkeel.tensors import entries_by_position, entries_to_read, entries_to_scale
from measuring import measure

CPU = torch.device("cpu")


def selection_of(*gradients):
    parameters = [nn.Parameter(torch.full((3,) if g is None else g.shape, 2.0)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    names = tuple(f"p{i}" for i in range(len(parameters)))
    return Selection("main", names, tuple(parameters), tuple(i // 2 for i in range(len(parameters))))


def test_everything_that_is_asked_for_is_measured_once():
    selection = selection_of(torch.tensor([[3.0, 4.0], [0.0, -1.0]]), None, torch.tensor([2.0]))
    needs = Needs(2.0, weights=True, unit_dim=0, peaks=True)
    measured, present = measure(selection, needs, device=CPU, prescale=0.5, step=7, loss=torch.tensor(3.0))
    assert present == (True, False, True)
    assert measured.names == ("p0", "p1", "p2")
    assert measured.groups == (0, 0, 1)
    assert (measured.step, measured.norm_type, measured.loss.item()) == (7, 2.0, 3.0)
    # norms of the true gradients: the prescale is in them, but not in the weights
    assert measured.norms.tolist() == pytest.approx([0.5 * 26**0.5, 0.0, 1.0])
    assert measured.total.item() == pytest.approx(0.5 * 30**0.5)
    assert measured.weights.tolist() == pytest.approx([4.0, 12**0.5, 2.0])
    assert measured.units.tolist() == pytest.approx([2.5, 0.5, 0.0, 1.0])
    assert measured.unit_weights.tolist() == pytest.approx([8**0.5, 8**0.5, 12**0.5, 2.0])
    assert (measured.sizes, measured.unit_counts, measured.unit_sizes) == ((4, 3, 1), (2, 1, 1), (2, 3, 1))
    assert measured.peaks.tolist() == [[-0.5, 2.0], [0.0, 0.0], [1.0, 1.0]]


def test_nothing_more_is_measured():
    measured, _ = measure(selection_of(torch.ones(2)), Needs(), device=CPU)
    assert (measured.weights, measured.units, measured.unit_weights, measured.peaks) == (None,) * 4


def test_no_parameters_at_all():
    measured, present = measure(selection_of(), Needs(2.0, True, 0, True), device=CPU)
    assert (measured.total.item(), measured.norms.shape, measured.units.shape, present) == (
        0.0,
        (0,),
        (0,),
        (),
    )


def test_a_prescale_may_be_a_tensor():
    measured, _ = measure(
        selection_of(torch.tensor([3.0, 4.0])), Needs(), device=CPU, prescale=torch.tensor(2.0)
    )
    assert measured.total.item() == 10.0


def test_the_whole_of_finite_parts_is_finite():
    for size, power in [(1e200, 1), (1e-200, 1), (1e308, 0.5)]:
        parts = torch.tensor([size, size, 0.0], dtype=torch.float64)
        assert combine(parts, 2.0).item() == pytest.approx(math.sqrt(2.0) * size * power / power, rel=1e-12)


@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), max_size=6),
    st.sampled_from([0.5, 1.0, 2.0, 4.0, math.inf]),
)
def test_parts_combine_to_the_norm_of_all_entries(parts, norm_type):
    got = combine(torch.tensor(parts, dtype=torch.float64), norm_type).item()
    assert got == pytest.approx(
        reference.norm([torch.tensor(parts, dtype=torch.float64)], norm_type), rel=1e-12
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_part_that_is_not_finite_makes_the_whole_so(bad):
    for norm_type in (1.0, 2.0, math.inf):
        assert str(combine(torch.tensor([1.0, bad]), norm_type).item()) == str(bad)


# -- where entries lie --------------------------------------------------------------------------------------------


def sparse(coalesced=False):
    """Rows 0 and 2 of a 3 x 2 gradient, row 0 twice."""
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]])
    made = torch.sparse_coo_tensor([[0, 2, 0]], values, (3, 2), check_invariants=True)
    return made.coalesce() if coalesced else made


@pytest.mark.parametrize("coalesced", [False, True])
def test_duplicate_rows_of_a_sparse_gradient_are_summed_before_they_are_measured(coalesced):
    gradient = sparse(coalesced)
    assert measure_total([gradient], 2.0, CPU).item() == pytest.approx(reference.norm([gradient.to_dense()]))
    assert measure_total([gradient], math.inf, CPU).item() == 4.0
    entries_to_scale(gradient).mul_(2.0)
    assert torch.equal(gradient.to_dense(), 2.0 * sparse().to_dense())


def test_units_of_a_sparse_gradient_are_rows_of_its_dense_one():
    measured, _ = measure(selection_of(sparse()), Needs(2.0, unit_dim=0), device=CPU)
    assert measured.units.tolist() == pytest.approx([5.0, 0.0, 5.0])
    assert torch.equal(entries_by_position(sparse()), sparse().to_dense())


def test_complex_entries_are_pairs_of_real_ones():
    gradient = torch.tensor([3.0 - 4.0j, 0.0 + 12.0j])
    assert measure_total([gradient], 2.0, CPU).item() == 13.0
    assert measure_total([gradient], math.inf, CPU).item() == 12.0
    assert measure_total([gradient.conj()], 2.0, CPU).item() == 13.0
    entries_to_scale(gradient).mul_(2.0)
    assert gradient.tolist() == [6.0 - 8.0j, 24.0j]


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
def test_a_complex_vector_is_one_unit_and_a_matrix_one_for_each_row(shape):
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.complex64))
    parameter.grad = torch.full(shape, 3.0 - 4.0j)
    real = nn.Parameter(torch.zeros(2, 2))
    real.grad = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    selection = Selection("main", ("complex", "real"), (parameter, real), (0, 0))
    measured, _ = measure(selection, Needs(2.0, weights=True, unit_dim=0), device=CPU)
    own = {(): [5.0], (2,): [50**0.5], (2, 1): [5.0, 5.0]}[shape]
    assert measured.units.tolist() == pytest.approx([*own, 5.0, 1.0])
    assert measured.unit_counts == (len(own), 2)
    assert measured.unit_weights.shape == measured.units.shape


def test_strided_entries_are_not_copied():
    gradient = torch.ones(2, 3).t()
    assert entries_to_read(gradient).data_ptr() == gradient.data_ptr()
    assert entries_to_scale(gradient).data_ptr() == gradient.data_ptr()
