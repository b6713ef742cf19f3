"""The GPU kernels in Triton's interpreter, and compiled for GPUs that need not be there; test_cuda.py has real ones."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference

# Before Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed; `make test-triton` installs it")

from gradkeel.kernels import native, triton_host
from gradkeel.measure import powers

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradkeel.kernels import triton_kernels as k

for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for name, wide in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")):
        import triton.language as tl
        types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}
        for squared in (False, True):
            constants = {"DTYPE": types[name], "ALIGNMENT": 16, "IS_SQUARED": squared, "BLOCK": 2048}
            signature = {"pieces": "*i64", "sums": "*fp64", "scales": "*fp64", **dict.fromkeys(constants, "constexpr")}
            triton.compile(ASTSource(k.sum_powers, signature, constants), target=target)
        constants = {"DTYPE": types[name], "WIDE": types[wide], "ALIGNMENT": 16, "BLOCK": 2048}
        signature = {"pieces": "*i64", "factors": "*fp64", "stride": "i32", **dict.fromkeys(constants, "constexpr")}
        triton.compile(ASTSource(k.scale_pieces, signature, constants), target=target)
    for squared in (False, True):
        constants = {"IS_SQUARED": squared, "BLOCK": 128}
        signature = {"sums": "*fp64", "scales": "*fp64", "spans": "*i64", "norms": "*fp64"}
        signature |= dict.fromkeys(constants, "constexpr")
        triton.compile(ASTSource(k.join_powers, signature, constants), target=target)
print("compiled")
"""


@pytest.fixture(autouse=True)
def path():
    """Neither of the CPU's."""


@pytest.fixture(scope="module")
def kernels():
    return triton_host.TritonKernels()


def norms_of(kernels, tensors, norm_type=2.0):
    return kernels.norms(kernels.table(tensors), norm_type)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 5, 2047, 2048, 2049, 65_536, 70_000]), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**31),
)
def test_norms_are_their_float64_twins(kernels, norm_type, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size, dtype in kinds]
    norms = norms_of(kernels, tensors, norm_type)
    assert norms.dtype == torch.float64
    # float64 additions in another order
    assert norms.tolist() == pytest.approx([reference.norm([t], norm_type) for t in tensors], rel=1e-11)


@pytest.mark.parametrize("size", [1, 3000, 70_000])
@pytest.mark.parametrize(
    ("entry", "dtype"),
    [
        (1e20, torch.float32),
        (3e38, torch.float32),
        (1e-40, torch.float32),
        (1e300, torch.float64),
        (1e-300, torch.float64),
        (3e38, torch.bfloat16),
        (65504.0, torch.float16),
        (6e-8, torch.float16),
    ],
)
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_a_finite_tensor_has_a_finite_norm_and_a_small_one_is_not_zero(
    kernels, size, entry, dtype, norm_type
):
    tensor = torch.full((size,), entry, dtype=dtype)
    tensor[:-1:2] *= -1
    true = tensor[0].abs().double().item() * size ** (1 / norm_type)
    assert norms_of(kernels, [tensor], norm_type).tolist() == pytest.approx([true], rel=1e-12)


def test_pieces_of_very_different_size_and_pieces_of_zeros(kernels):
    tensor = torch.zeros(3 * triton_host.PIECE, dtype=torch.float64)
    tensor[0], tensor[-1] = 3e-300, 4e-300
    assert norms_of(kernels, [tensor]).tolist() == pytest.approx([5e-300], rel=1e-12)
    tensor[triton_host.PIECE] = 1e300
    assert norms_of(kernels, [tensor, torch.zeros(7)]).tolist() == pytest.approx([1e300, 0.0], rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2100, 70_000])
def test_what_is_not_finite_shows(kernels, dtype, size):
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, size - 1):
            tensor = torch.ones(size, dtype=dtype)
            tensor[place] = bad
            for norm_type in (1.0, 2.0):
                assert str(norms_of(kernels, [tensor], norm_type).item()) == str(abs(bad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [0.3333, (0.5, 1.0, 1e-3, 7.0)])
def test_scaling_is_torchs_multiplication_in_the_wider_type(kernels, dtype, factors):
    tensors = [torch.randn(size).to(dtype) for size in (5, 70_000, 0, 2048)]
    wide = torch.promote_types(dtype, torch.float32)
    given = torch.tensor(factors, dtype=torch.float64)
    each = given.expand(4).to(wide)
    wanted = [(tensor.to(wide) * factor).to(dtype) for tensor, factor in zip(tensors, each, strict=True)]
    kernels.scale(kernels.table(tensors), given)
    for got, exact in zip(tensors, wanted, strict=True):
        if (
            dtype == torch.bfloat16
        ):  # which the interpreter, unlike a GPU, cuts off in place of rounding: one ulp
            torch.testing.assert_close(got, exact, rtol=2**-7, atol=0.0)
        else:
            assert torch.equal(got, exact)


def test_a_factor_of_1_leaves_every_bit(kernels):
    # The interpreter's own arithmetic would quieten this NaN.
    bits = torch.tensor([0x7FA00001, 1, -1], dtype=torch.int32)
    kernels.scale(kernels.table([bits.view(torch.float32)]), torch.tensor(1.0, dtype=torch.float64))
    assert bits.tolist() == [0x7FA00001, 1, -1]


def test_misaligned_tensors(kernels):
    whole = torch.randn(4099).half()
    assert norms_of(kernels, [whole[1:], whole[3:]]).tolist() == pytest.approx(
        [reference.norm([whole[1:]]), reference.norm([whole[3:]])], rel=1e-11
    )


def test_a_table_is_made_once_for_the_same_addresses(kernels):
    tensors = [torch.randn(5), torch.randn(7)]
    table = kernels.table(tensors)
    assert kernels.table(list(tensors)) is table
    assert kernels.table(tensors[::-1]) is not table
    kept = [torch.randn(n + 1) for n in range(40)]
    for tensor in kept:
        assert norms_of(kernels, [tensor]).tolist() == pytest.approx([reference.norm([tensor])], rel=1e-11)
    assert len(kernels._tables) <= 16


def test_other_tensors_are_refused(kernels):
    for tensor in (torch.ones(3, dtype=torch.int64), torch.ones(4, 4)[:, ::2], torch.eye(3).to_sparse()):
        assert kernels.table([torch.ones(2), tensor]) is None
    assert kernels.table([torch.ones(2), torch.ones(3, device="meta")]) is None
    assert kernels.table([]) is None


def test_they_are_asked_for_by_the_environment(monkeypatch):
    triton_host.kernels.cache_clear()
    try:
        assert triton_host.kernels() is None
        assert "not asked for" in triton_host.unavailable()
        monkeypatch.setenv(triton_host.VARIABLE, "on")
        triton_host.kernels.cache_clear()
        assert triton_host.unavailable() is None
        tensors = [torch.randn(3000), torch.randn(5).double()]
        # as on an accelerator, whose tensors these would be
        norms = powers._device_norms(tensors, 2.0, torch.float64)
        assert norms.tolist() == pytest.approx([reference.norm([tensor]) for tensor in tensors], rel=1e-12)
        monkeypatch.setattr(native, "kernels", lambda: None)
    finally:
        triton_host.kernels.cache_clear()


def test_the_kernels_compile_for_gpus():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
