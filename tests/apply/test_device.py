"""What is done on an accelerator, where the host must not look at factors; run here on CPU tensors."""

import math

import pytest
import torch

import reference
from gradkeel.apply.device import scale_entries
from gradkeel.kernels import native, triton_host
from gradkeel.measure.device import device_norms

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Neither the native kernels nor those of Triton: torch's foreach operations."""
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(triton_host, "kernels", lambda: None)


@pytest.mark.parametrize("factors", [[0.3333] * 5, [0.5, 1.0, 1e-3, 7.0, 1.0]])
def test_factors_are_multiplied_in_the_wider_type_and_rounded_once(factors):
    tensors = [torch.randn(33).to(dtype) for dtype in DTYPES] + [torch.randn(4, 5)]
    numbers = [torch.tensor(factor, dtype=torch.float64) for factor in factors]
    if len(set(factors)) == 1:
        numbers = numbers[:1] * 5
    wanted = [
        (tensor.to(wide) * number.to(wide)).to(tensor.dtype)
        for tensor, number in zip(tensors, numbers, strict=True)
        for wide in [torch.promote_types(tensor.dtype, torch.float32)]
    ]
    scale_entries(tensors, numbers)
    assert all(map(torch.equal, tensors, wanted))


def test_nothing_to_scale():
    scale_entries([], [])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_norms_of_every_dtype_without_overflow(norm_type):
    tensors = [torch.randn(3000).to(dtype) for dtype in DTYPES]
    tensors += [
        torch.zeros(0),
        torch.zeros(3, dtype=torch.float64),
        torch.full((5,), 1e20),
        torch.full((5,), 1e-30),
    ]
    tensors += [torch.tensor([3.0, -4.0], dtype=torch.float64) * scale for scale in (1e300, 1e-300)]
    norms = device_norms(tensors, norm_type, torch.float64)
    assert norms.tolist() == pytest.approx([reference.norm([t], norm_type) for t in tensors], rel=1e-12)


def test_float64_that_is_not_finite_shows():
    tensors = [torch.tensor([1.0, bad], dtype=torch.float64) for bad in (math.inf, math.nan, -math.inf)]
    assert str(device_norms(tensors, 2.0, torch.float64).tolist()) == "[inf, nan, inf]"
