"""Long runs made short enough to draw: a bucket of steps becomes its lowest, median and highest value."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.record.reader import Reader
from gradkeel.record.schema import ROWS_PER_BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class Buckets:
    """Consecutive steps, summed up. Only finite values enter; a bucket without any holds NaN.

    Attributes:
        first: [c] int64 first step of each bucket.
        last: [c] int64 last step of each bucket.
        low: [c] or [c, n] lowest value.
        median: [c] or [c, n] median; of the medians of blocks of 64 steps where ``is_exact`` is False.
        high: [c] or [c, n] highest value.
        is_exact: whether the medians are those of the values themselves.
    """

    first: Tensor
    last: Tensor
    low: Tensor
    median: Tensor
    high: Tensor
    is_exact: bool = True


def summarize(values: Tensor) -> Tensor:
    """[3, ...] lowest, median and highest finite value along dimension 0; NaN where there is none."""
    if not values.shape[0]:
        return values.new_full((3, *values.shape[1:]), math.nan)
    finite = torch.isfinite(values)
    low = torch.where(finite, values, math.inf).amin(dim=0)
    high = torch.where(finite, values, -math.inf).amax(dim=0)
    nothing = ~finite.any(dim=0)
    median = torch.where(finite, values, math.nan).nanmedian(dim=0).values
    return torch.stack([low.masked_fill(nothing, math.nan), median, high.masked_fill(nothing, math.nan)])


def bucket(steps: Tensor, values: Tensor, columns: int) -> Buckets:
    """At most ``columns`` buckets of equally many rows.

    Args:
        steps: [k] numbers of the steps.
        values: [k] or [k, n], one row a step.
        columns: how many buckets there may be, 1 or more.
    """
    rows = steps.shape[0]
    width = max(1, math.ceil(rows / columns))
    parts = [summarize(values[i : i + width]) for i in range(0, rows, width)]
    stacked = torch.stack(parts) if parts else values.new_empty((0, 3, *values.shape[1:]))
    first = steps[::width]
    last = torch.cat([steps[width - 1 :: width], steps[-1:]])[: len(first)]
    return Buckets(first, last, stacked[:, 0], stacked[:, 1], stacked[:, 2])


def bucket_norms(reader: Reader, columns: int, start: int | None = None, stop: int | None = None) -> Buckets:
    """The norm of every parameter's gradient in at most ``columns`` buckets, whatever the length of the run.

    A bucket of fewer than 128 steps is made from the norms themselves, a longer one from the summaries of whole
    blocks, so that a run of a million steps is drawn from a few percent of its bytes; such buckets begin and end at
    blocks.

    Args:
        reader: an open record.
        columns: how many buckets there may be, 1 or more.
        start: number of the first step.
        stop: number of the step after the last.
    """
    first, last = reader.store.row_range(start, stop)
    rows = last - first
    if rows < 2 * ROWS_PER_BLOCK * columns:
        return _from_norms(reader, columns, first, last)
    begin, end = reader.store.block_range(start, stop)
    group = math.ceil((end - begin) / columns)
    spans = [(i, min(i + group, end)) for i in range(begin, end, group)]
    parts = []
    for i, j in spans:
        summaries = reader.store.block_summaries(i, j)
        parts.append(torch.stack([summarize(summaries[:, row])[row] for row in range(3)]))
    stacked = torch.stack(parts)
    return Buckets(
        torch.tensor([reader.store.blocks[i].first_step for i, _ in spans]),
        torch.tensor([reader.store.blocks[j - 1].last_step for _, j in spans]),
        stacked[:, 0],
        stacked[:, 1],
        stacked[:, 2],
        is_exact=False,
    )


def _from_norms(reader: Reader, columns: int, first: int, last: int) -> Buckets:
    """The same from the norms themselves, read bucket by bucket."""
    width = max(1, math.ceil((last - first) / columns))
    steps = reader.steps()[first:last]
    parts = []
    for i in range(first, last, width):
        rows = [piece for _, piece in reader.store.pieces("norms", i, min(i + width, last))]
        parts.append(summarize(torch.cat(rows)))
    stacked = torch.stack(parts) if parts else torch.empty(0, 3, len(reader.names), dtype=torch.float64)
    ends = torch.cat([steps[width - 1 :: width], steps[-1:]])[: len(parts)]
    return Buckets(steps[::width], ends, stacked[:, 0], stacked[:, 1], stacked[:, 2])
