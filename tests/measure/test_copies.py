"""`Copies`: how far tensors have moved, whatever they are made of and wherever they lie by then."""

import pytest
import torch
from torch import nn

from gradkeel.measure.copies import Copies
from gradkeel.measure.powers import read

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def copies_of(tensors):
    return Copies(tensors, read(tensors, 2.0, CPU).table)


def distance(tensor, before):
    return float(torch.linalg.vector_norm(tensor.detach().double().flatten() - before.double().flatten()))


def moved(parameters):
    """Move each a little, in place, as optimizers do; returns what they were."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01 * torch.randn_like(parameter))
    return before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 4), (300_000,)])
def test_distances_are_their_float64_twins(path, dtype, shape):
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)), nn.Parameter(torch.randn(4, dtype=dtype))]
    copies = copies_of(parameters)
    before = moved(parameters)
    found = copies.distances(parameters, CPU)
    assert found.dtype == torch.float64
    wanted = [distance(p, old) for p, old in zip(parameters, before, strict=True)]
    # Float64 additions in another order; torch's operations round each difference to the tensors' own dtype.
    tolerance = 1e-11 if path == "native" else max(torch.finfo(dtype).eps, 1e-11)
    assert found.tolist() == pytest.approx(wanted, rel=tolerance)


def test_tensors_of_several_dtypes_and_layouts_together():
    parameters = [
        nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(5, dtype=torch.float64)),
        nn.Parameter(torch.randn(6, 4).T),
    ]
    copies = copies_of(parameters)
    before = moved(parameters)
    wanted = [distance(p, old) for p, old in zip(parameters, before, strict=True)]
    assert copies.distances(parameters, CPU).tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "replaced",
    [
        lambda w: w + 0.5,
        lambda w: (w + 0.5).T.contiguous().T,
        lambda w: (w + 0.5).double(),
        lambda w: w.T,  # the same memory
        torch._neg_view,
    ],
)
def test_weights_that_the_optimizer_puts_others_in_the_place_of(replaced):
    parameters = [nn.Parameter(torch.randn(17, 17)), nn.Parameter(torch.randn(5))]
    copies = copies_of(parameters)
    before = [p.detach().clone() for p in parameters]
    parameters[0].data = replaced(parameters[0].detach())
    moved(parameters[1:])
    wanted = [distance(p, old) for p, old in zip(parameters, before, strict=True)]
    assert copies.distances(parameters, CPU).tolist() == pytest.approx(wanted, rel=1e-6)


def test_what_is_not_finite_and_what_leaves_the_range_of_squares():
    parameters = [
        nn.Parameter(torch.tensor([1e200, 0.0], dtype=torch.float64)),
        nn.Parameter(torch.zeros(3, dtype=torch.float64)),
        nn.Parameter(torch.ones(2)),
    ]
    copies = copies_of(parameters)
    with torch.no_grad():
        parameters[0][0] = -2e200
        parameters[1].fill_(1e-200)
        parameters[2][1] = torch.nan
    found = copies.distances(parameters, CPU).tolist()
    assert found[:2] == pytest.approx([3e200, 3**0.5 * 1e-200], rel=1e-12)
    assert found[2] != found[2]


def test_weights_with_the_negative_bit():
    weight = torch._neg_view(torch.tensor([1.0, 2.0]))
    copies = copies_of([weight])
    weight.data = weight.data + 0.0
    assert copies.distances([weight], CPU).tolist() == [0.0]


def test_what_has_another_size_has_no_distance():
    weight = nn.Parameter(torch.ones(3))
    copies = copies_of([weight])
    weight.data = weight.data[:1].clone()
    assert copies.distances([weight], CPU).isnan().all()


def test_no_tensors():
    assert copies_of([]).distances([], CPU).tolist() == []


def test_the_kernels_copy_what_is_contiguous(path):
    """Else the tests above would compare torch's operations with themselves."""
    parameters = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(2, dtype=torch.bfloat16))]
    copies = copies_of(parameters)
    assert (copies._copied is not None, copies._clones == []) == (path == "native",) * 2
    if path == "native":
        for parameter, own in zip(parameters, copies._copied.tensors(), strict=True):
            assert own.data_ptr() % 64 == 0
            assert (own.dtype, own.tolist()) == (parameter.dtype, parameter.flatten().tolist())
