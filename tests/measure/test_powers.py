"""Norms of tensors: exact at any size, magnitude, dtype and memory layout."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from gradkeel.measure.powers import BLOCK, read, tensor_norms, unit_count, unit_norms

CPU = torch.device("cpu")
NORM_TYPES = [2.0, 1.0, 3.0, 0.5, math.inf, -math.inf, -1.0, 0.0]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def norm(tensor, norm_type=2.0):
    (value,) = tensor_norms([tensor], norm_type, CPU)
    assert value.dtype == torch.float64
    return value.item()


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]), st.sampled_from(DTYPES)
        ),
        max_size=5,
    ),
    st.integers(0, 2**31),
)
def test_norms_are_their_float64_twins(norm_type, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    # away from zero, where a negative power would turn one entry's rounding into everything
    tensors = [(torch.rand(size, generator=generator) + 0.5).to(dtype) for size, dtype in kinds]
    norms = tensor_norms(tensors, norm_type, CPU)
    assert norms.shape == (len(tensors),)
    for tensor, value in zip(tensors, norms.tolist(), strict=True):
        # Without the native kernel, float32 sums of up to 4096 powers: seen 3e-6 for p = 1, 8e-6 for p = -1.
        rel = 5e-6 if norm_type in {1.0, 2.0, math.inf, -math.inf, 0.0} else 2e-5
        assert value == pytest.approx(reference.norm([tensor], norm_type), rel=rel)


@pytest.mark.parametrize(
    ("entry", "dtype"), [(0.1, torch.float32), (0.003, torch.bfloat16), (1e-4, torch.float16)]
)
def test_long_sums_stay_exact(entry, dtype):
    """torch's own CPU norm of 67 million float32 entries is off by 0.5%."""
    size = 2**26
    tensor = torch.full((1,), entry, dtype=dtype).expand(size).contiguous()
    # Equal entries round the same way each time: seen 2.2e-6 with torch's kernels in blocks, 1e-16 natively.
    assert norm(tensor) == pytest.approx(math.sqrt(size) * tensor[0].double().item(), rel=5e-6)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_long_sums_of_random_entries_stay_exact(path, norm_type):
    tensor = torch.randn(2**20)
    # Over twelve seeds at most 6e-14 natively; by torch's operations, whose float32 blocks' roundings average out,
    # 9e-8 for p = 1 and 8e-9 for p = 2. torch's own norms are off by 9e-5 and 1e-5.
    rel = 1e-11 if path == "native" else {1.0: 1e-6, 2.0: 1e-7}[norm_type]
    assert norm(tensor, norm_type) == pytest.approx(reference.norm([tensor], norm_type), rel=rel)


@pytest.mark.parametrize("size", [1, 100, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize(
    ("entry", "dtype"),
    [
        (1e20, torch.float32),
        (3e38, torch.float32),
        (1e-23, torch.float32),
        (1e-40, torch.float32),
        (1e300, torch.float64),
        (1e-300, torch.float64),
        (3e38, torch.bfloat16),
        (1e-38, torch.bfloat16),
        (65504.0, torch.float16),
        (6e-8, torch.float16),
    ],
)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_a_finite_tensor_has_a_finite_norm_and_a_small_one_is_not_zero(size, entry, dtype, norm_type):
    tensor = torch.full((size,), entry, dtype=dtype)
    true = tensor[0].double().item() * (1.0 if math.isinf(norm_type) else size ** (1 / norm_type))
    assert norm(tensor, norm_type) == pytest.approx(true, rel=5e-6)


def test_large_and_small_entries_together():
    tensor = torch.tensor([1e30, 1.0, -1e-30, 0.0])
    assert norm(tensor) == pytest.approx(1e30, rel=1e-7)
    assert tensor_norms([tensor, torch.tensor([3.0, 4.0])], 2.0, CPU)[1] == 5.0


@pytest.mark.parametrize("size", [1, 3, BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_what_is_not_finite_shows(size, dtype, norm_type):
    for bad in (math.nan, math.inf, -math.inf):
        tensor = torch.ones(size, dtype=dtype)
        tensor[-1] = bad
        assert str(norm(tensor, norm_type)) == str(abs(bad))
    tensor = torch.full((3,), math.inf, dtype=dtype)
    tensor[0] = math.nan
    assert math.isnan(norm(tensor, norm_type))


def test_zero_and_empty_tensors():
    for norm_type in (1.0, 2.0, math.inf, 0.0):
        assert (
            tensor_norms([torch.zeros(3), torch.zeros(0), torch.zeros(2, 0)], norm_type, CPU).tolist()
            == [0.0] * 3
        )
        assert tensor_norms([], norm_type, CPU).shape == (0,)


@pytest.mark.parametrize("shape", [(6, 5), (200, 100)])
def test_memory_layouts(shape):
    tensor = torch.randn(*shape)
    wanted = reference.norm([tensor])
    layouts = {
        "transposed": tensor.t(),
        "strided": torch.repeat_interleave(tensor, 2, dim=1)[:, ::2],
        "offset": torch.cat([torch.full((1, shape[1]), math.nan), tensor])[1:],
        "flipped": tensor.flip(0),
        "channels last": tensor.reshape(1, shape[0], shape[1], 1).contiguous(
            memory_format=torch.channels_last
        ),
    }
    for name, layout in layouts.items():
        assert norm(layout) == pytest.approx(wanted, rel=1e-6), name
    assert norm(torch.ones(1).expand(BLOCK + 9)) == pytest.approx(math.sqrt(BLOCK + 9))


def test_reading_changes_nothing():
    tensor = torch.randn(3 * BLOCK)
    before, version = tensor.clone(), tensor._version
    tensor_norms([tensor], 2.0, CPU)
    read([tensor], 2.0, CPU, with_peaks=True)
    unit_norms(tensor.view(3, BLOCK), 3, 0, 2.0)
    assert torch.equal(tensor, before)
    assert tensor._version == version


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_units_are_slices_of_one_dimension(dtype, scale):
    tensor = (torch.randn(4, 3, 5) * scale).to(dtype)
    if not torch.isfinite(tensor).all() or not tensor.any():
        pytest.skip("not numbers of this dtype")
    for dim in range(3):
        got = unit_norms(tensor, tensor.shape[dim], dim, 2.0)
        wanted = [reference.norm([unit]) for unit in tensor.unbind(dim)]
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(wanted, rel=5e-6)
    assert unit_norms(tensor, 1, 0, math.inf).tolist() == [reference.norm([tensor], math.inf)]


def test_how_many_units_there_are():
    assert [unit_count(shape, 0) for shape in [(), (7,), (4, 3), (4, 3, 2)]] == [1, 1, 4, 4]
    assert [unit_count(shape, 1) for shape in [(), (7,), (4, 3), (4, 3, 2)]] == [1, 1, 3, 3]


def test_peaks_are_the_lowest_and_the_highest_entry():
    tensors = [torch.tensor([-3.0, 2.0]), torch.zeros(0), torch.tensor([math.nan, 1.0]), torch.tensor(5.0)]
    got = read(tensors, 2.0, CPU, with_peaks=True).peaks
    assert got.dtype == torch.float64
    assert got[[0, 1, 3]].tolist() == [[-3.0, 2.0], [0.0, 0.0], [5.0, 5.0]]
    assert got[2].isnan().all()
    assert read([], 2.0, CPU, with_peaks=True).peaks.shape == (0, 2)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_units_of_very_different_size_are_each_exact(norm_type):
    # The squares of the second unit leave float32 at the bottom, and those of the third at the top.
    tensor = torch.tensor([[3.0, 4.0], [3e-25, 4e-25], [3e25, 4e25], [0.0, 0.0]])
    wanted = [reference.norm([unit], norm_type) for unit in tensor.unbind()]
    # One float32 rounding of each entry and of each sum.
    assert unit_norms(tensor, 4, 0, norm_type).tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-14), (torch.float32, 1e-9)])
def test_long_and_wide_units_are_summed_in_float64(dtype, rel):
    # A float32 sum of so many entries is off by 1e-7 or more; float64 ones have their own roundings only.
    tensor = torch.full((2, 3 * BLOCK), 0.1, dtype=dtype)
    wanted = math.sqrt(3 * BLOCK) * tensor[0, 0].double().item()
    assert unit_norms(tensor, 2, 0, 2.0).tolist() == pytest.approx([wanted] * 2, rel=rel)
    short = torch.full((2, 7), 0.1, dtype=torch.float64)
    assert unit_norms(short, 2, 0, 2.0).tolist() == pytest.approx([math.sqrt(7) * 0.1] * 2, rel=1e-14)
