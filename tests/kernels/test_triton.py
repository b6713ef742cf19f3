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
# 3.2, which comes with torch 2.6, cannot interpret kernels under NumPy 2.4, and compiles for AMD with its linker alone.
pytest.importorskip(
    "triton", minversion="3.5", reason="Triton before 3.5 fails under the NumPy of constraints.txt"
)

from gradkeel.errors import GradkeelWarning
from gradkeel.kernels import native, triton_host, triton_layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradkeel.kernels import triton_kernels as k

TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}
TABLE = {"addresses": "*i64", "pieces": "*i64", "first": "i32"}


def compiled(kernel, signature, target, **constants):
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    triton.compile(ASTSource(kernel, signature, constants), target=target)


for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for name, dtype in TYPES.items():
        own = {"DTYPE": dtype, "ALIGNMENT": 16, "BLOCK": 512}
        wide = tl.float64 if name == "fp64" else tl.float32
        for squared in (False, True):
            norm = {**own, "IS_SQUARED": squared}
            for peaks in (False, True):
                found = {"sums": "*fp64", "scales": "*fp64", "peaks": "*fp64"}
                args = {**TABLE, "count": "i32", **found}
                compiled(k.read_pieces, args, target, **norm, WIDE=wide, HAS_PEAKS=peaks, ROWS=2)
        given = {**TABLE, "count": "i32", "factors": "*fp64", "stride": "i32"}
        compiled(k.scale_pieces, given, target, **own, WIDE=wide, ROWS=8)
        if name != "fp64":
            limits = {"peaks": "*fp64", "low": "fp32", "high": "fp32"}
            compiled(k.clamp_pieces, {**TABLE, **limits}, target, **own, HAS_PEAKS=True)
    for squared in (False, True):
        join = {"sums": "*fp64", "scales": "*fp64", "spans": "*i64", "norms": "*fp64"}
        compiled(k.join_powers, join, target, HAS_SCALES=squared, IS_SQUARED=squared, BLOCK=128)
        one = {"norms": "*fp64", "count": "i32", "total": "*fp64"}
        compiled(k.join_norms, one, target, IS_SQUARED=squared, BLOCK=1024)
        each = {"pieces": "*i64", "count": "i32", "sums": "*fp64", "scales": "*fp64", "norms": "*fp64"}
        compiled(k.unit_norms, each, target, IS_SQUARED=squared, BLOCK=1024)
    compiled(k.join_peaks, {"found": "*fp64", "spans": "*i64", "peaks": "*fp64"}, target, BLOCK=128)
print("compiled")
"""


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """In use on CPU tensors; unchecked, for the interpreter does not round bfloat16 as a GPU does."""
    monkeypatch.setenv(triton_host.VARIABLE, "on")
    triton_host.kernels.cache_clear()
    yield triton_host.kernels(CPU)
    monkeypatch.undo()
    triton_host.kernels.cache_clear()


def norms_of(tensors, norm_type=2.0):
    found = triton_host.read(tensors, norm_type)
    assert found is not None
    return found.norms


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 5, 2047, 2048, 2049, 65_536, 70_000]), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**31),
)
def test_norms_are_their_float64_twins(norm_type, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size, dtype in kinds]
    norms = norms_of(tensors, norm_type)
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
def test_a_finite_tensor_has_a_finite_norm_and_a_small_one_is_not_zero(size, entry, dtype, norm_type):
    tensor = torch.full((size,), entry, dtype=dtype)
    tensor[:-1:2] *= -1
    true = tensor[0].abs().double().item() * size ** (1 / norm_type)
    assert norms_of([tensor], norm_type).tolist() == pytest.approx([true], rel=1e-12)


def test_pieces_of_very_different_size_and_pieces_of_zeros():
    tensor = torch.zeros(3 * triton_layout.PIECE, dtype=torch.float64)
    tensor[0], tensor[-1] = 3e-300, 4e-300
    assert norms_of([tensor]).tolist() == pytest.approx([5e-300], rel=1e-12)
    tensor[triton_layout.PIECE] = 1e300
    assert norms_of([tensor, torch.zeros(7)]).tolist() == pytest.approx([1e300, 0.0], rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2100, 70_000])
def test_what_is_not_finite_shows(dtype, size):
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, size - 1):
            tensor = torch.ones(size, dtype=dtype)
            tensor[place] = bad
            for norm_type in (1.0, 2.0):
                assert str(norms_of([tensor], norm_type).item()) == str(abs(bad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [0.3333, (0.5, 1.0, 1e-3, 7.0)])
def test_scaling_is_torchs_multiplication_in_the_wider_type(dtype, factors):
    tensors = [torch.randn(size).to(dtype) for size in (5, 70_000, 0, 2048)]
    wide = torch.promote_types(dtype, torch.float32)
    given = torch.tensor(factors, dtype=torch.float64)
    each = given.expand(4).to(wide)
    wanted = [(tensor.to(wide) * factor).to(dtype) for tensor, factor in zip(tensors, each, strict=True)]
    assert triton_host.scale(tensors, given)
    for got, exact in zip(tensors, wanted, strict=True):
        if (
            dtype == torch.bfloat16
        ):  # which the interpreter, unlike a GPU, cuts off in place of rounding: one ulp
            torch.testing.assert_close(got, exact, rtol=2**-7, atol=0.0)
        else:
            assert torch.equal(got, exact)


def test_a_factor_of_1_leaves_every_bit():
    # The interpreter's own arithmetic would quieten this NaN.
    bits = torch.tensor([0x7FA00001, 1, -1], dtype=torch.int32)
    assert triton_host.scale([bits.view(torch.float32)], torch.tensor(1.0, dtype=torch.float64))
    assert bits.tolist() == [0x7FA00001, 1, -1]


def test_a_factor_below_the_numbers_of_float32_is_no_zero():
    tensors = [torch.full((3,), 1e38), torch.full((2,), 1e38).bfloat16(), torch.full((2,), 3.0)]
    factors = torch.tensor([1e-46, 1e-46, 0.0], dtype=torch.float64)
    wanted = [
        (tensor.double() * factor).to(tensor.dtype) for tensor, factor in zip(tensors, factors, strict=True)
    ]
    assert float(wanted[0][0]) > 0
    assert triton_host.scale(tensors, factors)
    for tensor, exact in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(tensor, exact, rtol=4 * torch.finfo(tensor.dtype).eps, atol=0)


def test_misaligned_tensors():
    whole = torch.randn(4099).half()
    assert norms_of([whole[1:], whole[3:]]).tolist() == pytest.approx(
        [reference.norm([whole[1:]]), reference.norm([whole[3:]])], rel=1e-11
    )


def test_addresses_may_change_from_step_to_step_and_tensors_come_and_go():
    shapes = [(5,), (70_000,), (2, 3)]
    for missing in (None, 0, 2, 1, None):
        for _ in range(6):  # more often than there are buffers for addresses
            tensors = [None if i == missing else torch.randn(shape) for i, shape in enumerate(shapes)]
            wanted = [0.0 if tensor is None else reference.norm([tensor]) for tensor in tensors]
            assert norms_of(tensors).tolist() == pytest.approx(
                wanted, rel=1e-11
            )  # float64 sums in another order


def test_a_tensor_that_was_not_there_at_first():
    first, second = torch.ones(3), torch.ones(4, dtype=torch.float16)
    factors = torch.tensor([2.0, 3.0], dtype=torch.float64)
    for tensors in ([first, None], [None, second], [first, second]):
        norms = [0.0 if tensor is None else reference.norm([tensor]) for tensor in tensors]
        assert norms_of(tensors).tolist() == pytest.approx(norms, rel=1e-11)
        assert triton_host.scale(tensors, factors)
    assert (first.tolist(), second.tolist()) == ([4.0] * 3, [9.0] * 4)


def test_many_lists_of_tensors():
    kept = [torch.randn(n + 1) for n in range(40)]
    for _ in range(2):
        for tensor in kept:
            assert norms_of([tensor]).tolist() == pytest.approx([reference.norm([tensor])], rel=1e-11)


def units_of(tensor):
    return [tensor] if tensor.dim() <= 1 else list(tensor.unbind())


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_long", [False, True], ids=["a piece a unit", "pieces"])
def test_norms_of_units(dtype, norm_type, is_long):
    size = 1e300 if dtype == torch.float64 else 1.0
    tensors = [
        (torch.randn(shape).double() * size).to(dtype)
        for shape in ((3, 5), (4, 2, 3), (7, 1030), (0, 4), (2, 0))
    ]
    tensors += [torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last)]
    if is_long:
        tensors += [torch.randn(2, triton_layout.PIECE + 1).to(dtype), torch.randn(70_000).to(dtype)]
    own = triton_host.read(tensors, norm_type, 0)
    norms, total, found = own.norms, own.total, own.units
    wanted = [reference.norm([unit], norm_type) for tensor in tensors for unit in units_of(tensor)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-11)  # float64 additions in another order
    assert norms.tolist() == pytest.approx(
        [reference.norm([tensor], norm_type) for tensor in tensors], rel=1e-11
    )
    assert float(total) == pytest.approx(reference.norm(tensors, norm_type), rel=1e-11)


def test_units_that_do_not_lie_one_after_the_other_are_refused():
    assert triton_host.read([torch.randn(3, 5)], 2.0, 1) is None
    assert triton_host.read([torch.randn(3, 5).t()], 2.0, 1) is not None


def test_no_piece_is_taken_for_better_aligned_than_it_is():
    shapes = [(4, 7), (4, 6), (4, 8), (2, triton_layout.PIECE + 2), (9,)]
    for dtype in DTYPES:
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        layout = triton_host.kernels(CPU).layout("2-norm of units", tensors, 0)
        widths = {}
        for run in layout.runs:
            rows = layout.table[run.first : run.first + run.length]
            assert all(first % run.alignment == 0 for first in rows[:, 1].tolist())
            widths |= dict.fromkeys(rows[:, 0].tolist(), run.alignment)
        assert widths[1] == min(16, 2 * dtype.itemsize)  # not worse than it is either
        assert widths[4] == widths[2] == 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in ((5,), (40_000,), (0,), (), (3, 2, 2))]
    tensors[1][39_999] = math.inf
    tensors += [torch.full((70_000,), -2.0).to(dtype), torch.ones(2049).to(dtype)]
    tensors[6][2048] = math.nan
    with_nothing = [*tensors, None]
    own = triton_host.read(with_nothing, 2.0, peaks=True)
    norms, units, peaks = own.norms, own.units, own.peaks
    wanted = [list(map(float, torch.aminmax(t))) if t.numel() else [0.0, 0.0] for t in tensors]
    assert units is None
    assert str(peaks.tolist()) == str([*wanted, [0.0, 0.0]])
    alone = triton_host.read(with_nothing, 2.0).norms
    assert str(norms.tolist()) == str(alone.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_units_are_multiplied_each_by_its_factor(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in ((3, 5), (40_000,), (2, 40_000), (0, 4))]
    counts = [3, 1, 2, 0]
    factors = torch.rand(6, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    units = [unit for tensor in tensors for unit in units_of(tensor)]
    wanted = [
        (unit.to(wide) * factor.to(wide)).to(dtype) for unit, factor in zip(units, factors, strict=True)
    ]
    assert triton_host.scale_units(tensors, factors, counts, 0)
    assert all(map(torch.equal, units, wanted))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_clamping_keeps_nan_and_writes_what_torch_would(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in ((5,), (40_000,), (0,), ())]
    tensors[1][[3, 39_999]] = torch.tensor([math.nan, math.inf], dtype=dtype)
    wanted = [tensor.clamp(-0.1, 0.7) for tensor in tensors]
    assert triton_host.clamp(tensors, -0.1, 0.7)
    for found, exact in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_limit_beyond_the_range_of_a_dtype_is_none(dtype):
    tensor = torch.tensor([math.inf, -math.inf, 3.0], dtype=dtype)
    assert triton_host.clamp([tensor], -1e39, 1e39)
    assert tensor.tolist() == [math.inf, -math.inf, 3.0]


def test_clamping_leaves_the_bits_of_what_is_within():
    bits = torch.tensor([0x7FA00001, 1, -1], dtype=torch.int32)  # two NaN and the smallest number
    assert triton_host.clamp([bits.view(torch.float32)], -1.0, 1.0)
    assert bits.tolist() == [0x7FA00001, 1, -1]


def test_a_tensor_whose_extremes_are_within_is_not_read():
    tensors = [torch.full((3,), 5.0), torch.full((3,), 5.0), torch.full((3,), math.nan)]
    peaks = torch.tensor([[-1.0, 1.0], [-1.0, 5.0], [math.nan, math.nan]], dtype=torch.float64)
    assert triton_host.clamp(tensors, -1.0, 1.0, peaks)
    assert [float(tensor[0]) for tensor in tensors[:2]] == [5.0, 1.0]  # the first was told to be within
    assert tensors[2].isnan().all()


def test_float64_is_clamped_by_torch():
    assert not triton_host.clamp([torch.ones(2, dtype=torch.float64)], -0.1, 0.1)


def test_writing_is_told_to_autograd():
    tensor = torch.ones(3)
    before = tensor._version
    assert triton_host.scale([tensor], torch.tensor(0.5))
    assert triton_host.clamp([tensor], -0.1, 0.1)
    assert tensor._version >= before + 2


def test_other_tensors_are_refused():
    for tensor in (torch.ones(3, dtype=torch.int64), torch.ones(4, 4)[:, ::2], torch.eye(3).to_sparse()):
        assert triton_host.read([torch.ones(2), tensor], 2.0) is None
        assert not triton_host.scale([torch.ones(2), tensor], torch.tensor(2.0))
    negated = torch.ones(3, dtype=torch.complex64).conj().imag
    for tensor in (negated, torch.ones(1).expand(3), torch.ones(3, device="meta")):
        assert triton_host.read([torch.ones(2), tensor], 2.0) is None
    assert triton_host.read([], 2.0) is None
    assert triton_host.read([torch.ones(2)], 3.0) is None


@pytest.fixture
def checked(monkeypatch):
    """Not asked for: checked at first use."""
    own = triton_host.TritonKernels(CPU)
    monkeypatch.setattr(triton_host, "kernels", lambda device: own)
    return own


def test_a_kernel_is_checked_before_its_first_use(checked):
    assert triton_host.read([torch.full((4,), 3.0)], 2.0).norms.tolist() == pytest.approx([6.0], rel=1e-12)
    assert checked.fault is None


@pytest.mark.parametrize("fault", ["wrong", "uncompilable"])
def test_one_that_is_wrong_is_not_used_and_one_warning_says_so(checked, monkeypatch, fault):
    def broken(layout, norm_type, *, peaks=False):
        if fault == "uncompilable":
            raise RuntimeError("no such target")
        return native.Read(torch.ones(layout.tensors, dtype=torch.float64))

    monkeypatch.setattr(checked, "read", broken)
    with pytest.warns(
        GradkeelWarning, match=r"2-norm of torch.float32 on cpu (is wrong|cannot be run).*foreach"
    ):
        assert triton_host.read([torch.ones(3)], 2.0) is None
    # Silent from then on; a warning is an error here.
    assert triton_host.read([torch.ones(3).half()], 2.0) is None
    assert not triton_host.scale([torch.ones(3)], torch.tensor(2.0))
    assert "2-norm" in triton_host.unavailable(CPU)


def test_which_devices_they_are_for(monkeypatch):
    assert triton_host.why_not(CPU) is None  # asked for, and there is the interpreter
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CPU" in triton_host.why_not(CPU)
    monkeypatch.delenv(triton_host.VARIABLE)
    assert triton_host.why_not(torch.device("cuda", 0)) is None
    assert "CUDA and ROCm" in triton_host.why_not(torch.device("xpu", 0))
    monkeypatch.setenv(triton_host.VARIABLE, "off")
    assert "turned off" in triton_host.why_not(torch.device("cuda", 0))


def test_the_kernels_compile_for_gpus():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
