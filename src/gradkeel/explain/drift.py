"""Slow rises, which no step of their own gives away: the level of the norm over whole stretches of a run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.explain.course import Course
from gradkeel.explain.events import log_norms
from gradkeel.record import bucket_norms

STRETCHES = 24
FEWEST_ROWS = 240
RATIO = 10.0
_MOSTLY = 0.8  # share of the stretches' changes, from the lowest on, that go up


@dataclass(frozen=True, slots=True)
class Drift:
    """A rise of the norm's level by at least ten times, without a jump.

    Attributes:
        step: about where it began: the first step of the lowest stretch.
        parameter: whose level rose most.
        before, after: the level at its lowest and at the end.
        stretch: how many steps a stretch has.
        growths: each parameter's level at the end over that at the lowest stretch, largest first.
    """

    step: int
    parameter: str
    before: float
    after: float
    stretch: int
    growths: tuple[tuple[str, float], ...]


def find_drift(course: Course) -> Drift | None:
    """The drift of a run, or None. A run whose loss, where logged, still fell during the rise has none."""
    rows = len(course.totals)
    if rows < FEWEST_ROWS:
        return None
    levels = _levels(course.totals, rows)
    lowest = int(levels.nan_to_num(nan=math.inf).argmin())
    rise = levels[lowest:]
    if len(rise) < 4 or not float(rise[-1] - rise[0]) > math.log10(RATIO):
        return None
    if float((rise.diff() > 0).double().mean()) < _MOSTLY or _improved(course.losses, lowest, rows):
        return None
    stretch = rows // STRETCHES
    growths = _growths(course, lowest * stretch, stretch)
    return Drift(
        step=course.step(lowest * stretch),
        parameter=growths[0][0],
        before=float(10 ** rise[0]),
        after=float(10 ** rise[-1]),
        stretch=stretch,
        growths=growths,
    )


def _levels(values: Tensor, rows: int) -> Tensor:
    """[STRETCHES] median log of positive values."""
    width = rows // STRETCHES
    return log_norms(values[: width * STRETCHES]).reshape(STRETCHES, width).nanmedian(dim=1).values


def _improved(losses: Tensor, lowest: int, rows: int) -> bool:
    """Whether the loss was lower at the end than where the norm was lowest."""
    levels = _levels(losses, rows)
    return bool(levels[-1] < levels[lowest])


def _growths(course: Course, row: int, stretch: int) -> tuple[tuple[str, float], ...]:
    first, last = course.step(row), course.step(len(course.steps) - stretch)
    before = bucket_norms(course.reader, 1, first, first + stretch).median[0]
    after = bucket_norms(course.reader, 1, last).median[0]
    growth = torch.where((before > 0) & (after > 0), after / before, math.nan)
    known = [
        (name, g) for name, g in zip(course.reader.names, growth.tolist(), strict=True) if math.isfinite(g)
    ]
    return tuple(sorted(known, key=lambda item: -item[1])) or (("", math.nan),)
