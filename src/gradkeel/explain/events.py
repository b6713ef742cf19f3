"""Where a series of norms leaves its own past: jumps and climbs, found by a robust z-score on the log norm.

The baseline of a step is the median of the log10 norms of the 32 steps before it, and their spread above that, so
that neither a trend of training nor earlier outliers move it much. An alarm needs surprise (z), size (a ratio to the
median) and novelty (a ratio to the highest of 128 steps), for log norms of healthy training have heavy tails. Which
parameters an event reached, and in which order, is found likewise, by each one's own past.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradkeel.explain.course import Course

WINDOW, RECENT = 128, 32
HOP = 8
"""The baseline is renewed every so many steps, which bounds the work on a run of a million."""
FEWEST = 8
"""Finite norms that a baseline needs."""
RATIO, NOVELTY = 3.0, 1.5
EARLY_ROWS = 16
EARLY_RATIO = 100.0
"""Before there is a baseline, a climb to so many times the first norm is an alarm."""
CALM_ROWS = 5
"""So many calm steps in a row end an event."""
ONE_EVENT = 20
"""Alarms so few steps apart are of one event."""
MOST_EVENTS = 50
_FEWEST_PASSES, _MOST_ROWS = 4, 1_000_000  # rows looked at in all, which bounds the time for a long run
_FLOOR = 0.04  # of the standard deviation of a log10 norm: about 10%
_QUARTILE_TO_STD = 1.4826
_FUTURE = 256  # rows of an event in which parameters are looked for
_DEVIATIONS, _TIMES = 3.5, 2.0  # a parameter counts as reached so far above its own past

NEGLIGIBLE = 1e-4
"""A gradient of less than this share of all is as the rounding noise of a key's bias, which softmax does not see."""

Ended = Literal["recovered", "non-finite", "high"]
"""The norm came back, was not finite to the end, or was still high at the end."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What was normal before a row: median and robust standard deviation of the log10 norm."""

    median: float
    deviation: float

    @property
    def norm(self) -> float:
        """The median as a norm."""
        return float(10.0**self.median)

    def score(self, norm: float) -> float:
        """Robust z-score of a norm; inf where it is not finite."""
        return (math.log10(norm) - self.median) / self.deviation if 0 < norm < math.inf else math.inf


@dataclass(frozen=True, slots=True)
class Event:
    """Rows, from ``start`` up to ``stop``, in which the norm was far above its own past."""

    start: int
    stop: int
    baseline: Baseline | None  # what was normal before; None where it began before there was a past
    ended: Ended


def log_norms(norms: Tensor) -> Tensor:
    """log10 of norms; NaN where a norm is zero or not finite."""
    usable = torch.isfinite(norms) & (norms > 0)
    return torch.where(usable, norms, 1.0).log10().masked_fill(~usable, math.nan)


def find_events(
    norms: Tensor, nonfinite: Tensor, levels: Tensor | None = None, apart: int = ONE_EVENT
) -> list[Event]:
    """All events, in order, at most ``MOST_EVENTS``.

    ``nonfinite`` [k] says where any gradient was not finite, and ``levels`` [k] what of the log10 norms is due to other
    parameters than before having gradients. Those at most so many rows ``apart`` are one.
    """
    levels = torch.zeros(len(norms), dtype=torch.float64, device="cpu") if levels is None else levels
    logs = (log_norms(norms) - levels).masked_fill(nonfinite, math.nan)
    events: list[Event] = []
    calm = logs.clone()
    # An event hides those after it until its rows are left out of their baselines: a pass may find one more.
    for _ in range(max(_FEWEST_PASSES, min(MOST_EVENTS, _MOST_ROWS // max(1, len(logs))))):
        found = _find(logs, nonfinite, rolling(calm), apart)
        if found == events:
            break
        events = found
        for event in events:
            calm[event.start : event.stop] = math.nan
    return [replace(event, baseline=_above(event.baseline, float(levels[event.start]))) for event in events]


def _above(baseline: Baseline | None, level: float) -> Baseline | None:
    return baseline and replace(baseline, median=baseline.median + level)


def _find(logs: Tensor, nonfinite: Tensor, past: Tensor, apart: int) -> list[Event]:
    median, deviation, highest = past
    alarms = nonfinite | (
        (logs > median + surprise(len(logs)) * deviation)
        & (logs > median + math.log10(RATIO))
        & (logs > highest + math.log10(NOVELTY))
    )
    alarms[:EARLY_ROWS] |= logs[:EARLY_ROWS] > logs[:1] + math.log10(EARLY_RATIO)
    events: list[Event] = []
    done = 0
    for row in alarms.nonzero().flatten().tolist():
        if row >= done and len(events) < MOST_EVENTS:
            event = _Finder(logs, nonfinite, median, deviation, done).event(row)
            if events and event.start - events[-1].stop <= apart:
                event = replace(events.pop(), stop=event.stop, ended=event.ended)
            events.append(event)
            done = event.stop
    return events


def surprise(rows: int) -> float:
    """The z-score from which on a norm is an alarm: 4.5 in a run of 300 steps, 6.4 in one of a million.

    The largest of k normal numbers is about ``sqrt(2 ln k)``; a long run must not raise alarms by its length alone.
    """
    return math.sqrt(2 * math.log(max(rows, 2))) + 1.1


def rolling(logs: Tensor) -> Tensor:
    """[3, k] median and deviation of the log norms shortly before each row, and their maximum over a longer time.

    NaN where there are too few of them.
    """
    padded = torch.cat([logs.new_full((WINDOW,), math.nan), logs])
    windows = padded.unfold(0, WINDOW, HOP)  # window i holds the rows before row i * HOP
    statistics = torch.cat([_statistics(chunk) for chunk in windows.split(8192)], dim=1)
    # 32 values may lie close together by chance: the spread is taken as no less than the run's usual one.
    statistics[1] = torch.maximum(statistics[1], statistics[1].nanmedian())
    return statistics.repeat_interleave(HOP, dim=1)[:, : len(logs)]


def _statistics(windows: Tensor) -> Tensor:
    """[3, w] of windows [w, WINDOW]."""
    recent = windows[:, -RECENT:]
    enough = (~recent.isnan()).sum(dim=1) >= FEWEST
    highest = windows.nan_to_num(nan=-math.inf).amax(dim=1)
    return torch.where(enough, torch.stack([*level_and_spread(recent), highest]), math.nan)


def level_and_spread(logs: Tensor) -> tuple[Tensor, Tensor]:
    """[w] median and robust upward deviation of log norms [w, m], NaN ones left out.

    The deviation comes from the upper quartile alone: log norms are skewed to the left, by batches that happen to
    fit. That of few values is often too small: it is taken as twice that for 8 of them, and hardly more for many.
    """
    ordered, _ = logs.sort(dim=1)  # NaN last
    count = (~ordered.isnan()).sum(dim=1)
    median, quartile = (
        ordered.gather(1, ((count - 1) * share).long().clamp(min=0).unsqueeze(1)).squeeze(1)
        for share in (0.5, 0.75)
    )
    return median, (_QUARTILE_TO_STD * (quartile - median)).clamp(min=_FLOOR) * (
        1 + FEWEST / count.clamp(min=1)
    )


class _Finder:
    """Finds where an event began and ended, from a row that is in it."""

    def __init__(
        self, logs: Tensor, nonfinite: Tensor, median: Tensor, deviation: Tensor, first: int
    ) -> None:
        self._logs, self._nonfinite, self._first = logs, nonfinite, first
        self._median, self._deviation = median, deviation

    def event(self, alarm: int) -> Event:
        """The event that this alarm is in."""
        start = self._climb(alarm, self._baseline(alarm))
        for _ in range(2):  # a slow climb had entered the baseline that it was seen against
            start = self._climb(start, self._baseline(start))
        baseline = self._baseline(start)
        stop = self._calm(alarm, baseline, float(self._logs[start]))
        ended: Ended = "recovered"
        if stop == len(self._logs):
            ended = "non-finite" if bool(self._nonfinite[-1]) else "high"
        return Event(start, stop, baseline, ended)

    def _baseline(self, row: int) -> Baseline | None:
        median = float(self._median[row])
        return None if math.isnan(median) else Baseline(median, float(self._deviation[row]))

    def _climb(self, row: int, baseline: Baseline | None) -> int:
        """The first row of the climb that leads to ``row``."""
        while row > self._first:
            before = float(self._logs[row - 1])
            high = (
                before > baseline.median + 3 * baseline.deviation
                if baseline
                else before < float(self._logs[row])
            )
            if not (high or bool(self._nonfinite[row - 1])):
                break
            row -= 1
        return row

    def _calm(self, alarm: int, baseline: Baseline | None, first: float) -> int:
        """The first row from which on the norm is back; the number of rows if it never is."""
        limit = (
            first + 1.0
            if baseline is None
            else baseline.median + max(3 * baseline.deviation, math.log10(2.0))
        )
        calm = ~((self._logs[alarm:] > limit) | self._nonfinite[alarm:])
        padded = torch.cat([calm, calm[-1:].expand(CALM_ROWS - 1)])
        found = padded.unfold(0, CALM_ROWS, 1).all(dim=1).nonzero()
        return alarm + int(found[0]) if len(found) else len(self._logs)


@dataclass(frozen=True, slots=True)
class Reached:
    """A parameter that an explosion reached.

    Attributes:
        parameter: its name.
        step: the first step at which its gradient norm was far above its own past.
        growth: its norm there over what it was before (from the initialization on: at the first step); None where
            that is not a number, or where something else than its norm was the sign.
    """

    parameter: str
    step: int
    growth: float | None


def spread(course: Course, event: Event) -> list[Reached]:
    """The parameters that an event reached, in order.

    Within one step: gradients that were not finite first, from the last parameter to the first, as backward meets
    them; then those that grew most. Gradients that are negligible beside the others come last of all.
    """
    begin = max(0, event.start - RECENT)
    norms = course.reader.store.series("norms", begin, min(event.stop, event.start + _FUTURE))
    now = norms[event.start - begin :]
    past = norms[: event.start - begin] if event.start else norms[:1]
    logs = log_norms(now)
    level, deviation = level_and_spread(log_norms(past).T)
    bad = ~torch.isfinite(now)
    shares = now / torch.linalg.vector_norm(now.masked_fill(bad, 0.0), dim=1, keepdim=True)
    negligible = ~bad & (shares < NEGLIGIBLE)
    reached = bad | ((logs > level + _DEVIATIONS * deviation) & (logs > level + math.log10(_TIMES)))
    found = []
    for j in reached.any(dim=0).nonzero().flatten().tolist():
        row = int(reached[:, j].int().argmax())
        growth = float(10 ** (logs[row, j] - level[j]))
        rank, by = (0, -j) if bool(bad[row, j]) else (1, -growth)
        order = (bool(negligible[row, j]), row, rank, by)
        step, name = course.step(event.start + row), course.reader.names[j]
        found.append((order, Reached(name, step, growth if math.isfinite(growth) else None)))
    return [reached for _, reached in sorted(found, key=lambda item: item[0])]
