"""Buckets equal the same statistics of the whole, whichever way they are read."""

import math

import pytest
import torch

from gradkeel.record import Reader, Recorder, bucket, bucket_norms
from gradkeel.record.schema import ROWS_PER_BLOCK


@pytest.fixture(scope="module")
def long_record(tmp_path_factory, make_report):
    path = tmp_path_factory.mktemp("long") / "run.keel"
    recorder = Recorder(path)
    generator = torch.Generator().manual_seed(0)
    norms = torch.rand(2000, 3, generator=generator, dtype=torch.float64)
    norms[700, 1] = math.nan
    norms[1000:1100, 2] = math.inf
    for step in range(1, 2001):
        recorder.record(make_report(step, norms=norms[step - 1].tolist()))
    recorder.close()
    return path, norms


def finite(values, function):
    kept = values[torch.isfinite(values)]
    return float(function(kept)) if len(kept) else math.nan


def twin(values, first, last, function):
    rows = [
        [finite(values[a - 1 : b, j], function) for j in range(3)] for a, b in zip(first, last, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 3, 7, 50, 2000, 5000])
@pytest.mark.parametrize("span", [(None, None), (100, 1500), (999, 1002)])
def test_buckets_of_norms(long_record, columns, span):
    path, norms = long_record
    with Reader(path) as run:
        buckets = bucket_norms(run, columns, *span)
    first, last = buckets.first.tolist(), buckets.last.tolist()
    assert len(first) <= columns
    assert all(b + 1 == a for a, b in zip(first[1:], last, strict=False))
    if buckets.is_exact:
        assert (first[0], last[-1]) == (span[0] or 1, (span[1] or 2001) - 1)
    else:  # whole blocks around what was asked for
        assert first[0] <= (span[0] or 1) < first[0] + ROWS_PER_BLOCK
        assert last[-1] - ROWS_PER_BLOCK < (span[1] or 2001) - 1 <= last[-1]
    for values, function in ((buckets.low, torch.min), (buckets.high, torch.max)):
        assert_same(values, twin(norms, first, last, function))
    if buckets.is_exact:
        assert_same(buckets.median, twin(norms, first, last, torch.median))
    else:
        # A median of medians of 64 uniform numbers, each with a standard deviation of 0.06; the last block is shorter.
        assert ((torch.nan_to_num(buckets.median, nan=0.5)[:-1] - 0.5).abs() < 0.12).all()


def test_long_buckets_do_not_read_the_norms(long_record, monkeypatch):
    path, _ = long_record
    with Reader(path) as run:
        monkeypatch.setattr(run.store, "pieces", None)
        assert not bucket_norms(run, 5).is_exact


def test_buckets_of_one_number_a_step():
    steps = torch.arange(10, 20)
    values = torch.tensor([1.0, 5, 3, math.nan, math.nan, math.nan, 7, 8, math.inf, 2])
    buckets = bucket(steps, values, 4)
    assert buckets.first.tolist() == [10, 13, 16, 19]
    assert buckets.last.tolist() == [12, 15, 18, 19]
    assert buckets.low.tolist() == pytest.approx([1, math.nan, 7, 2], nan_ok=True)
    assert buckets.median.tolist() == pytest.approx([3, math.nan, 7, 2], nan_ok=True)
    assert buckets.high.tolist() == pytest.approx([5, math.nan, 8, 2], nan_ok=True)


def test_nothing_to_put_into_buckets():
    buckets = bucket(torch.empty(0, dtype=torch.int64), torch.empty(0), 5)
    assert len(buckets.first) == len(buckets.median) == 0
