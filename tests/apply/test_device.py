"""What is done on an accelerator, where the host must not look at factors; run here on CPU tensors."""

import math

import pytest
import torch

import reference
from gradkeel.apply import device, host
from gradkeel.kernels import foreach, native
from gradkeel.measure.device import read
from gradkeel.tensors import limits_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[None, 50], autouse=True)
def path(request, monkeypatch):
    """Without the native kernels; also where copies are made of few tensors at once."""
    monkeypatch.setattr(native, "kernels", lambda: None)
    if request.param is not None:
        monkeypatch.setattr(foreach, "BUCKET", request.param)


def multiplied(tensors, factors):
    """The product in the wider type, rounded once; factors are tensors that the tensors broadcast with."""
    result = []
    for tensor, factor in zip(tensors, factors, strict=True):
        wide = torch.promote_types(tensor.dtype, torch.float32)
        result.append((tensor.to(wide) * factor.to(wide)).to(tensor.dtype))
    return result


def channels_last(dtype):
    return torch.randn(3, 4, 5, 2).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("factors", [0.3333, [0.5, 1.0, 1e-3, 7.0, 1.0, 0.3, 0.7, 0.9]])
def test_factors_are_multiplied_in_the_wider_type_and_rounded_once(factors):
    tensors = [torch.randn(33).to(dtype) for dtype in DTYPES]
    tensors += [torch.randn(4, 5), torch.zeros(0), torch.randn(()).bfloat16(), channels_last(torch.float16)]
    given = torch.tensor(factors, dtype=torch.float64)
    wanted = multiplied(tensors, given.expand(len(tensors)))
    device.scale_entries(tensors, given)
    assert all(map(torch.equal, tensors, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [0.3333, [0.5, 1.0, 1e-3, 7.0, 1.0, 0.3]])
def test_a_single_number_among_tensors_of_its_dtype(dtype, factors):
    shapes = [(), (), (3,), (), (2, 2), ()]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    given = torch.tensor(factors, dtype=torch.float64)
    wanted = multiplied(tensors, given.expand(len(tensors)))
    device.scale_entries(tensors, given)
    assert all(map(torch.equal, tensors, wanted))


def test_nothing_to_scale():
    device.scale_entries([], torch.ones(()))
    device.scale_entries([None, None], torch.ones(2))


def test_tensors_that_are_not_there_are_passed_over():
    tensors = [None, torch.ones(3), None, torch.ones(2)]
    device.scale_entries(tensors, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert [t.tolist() for t in tensors if t is not None] == [
        pytest.approx([0.2] * 3),
        pytest.approx([0.4] * 2),
    ]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_norms_of_every_dtype_without_overflow(norm_type):
    tensors = [torch.randn(3000).to(dtype) for dtype in DTYPES]
    tensors += [
        torch.zeros(0),
        torch.zeros(3, dtype=torch.float64),
        torch.full((5,), 1e20),
        torch.full((5,), 1e-30),
        channels_last(torch.bfloat16),
        channels_last(torch.float64),
    ]
    tensors += [torch.tensor([3.0, -4.0], dtype=torch.float64) * scale for scale in (1e300, 1e-300)]
    norms = read(tensors, norm_type, wide=torch.float64, unit_dim=None, peaks=False).norms
    # float64 additions in another order
    assert norms.tolist() == pytest.approx([reference.norm([t], norm_type) for t in tensors], rel=1e-12)


def test_float64_that_is_not_finite_shows():
    tensors = [torch.tensor([1.0, bad], dtype=torch.float64) for bad in (math.inf, math.nan, -math.inf)]
    assert (
        str(read(tensors, 2.0, wide=torch.float64, unit_dim=None, peaks=False).norms.tolist())
        == "[inf, nan, inf]"
    )


def in_units(tensor, dim):
    return [tensor] if tensor.dim() <= 1 else list(tensor.unbind(dim))


def of_many_shapes(dtype):
    shapes = [(4, 3), (3,), (5, 3), (2, 3, 2, 2), (), (0, 3), (6, 2, 2, 2), (4, 0), (3, 3)]
    return [torch.randn(shape).to(dtype) for shape in shapes] + [
        channels_last(dtype),
        torch.randn(3, 4).to(dtype).t(),
    ]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_units(dtype, norm_type, dim):
    tensors = of_many_shapes(dtype)
    if dtype == torch.float64:
        tensors += [torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=dtype) * scale for scale in (1e300, 1e-300)]
    units = read(tensors, norm_type, wide=torch.float64, unit_dim=dim, peaks=False).units
    wanted = [reference.norm([unit], norm_type) for tensor in tensors for unit in in_units(tensor, dim)]
    assert units.tolist() == pytest.approx(wanted, rel=1e-12)  # float64 additions in another order


def test_a_unit_that_is_not_finite_shows():
    for bad in (math.nan, math.inf):
        for dtype in DTYPES:
            tensor = torch.ones(3, 2, dtype=dtype)
            tensor[1, 1] = bad
            units = read([tensor], 2.0, wide=torch.float64, unit_dim=0, peaks=False).units
            assert torch.isfinite(units).tolist() == [True, False, True]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_are_multiplied_in_the_wider_type_and_rounded_once(dtype, dim):
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in of_many_shapes(dtype)]
    parameters += [torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))]  # without a gradient
    for parameter, gradient in zip(parameters[:-1], of_many_shapes(dtype), strict=True):
        parameter.grad = gradient
    counts = [1 if p.dim() <= 1 else p.shape[dim] for p in parameters]
    factors = torch.rand(sum(counts), dtype=torch.float64)
    wanted = []
    for parameter, own in zip(parameters[:-1], factors.split(counts), strict=False):
        moved = [1] * parameter.dim()
        if parameter.dim() > 1:
            moved[dim] = -1
        wanted += multiplied([parameter.grad], [own.reshape(moved)])
    device.scale_units(parameters, factors, counts, dim)
    assert all(torch.equal(p.grad, exact) for p, exact in zip(parameters, wanted, strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_peaks(dtype):
    tensors = [*of_many_shapes(dtype), torch.randn(3000), torch.tensor([math.nan, 1.0]).to(dtype)]
    found = foreach.peaks(tensors, torch.float64)
    wanted = [[float(t.min()), float(t.max())] if t.numel() else [0.0, 0.0] for t in tensors]
    assert str(found.tolist()) == str(wanted).replace("-0.0", "0.0")


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_are_rounded_as_entries_are(dtype):
    most = torch.finfo(dtype).max
    for share in (0.5, 1.0, 1 + 1e-9, 1 + 2.9e-8, 1.0001, 1.0003, 1.001, 1.0019, 1.002, 1.1):
        if not math.isfinite(most * share):
            continue
        given = torch.tensor([-most * share, most * share], dtype=torch.float64)
        low, high = limits_of(dtype, *given.tolist())
        assert torch.tensor([low, high], dtype=dtype).tolist() == given.to(dtype).tolist()


@pytest.mark.parametrize("clamp", [device.clamp, host.clamp])
def test_a_limit_beyond_the_range_of_a_dtype_is_none(clamp):
    parameters = [
        torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in (torch.float16, torch.bfloat16)
    ]
    for parameter in parameters:
        parameter.grad = torch.tensor([math.inf, -math.inf, math.nan, 6e4], dtype=parameter.dtype)
    given = [parameter.grad.clone() for parameter in parameters]
    clamp(parameters, (-1e39, 1e39), None)
    for parameter, before in zip(parameters, given, strict=True):
        torch.testing.assert_close(parameter.grad, before, rtol=0, atol=0, equal_nan=True)


def test_clamping_keeps_nan_and_takes_sparse_and_complex_gradients():
    parameters = [torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype)) for dtype in (*DTYPES, torch.complex64)]
    for parameter in parameters[:-1]:
        parameter.grad = torch.tensor([[math.nan, 9.0], [-9.0, 0.25]], dtype=parameter.dtype)
    parameters[-1].grad = torch.full((2, 2), 3 - 0.25j, dtype=torch.complex64)
    parameters.append(torch.nn.Parameter(torch.zeros(2, 2)))
    twice = torch.sparse_coo_tensor([[0, 0], [1, 1]], [0.4, 0.4], (2, 2), check_invariants=True)
    parameters[-1].grad = twice
    device.clamp(parameters, (-0.5, 0.5))
    for parameter in parameters[:-2]:
        assert str(parameter.grad.tolist()) == "[[nan, 0.5], [-0.5, 0.25]]"
    assert parameters[-2].grad.tolist() == [[0.5 - 0.25j] * 2] * 2
    assert parameters[-1].grad.to_dense().tolist() == [[0.0, 0.5], [0.0, 0.0]]
