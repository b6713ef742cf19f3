"""Which parameters had a gradient when: where layers are frozen or unfrozen, norms before and after do not compare."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from gradkeel.explain.course import Course
from gradkeel.explain.events import FEWEST, log_norms
from gradkeel.record import Reader

_MOST = 256  # changes; where there are more, sets alternate, and what that does to the norm is usual
_NEAR = 5  # rows on either side of a change: few, for what explodes soon after it must not count


def level_changes(course: Course) -> Tensor:
    """[k] how much of each total's log10 is due to parameters that got a gradient, or lost it, for a while.

    Where the set of those with a gradient changes, and had been and is the same for several steps, norms are compared
    by what the others had; where no other has one, by their medians.
    """
    shifts = torch.zeros(len(course.totals), dtype=torch.float64, device="cpu")
    rows = [0, *_changes(course.reader), len(shifts)]
    stays = [b - a >= FEWEST for a, b in pairwise(rows)]
    lasting = [
        row for row, (before, after) in zip(rows[1:], pairwise(stays), strict=False) if before and after
    ]
    if len(lasting) <= _MOST:
        for row in lasting:
            shifts[row:] += _difference(course, row)
    return shifts


def _changes(reader: Reader) -> list[int]:
    """Rows whose set of parameters with a gradient is not that of the row before."""
    found: list[int] = []
    last: Tensor | None = None
    for first, rows in reader.store.pieces("present", 0, reader.store.rows):
        with_last = rows if last is None else torch.cat([last, rows])
        changed = (with_last[1:] != with_last[:-1]).any(dim=1).nonzero().flatten()
        found += (changed + first + (last is None)).tolist()
        last = rows[-1:].clone()
    return found


def _difference(course: Course, row: int) -> float:
    """By how much a change at a row moved the log10 of the total norm."""
    reader, span = course.reader, (row - _NEAR, row + _NEAR)
    main = reader.main
    norms = reader.store.series("norms", *span)[:, main]
    before, after = reader.store.series("present", row - 1, row + 1)[:, main].bool()
    totals, common = (
        log_norms(torch.linalg.vector_norm(part, ord=reader.norm_type, dim=1))
        for part in (norms, norms[:, before & after])
    )
    others = (totals - (common if bool((before & after).any()) else 0.0)).split(_NEAR)
    change = float(others[1].nanmedian() - others[0].nanmedian())
    return change if math.isfinite(change) else 0.0


def last_gradients(reader: Reader) -> Tensor:
    """[n] the last row at which each parameter had a gradient; -1 where it never had one."""
    result = torch.full((len(reader.names),), -1, device="cpu")
    for first, rows in reader.store.pieces("present", 0, reader.store.rows):
        numbers = torch.arange(first, first + len(rows), device="cpu").unsqueeze(1)
        result = torch.maximum(result, torch.where(rows.bool(), numbers, -1).amax(dim=0))
    return result
