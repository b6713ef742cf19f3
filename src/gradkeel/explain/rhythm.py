"""Spikes that recur at equal distances are the data's rhythm: the last batch of an epoch is often a small one.

The gradient of a few samples is noisier than that of many, by up to the root of how many times fewer they are. A
step stands out by its place in the rhythm, not by a fault: there the norm is the highest of a whole period, again and
again, and after it all is as before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.explain.course import Course
from gradkeel.explain.events import CALM_ROWS, Event, log_norms
from gradkeel.explain.losses import FLAT, had_loss, loss_course

_SHORTEST, _FEWEST = 5, 3  # steps from one to the next, and how many there are at least
_HIGHEST = 30.0  # times the usual norm: about what a batch of one does beside batches of a thousand
_SIMILAR = 4.0  # times the highest norm of another step of the rhythm
_CHANCE = 0.01
_SEARCHED = 8  # events from which periods are looked for
_MOST_ROWS = 20_000_000  # looked at in all, which bounds the time for a long run
_AROUND = 8  # rows before a step that show the loss as it was


@dataclass(frozen=True, slots=True)
class Rhythm:
    """High rows at equal distances."""

    period: int
    rows: tuple[int, ...]  # those of them that are the highest of a period, from the first event on
    usual: float  # norm before the first of them that is an event


def find_rhythm(course: Course, events: Sequence[Event]) -> Rhythm | None:
    """The rhythm that most of these events recur with; None where none do, or they did harm."""
    logs = log_norms(course.totals).nan_to_num(nan=-math.inf)
    short = [event for event in events if _is_short(logs, event)]
    best: Rhythm | None = None
    most = (0, 0.0)
    for period, found in _candidates(logs, events, short)[: max(_FEWEST, _MOST_ROWS // len(logs))]:
        if len(found) < max(most[0], len(events) / 2):
            break
        rows, chance = _recurrence(logs, period, found, [event for event in events if event not in found])
        score = len(found), -chance
        if rows and score > most:
            baseline = found[0].baseline
            assert baseline is not None
            most, best = score, Rhythm(period, rows, baseline.norm)
    return best if best is not None and _is_harmless(course, best) else None


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
        and math.isfinite(first)
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
                before = torch.cat([side.new_tensor([-math.inf]), side.cummax(dim=0).values[:-1]])
                distances.update(((side > before).nonzero().flatten() + 1).tolist())
    parts = {distance // n for distance in distances for n in (1, 2, 3) if distance % n == 0}
    return sorted(part for part in parts if _SHORTEST <= part <= len(logs) // _FEWEST)


def _recurrence(
    logs: Tensor, period: int, found: Sequence[Event], others: Sequence[Event]
) -> tuple[tuple[int, ...], float]:
    """Rows from the first event on that are the highest of a period, () where by chance; and the log of that."""
    rows = torch.arange(found[0].start % period, len(logs), period, device="cpu")
    for event in others:
        rows = rows[(rows < event.start) | (rows >= event.stop)]
    padding = logs.new_full((period - 1,), -math.inf)
    around = torch.cat([padding, logs, padding]).unfold(0, 2 * period - 1, 1)[rows].clone()
    around[:, period - 1] = -math.inf
    high = rows[logs[rows] > around.amax(dim=1)]
    if len(high) < _FEWEST:
        return (), 0.0
    tops = logs[high].topk(2).values
    # One row is an event, and another is what the period was found by.
    trials, successes = len(rows) - 2, len(high) - 2
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    chance = ways - successes * math.log(2 * period - 1) + math.log(len(logs)) / 2
    starts = {event.start for event in found}
    in_a_row = any({start + period, start + 2 * period} <= starts for start in starts)
    is_sure = chance < math.log(_CHANCE) or (in_a_row and not others and 2 * len(high) > len(rows))
    is_one = float(tops[0] - tops[1]) <= math.log10(_SIMILAR)
    since = high[high >= found[0].start]
    return (tuple(since.tolist()), chance) if is_sure and is_one else ((), 0.0)


def _is_harmless(course: Course, rhythm: Rhythm) -> bool:
    """Whether the loss was after such steps what it was before, and is not worse since the first."""
    had = had_loss(course.steps, course.losses, course.skip_reasons)
    loss = loss_course(course.steps[had], course.losses[had])
    if loss is None:
        return True
    if not loss.is_finite or loss.is_worse_since(course.losses, rhythm.rows[0]):
        return False
    changes = []
    for row in rhythm.rows:
        past = course.losses[max(0, row - min(_AROUND, rhythm.period - 4)) : row]
        changes.append(course.losses[row + 1 : row + 4].nanmedian() - past.nanmedian())
    known = torch.stack(changes)
    known = known[~known.isnan()]
    return not len(known) or float(known.median()) <= max(loss.noise, FLAT * abs(loss.first))
