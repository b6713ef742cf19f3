"""The native kernels: right at every level of the processor, and torch's operations wherever they cannot work."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradkeel as gk
import reference
from gradkeel.kernels import library, native

ROOT = Path(__file__).resolve().parents[2]
FUZZ = Path(__file__).with_name("fuzz_native.c")
COMPILER = os.environ.get("CC") or shutil.which("cc")
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, torch.float64, *HALVES]
NORM_TYPES = [1.0, 2.0, math.inf]

IN_CI = os.environ.get("CI") == "true"

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason=str(native.unavailable()))


def levels():
    """The levels of this processor."""
    kernels = native.kernels()
    return [] if kernels is None else native.LEVELS[: native.LEVELS.index(kernels.level) + 1]


@pytest.fixture(autouse=True)
def path():
    """Only the native one here, in place of both."""


@pytest.fixture(params=levels())
def kernels(request):
    return native.Kernels(request.param)


def all_halves(dtype):
    """Every number of a 16-bit type, NaN and inf included."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def is_same(got, wanted):
    """Whether two tensors have the same numbers; any NaN is any other."""
    return torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())


def tolerance(tensor):
    """Float64 additions, as many as there are entries, in another order; in 16 bits 1,024 at a time in float32."""
    return 1e-6 if tensor.dtype in HALVES else 1e-11


# ---- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([(), (0,), (1,), (33,), (5, 0), (7, 31), (1, 70_001), (2, 3, 4, 5), (3, 66_000)]),
            st.sampled_from(DTYPES),
        ),
        max_size=5,
    ),
    st.integers(0, 2**31),
    # Never empty: a test of nothing takes no arguments, and is an error where there are no kernels.
    st.sampled_from(levels() or [None]),
)
@needs_kernels
def test_norms_and_units_are_their_float64_twins(norm_type, kinds, seed, level):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in kinds]
    kernels = native.Kernels(level)
    table = kernels.table(tensors, 0)
    found = kernels.read(table, norm_type, units=True, peaks=True)
    norms, units, peaks = found.norms, found.units, found.peaks
    cut = [unit for tensor in tensors for unit in (tensor.unbind(0) if tensor.dim() > 1 else [tensor])]
    for got, cells in ((norms, tensors), (units, cut)):
        for norm, cell in zip(got.tolist(), cells, strict=True):
            assert norm == pytest.approx(reference.norm([cell], norm_type), rel=tolerance(cell))
    extremes = [(t.min().item(), t.max().item()) if t.numel() else (0.0, 0.0) for t in tensors]
    assert [tuple(pair) for pair in peaks.tolist()] == extremes


@needs_kernels
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("size", [5, 300_000])  # read in the call that looks for them, and in a second one
def test_norms_and_their_total_in_one_call(kernels, size, norm_type):
    tensors = [torch.randn(size), torch.randn(3, 4).half(), torch.randn(7, dtype=torch.float64) * 1e200]
    found = kernels.norms(tensors, norm_type)
    norms, total, table = found.norms, found.total, found.table
    assert table.tensors is tensors
    assert kernels.norms([tensors[0], *tensors], norm_type).table is None
    assert torch.equal(norms, kernels.read(kernels.table(tensors), norm_type).norms)
    assert total == pytest.approx(reference.norm(tensors, norm_type), rel=1e-12)
    small = [tensor * 1e-300 for tensor in tensors[2:]] * 2
    assert kernels.norms(small, norm_type).total == pytest.approx(reference.norm(small, norm_type), rel=1e-12)
    assert kernels.norms([torch.zeros(size)], norm_type).total == 0.0
    assert kernels.norms([], norm_type).total == 0.0


@needs_kernels
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_total_is_not_finite_exactly_where_an_entry_is(kernels, bad):
    tensors = [torch.ones(3), torch.tensor([1.0, bad]), torch.full((2,), 1e30)]
    for norm_type in NORM_TYPES:
        total = kernels.norms(tensors, norm_type).total
        assert math.isnan(total) if math.isnan(bad) else total == math.inf


@needs_kernels
@pytest.mark.parametrize("size", [5, 300_000])
def test_all_are_multiplied_by_one_factor_where_they_were_read(kernels, size):
    tensors = [torch.randn(size), torch.randn(3, 4).half(), torch.randn(4, 3).t()]
    table = kernels.norms(tensors, 2.0).table
    wanted = [tensor * 0.3 for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    kernels.scale(table, 0.3)
    for tensor, right in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor, right)
    assert [tensor._version for tensor in tensors] == [version + 1 for version in versions]


@needs_kernels
def test_what_is_not_fit_is_not_touched(kernels):
    fit, unfit = torch.ones(3), torch.ones(6)[::2]
    assert kernels.norms([fit, unfit], 2.0) is None
    assert native.scale([fit, unfit], 0.5) is False
    assert torch.equal(fit, torch.ones(3))


@needs_kernels
def test_67_million_entries_are_exact_to_nine_digits(kernels):
    tensor = torch.full((2**26,), 0.1)
    (norm,) = kernels.read(kernels.table([tensor]), 2.0).norms.tolist()
    assert norm == pytest.approx(2**13 * tensor[0].double().item(), rel=1e-9)


@needs_kernels
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("size", [1, 1024, 70_001])
@pytest.mark.parametrize("entry", [1e-38, 1e-20, 1e18, 3e38])
def test_bfloat16_entries_whose_sums_leave_float32_are_summed_in_float64(kernels, entry, size, norm_type):
    tensor = torch.full((size,), entry, dtype=torch.bfloat16)
    tensor[: size // 2 : 7] = 0
    norms = kernels.read(kernels.table([tensor]), norm_type).norms
    assert norms.item() == pytest.approx(reference.norm([tensor], norm_type), rel=tolerance(tensor))


@needs_kernels
@pytest.mark.parametrize("entry", [3e38, 1e-45, 1e200, 1e-200, 5e-324, 1.7e308])
def test_finite_entries_have_a_finite_norm(kernels, entry):
    dtype = torch.float32 if 1e-46 < entry < 1e39 else torch.float64
    tensor = torch.zeros(3, 5, dtype=dtype)
    tensor[1, 2:4] = torch.tensor([1.0, -1.0]) * entry
    for norm_type in (2.0, math.inf) if entry == 1.7e308 else NORM_TYPES:
        found = kernels.read(kernels.table([tensor], 0), norm_type, units=True)
        norms, units = found.norms, found.units
        wanted = tensor[1, 2].item() * {1.0: 2.0, 2.0: 1.0 if entry == 1.7e308 else math.sqrt(2)}.get(
            norm_type, 1.0
        )
        if entry == 1.7e308 and norm_type == 2.0:
            assert math.isinf(norms[0])  # the norm itself, 2.4e308, is beyond float64
        else:
            assert norms.tolist() == pytest.approx([wanted], rel=1e-15)
            assert units.tolist() == pytest.approx([0.0, wanted, 0.0], rel=1e-15)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 40, 70_000])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(kernels, dtype, size, bad):
    for place in (0, size // 2, size - 1):
        tensor = torch.ones(size, dtype=dtype)
        tensor[place] = math.copysign(math.nan, bad) if math.isnan(bad) else bad
        if math.isnan(bad) and math.copysign(1, bad) < 0:
            tensor[place] = -tensor[place]
        for norm_type in NORM_TYPES:
            found = kernels.read(kernels.table([tensor]), norm_type, peaks=True)
            norms, peaks = found.norms, found.peaks
            assert str(norms.item()) == str(abs(bad))
            low, high = peaks[0].tolist()
            assert (math.isnan(low) and math.isnan(high)) if math.isnan(bad) else bad in (low, high)


@needs_kernels
@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_read_as_torch_reads_it(kernels, dtype):
    numbers = all_halves(dtype)
    norms = kernels.read(kernels.table(list(numbers.unbind())), 2.0).norms
    assert is_same(norms, numbers.double().abs())


@needs_kernels
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("factor", [0.5, 1.5, 0.3333, 1e-5, 1.0 + 2.0**-12, 3e4, 1e-40, 1e300])
def test_every_16_bit_number_is_scaled_as_torch_scales_it(kernels, dtype, factor):
    numbers = all_halves(dtype)
    wanted = numbers.clone().mul_(factor)
    kernels.scale(kernels.table([numbers]), [factor])
    assert is_same(numbers, wanted)


@needs_kernels
@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_clamped_as_torch_clamps_it(kernels, dtype):
    numbers = all_halves(dtype)
    wanted = numbers.clone().clamp_(-0.3, 1e-3)
    kernels.clamp(kernels.table([numbers]), -0.3, 1e-3)
    assert is_same(numbers, wanted)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 17, 70_001])
def test_wide_numbers_are_scaled_and_clamped_as_torch_does(kernels, dtype, size):
    numbers = torch.randn(size, dtype=dtype)
    numbers[-1] = math.nan
    wanted = numbers.clone().mul_(0.123456789).clamp_(-0.05, 0.11)
    kernels.scale(kernels.table([numbers]), [0.123456789])
    kernels.clamp(kernels.table([numbers]), -0.05, 0.11)
    assert is_same(numbers, wanted)


@needs_kernels
def test_units_are_scaled_each_by_its_factor_and_those_with_1_are_left(kernels):
    tensors = [torch.randn(3, 70_000), torch.randn(4, 2, 5), torch.randn(6)]
    wanted = [tensor.clone() for tensor in tensors]
    factors = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25, 1.0, 3.0, 0.125], dtype=torch.float64)
    wanted[0] *= factors[:3, None].float()
    wanted[1] *= factors[3:7, None, None].float()
    wanted[2] *= 0.125
    kernels.scale(kernels.table(tensors, 0), factors)
    assert all(map(torch.equal, tensors, wanted))


@needs_kernels
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_torch(kernels, dtype, wide):
    dtype = min(dtype, wide, key=lambda one: one.itemsize)
    tensors = [torch.randn(shape).to(dtype) for shape in [(3,), (70_001,), (0,), (3, 70_000), (4, 5, 6)]]
    tensors.append(torch.randn(300, 500).to(dtype).t())
    sums = [torch.randn_like(tensor, dtype=wide) for tensor in tensors]
    wanted = [total + tensor.to(wide) for total, tensor in zip(sums, tensors, strict=True)]
    versions = [total._version for total in sums]
    kernels.add(kernels.table(sums), kernels.table(tensors))
    assert all(map(torch.equal, sums, wanted))
    assert all(total._version > version for total, version in zip(sums, versions, strict=True))


@needs_kernels
def test_threads_change_no_bit(kernels):
    tensors = [torch.randn(size) for size in (300_000, 5, 70_000, 0, 65_536)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(kernels.read(kernels.table(tensors), 2.0).norms)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernels
def test_several_python_threads_may_read_at_once(kernels):
    tensors = [torch.randn(size) for size in (100_000, 33)]
    wanted = kernels.read(kernels.table(tensors), 2.0).norms
    results = []

    def read():
        results.extend(kernels.read(kernels.table(tensors), 2.0).norms for _ in range(20))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(result, wanted) for result in results)


@needs_kernels
def test_autograd_hears_of_what_is_written(kernels):
    tensor = torch.randn(3)
    for write in (
        lambda: kernels.scale(kernels.table([tensor]), [0.5]),
        lambda: kernels.clamp(kernels.table([tensor]), -1.0, 1.0),
    ):
        before = tensor._version
        write()
        assert tensor._version > before
    before = tensor._version
    kernels.read(kernels.table([tensor]), 2.0, peaks=True)
    assert tensor._version == before


def test_autograd_hears_nothing_of_what_is_multiplied_by_1(kernels):
    tensors = [torch.ones(3), torch.ones(3)]
    kernels.scale(kernels.table(tensors), [0.5, 1.0])
    assert [tensor._version for tensor in tensors] == [1, 0]
    assert [tensor.tolist() for tensor in tensors] == [[0.5] * 3, [1.0] * 3]


# ---- what is not for them --------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, device="meta"),
        torch.ones(1).expand(4),
        torch.ones(4, 4)[:, ::2],
        torch.ones(3).as_subclass(type("Subclass", (torch.Tensor,), {})),
    ],
    ids=["sparse", "integers", "complex", "meta", "expanded", "gaps", "subclass"],
)
def test_other_tensors_are_refused(kernels, tensor):
    assert kernels.table([torch.ones(2), tensor]) is None
    otherwise = kernels.table([torch.ones(2), tensor], otherwise=lambda _: torch.ones(4))
    assert otherwise.rows == 2
    assert kernels.read(otherwise, 1.0).norms.tolist() == [4.0, 4.0]


@needs_kernels
def test_units_must_lie_one_after_the_other(kernels):
    tensor = torch.randn(4, 3, 2, 5)
    assert kernels.table([tensor], 1) is None
    assert kernels.table([tensor.transpose(0, 1)], 0) is None
    assert kernels.table([tensor.transpose(0, 1)], 1).rows == 4
    assert kernels.table([tensor.contiguous(memory_format=torch.channels_last)], 0).rows == 4
    assert kernels.table([torch.randn(3)], 1).rows == 1
    assert kernels.table([torch.randn(3, 2)], 2) is None


# ---- where there are none --------------------------------------------------------------------------------


def clipped_norm():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = gk.clip_grad_norm_([parameter], 1.0)
    return norm.item(), parameter.grad.norm().item()


@pytest.mark.parametrize(("value", "words"), [("off", "turned off"), ("avx1024", "must be off or one of")])
def test_the_environment_turns_them_off_and_gradkeel_goes_on(found, value, words):
    found.setenv(native.VARIABLE, value)
    assert native.kernels() is None
    assert words in native.unavailable()
    assert clipped_norm() == pytest.approx((5.0, 1.0), rel=1e-6)


@needs_kernels
def test_the_environment_names_a_level(found):
    found.setenv(native.VARIABLE, "baseline")
    assert native.kernels().level == "baseline"
    assert native.unavailable() is None
    assert clipped_norm() == pytest.approx((5.0, 1.0), rel=1e-6)


def test_a_library_that_is_missing_broken_or_of_another_time_is_left_alone(found, tmp_path):
    found.setattr(library, "LIBRARY", tmp_path / "none.so")
    assert native.kernels() is None
    assert "not built" in native.unavailable()
    assert clipped_norm() == pytest.approx((5.0, 1.0), rel=1e-6)
    native._found.cache_clear()
    (tmp_path / "none.so").write_text("no library")
    assert native.kernels() is None
    assert "cannot be loaded" in native.unavailable()


@needs_kernels
def test_another_interface_or_a_torch_without_one_is_left_alone(found):
    found.setattr(library, "_INTERFACE", -1)
    assert "built from other sources" in native.unavailable()
    found.undo()
    native._found.cache_clear()
    found.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert "no C interface" in native.unavailable()
    assert clipped_norm() == pytest.approx((5.0, 1.0), rel=1e-6)


@pytest.mark.skipif(not IN_CI, reason="they are optional, but CI tests them")
def test_ci_has_a_compiler_and_the_kernels():
    assert COMPILER is not None
    assert native.unavailable() is None


# ---- building --------------------------------------------------------------------------------------------


def hook():
    """hatch_build.py as a module."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_compiler_the_build_says_so(tmp_path, monkeypatch):
    library = tmp_path / "_native.so"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in hook().build(library)
    monkeypatch.setenv(native.VARIABLE, "off")
    assert "turned off" in hook().build(library)
    monkeypatch.delenv(native.VARIABLE)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hook().build(library) == "no C compiler"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_build_takes_the_place_of_an_old_library_only_when_it_works(tmp_path, monkeypatch):
    library, build = tmp_path / "_native.so", hook()
    # The wheel's test compiles as it is meant, which takes long.
    monkeypatch.setattr(build, "FLAGS", [flag.replace("-O3", "-O0") for flag in build.FLAGS])
    assert build.build(library) is None
    assert [path.name for path in tmp_path.iterdir()] == ["_native.so"]
    monkeypatch.setenv("CC", "false")
    assert "false" in build.build(library)
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_is_pure_without_a_compiler(tmp_path):
    """And for every Python with one, as tests/test_wheel.py asks of the one that it builds."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    environment = {**os.environ, "CC": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == []


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_sanitizers_find_nothing(tmp_path):
    program = tmp_path / "fuzz"
    flags = [flag for flag in hook().FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-DMAIN"]
    built = subprocess.run(
        [COMPILER, *flags, *sanitizers, "-o", program, FUZZ, "-lm", "-lpthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode != 0 and not IN_CI:
        pytest.skip(f"no sanitizers: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program, "200"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
