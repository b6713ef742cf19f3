"""Spikes that recur at equal distances are the data's rhythm: the last batch of an epoch is often a small one.

The gradient of a few samples is noisier than that of many, by up to the root of how many times fewer they are. A
step stands out by its place in the rhythm, not by a fault: there the norm is the highest of a whole period, again and
again, and after it all is as before.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.explain.course import Course
from gradkeel.explain.events import CALM_ROWS, Event, log_norms
from gradkeel.explain.losses import FLAT, TAIL, had_loss, loss_course

_SHORTEST, _FEWEST = 5, 3  # steps from one to the next, and how many there are at least
_HIGHEST = 30.0  # times the usual norm: about what a batch of one does beside batches of a thousand
_SIMILAR = 4.0  # times the highest norm of another step of the rhythm
_CHANCE = 0.01
_SEARCHED = 8  # events from which periods are looked for
_WORSE = 0.15  # of what training had gained
_MOST_ROWS = 100_000_000  # looked at in all, which bounds the time for a long run
_AROUND = 8  # rows before a step that show the loss as it was


def find_rhythm(course: Course, events: Sequence[Event]) -> tuple[int, list[Event], list[Event]] | None:
    """The period in rows, the events that recur with it, and the others; None where none do, or they did harm."""
    logs = log_norms(course.totals).nan_to_num(nan=-math.inf)
    short = [event for event in events if _is_short(logs, event)]
    best: tuple[int, list[Event]] | None = None
    most = (0, 0)
    for period, found in _candidates(logs, events, short)[: max(_FEWEST, _MOST_ROWS // len(logs))]:
        if len(found) < most[0]:
            break
        score = len(found), _recurrence(logs, period, found, is_all=len(found) == len(events))
        if score[1] and score > most:
            most, best = score, (period, found)
    if best is None or not _is_harmless(course, *best):
        return None
    return *best, [event for event in events if event not in best[1]]


def _candidates(
    logs: Tensor, events: Sequence[Event], short: Sequence[Event]
) -> list[tuple[int, list[Event]]]:
    """Periods and the events that one explains, most first; where one of these is a fault, all may be."""
    found = []
    for period in _periods(logs, short):
        phases: dict[int, list[Event]] = {}
        for event in events:
            phases.setdefault(event.start % period, []).append(event)
        found += [(period, own) for own in phases.values() if all(event in short for event in own)]
    return sorted(found, key=lambda one: -len(one[1]))


def _is_short(logs: Tensor, event: Event) -> bool:
    """Whether it is one moderate step, and those after it are none of their own."""
    first = float(logs[event.start])
    return (
        event.baseline is not None
        and event.stop - event.start <= CALM_ROWS
        and first >= float(logs[event.start : max(event.stop, event.start + 1)].max())
        and first - event.baseline.median < math.log10(_HIGHEST)
        and (event.ended == "recovered" or event.stop == len(logs))
    )


def _periods(logs: Tensor, events: Sequence[Event]) -> list[int]:
    """Distances between events, and from events to the highest steps around them; and halves and thirds of these."""
    starts = [event.start for event in events]
    distances = {b - a for i, a in enumerate(starts) for b in starts[i + 1 :]}
    for row in starts[:_SEARCHED]:
        for side in (logs[row + 1 :], logs[:row].flip(0)):
            if len(side):
                distances.update(((side == side.cummax(dim=0).values).nonzero().flatten() + 1).tolist())
    parts = {distance // n for distance in distances for n in (1, 2, 3) if distance % n == 0}
    return sorted(part for part in parts if _SHORTEST <= part <= len(logs) // _FEWEST)


def _recurrence(logs: Tensor, period: int, found: Sequence[Event], *, is_all: bool) -> int:
    """How many more steps of a period are the highest around than are not; 0 where that may be chance."""
    rows = torch.arange(found[0].start % period, len(logs), period)
    padding = logs.new_full((period - 1,), -math.inf)
    around = torch.cat([padding, logs, padding]).unfold(0, 2 * period - 1, 1)[rows].clone()
    around[:, period - 1] = -math.inf
    hits, highest = int((logs[rows] > around.amax(dim=1)).sum()), logs[rows].sort(descending=True).values
    surplus = 2 * hits - len(rows)
    if hits < _FEWEST or surplus <= 0 or float(highest[0] - highest[1]) > math.log10(_SIMILAR):
        return 0
    # One step is an event, and another is what the period was found by.
    trials, successes = len(rows) - 2, hits - 2
    chance = math.comb(trials, successes) * (2 * period - 1.0) ** -successes * math.sqrt(len(logs))
    starts = {event.start for event in found}
    in_a_row = any({start + period, start + 2 * period} <= starts for start in starts)
    return surplus if chance < _CHANCE or (in_a_row and is_all) else 0


def _is_harmless(course: Course, period: int, events: Sequence[Event]) -> bool:
    """Whether the loss was after such steps what it was before, and is not worse since the first."""
    had = had_loss(course.steps, course.losses, course.skip_reasons)
    loss = loss_course(course.steps[had], course.losses[had])
    if loss is None:
        return True
    first = events[0].start
    before = course.losses[:first]
    before = before[torch.isfinite(before)][-2 * TAIL :]
    least = max(loss.error, FLAT * abs(loss.first))
    if not loss.is_finite:
        return False
    if len(before):
        usual = float(before.median())
        if loss.last - usual > max(least, _WORSE * (loss.first - usual)):
            return False
    changes = []
    for row in range(first % period, len(course.losses) - 3, period):
        past = course.losses[max(0, row - min(_AROUND, period - 4)) : row]
        changes.append(course.losses[row + 1 : row + 4].nanmedian() - past.nanmedian())
    known = torch.stack(changes) if changes else torch.empty(0)
    known = known[~known.isnan()]
    return not len(known) or float(known.median()) <= max(loss.noise, FLAT * abs(loss.first))
