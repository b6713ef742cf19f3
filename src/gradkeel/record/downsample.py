"""Long runs made short enough to draw: a bucket of steps becomes its lowest, median and highest value."""

import math
from collections.abc import Callable
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
    return _bucketed(steps, columns, lambda first, last: values[first:last])


def _bucketed(steps: Tensor, columns: int, rows: Callable[[int, int], Tensor]) -> Buckets:
    """Buckets of the [k] steps, whose values ``rows`` reads: those from one place up to another."""
    width = max(1, math.ceil(len(steps) / columns))
    parts = [summarize(rows(i, min(i + width, len(steps)))) for i in range(0, len(steps), width)]
    low, median, high = (torch.stack(parts) if parts else summarize(rows(0, 0)).unsqueeze(0)[:0]).unbind(1)
    last = torch.cat([steps[width - 1 :: width], steps[-1:]])[: len(parts)]
    return Buckets(steps[::width], last, low, median, high)


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
    if last - first < 2 * ROWS_PER_BLOCK * columns:
        steps = reader.steps()[first:last]
        return _bucketed(steps, columns, lambda i, j: reader.store.series("norms", first + i, first + j))
    begin, end = reader.store.block_range(start, stop)
    group = math.ceil((end - begin) / columns)
    spans = [(i, min(i + group, end)) for i in range(begin, end, group)]
    parts = []
    for i, j in spans:
        summaries = reader.store.block_summaries(i, j)
        parts.append(torch.stack([summarize(summaries[:, row])[row] for row in range(3)]))
    first_steps = torch.tensor([reader.store.blocks[i].first_step for i, _ in spans], device="cpu")
    last_steps = torch.tensor([reader.store.blocks[j - 1].last_step for _, j in spans], device="cpu")
    low, median, high = torch.stack(parts).unbind(1)
    return Buckets(first_steps, last_steps, low, median, high, is_exact=False)
