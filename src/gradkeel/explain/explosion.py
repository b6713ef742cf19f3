"""When a run's gradients exploded, in which parameter first, how that spread and how it ended."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gradkeel.explain import evidence
from gradkeel.explain.course import Course
from gradkeel.explain.events import (
    CALM_ROWS,
    RATIO,
    Baseline,
    Ended,
    Event,
    Reached,
    find_events,
    level_and_spread,
    log_norms,
    spread,
)
from gradkeel.explain.presence import level_changes
from gradkeel.explain.rhythm import Rhythm, find_rhythm
from gradkeel.explain.weights import Jump, Overwrite, find_jumps, find_overwrites, larger_updates
from gradkeel.guard import SkipReason
from gradkeel.record import Reader, bucket_norms

Kind = Literal["explosion", "spike", "initialization", "overflow", "weights", "updates", "drift", "rhythm"]
LONG_BEFORE = 50  # steps by which an update that overwrote the weights may precede the gradients' explosion
# A drift: over so many stretches of at least so many steps, by so many times, and up in this share of the changes.
_STRETCHES, _SHORTEST, _ROSE, _MOSTLY = 24, 10, 10.0, 0.8


@dataclass(frozen=True, slots=True)
class Explosion:
    """One explosion, or that there is none (``found`` is False, and the rest is empty).

    Attributes:
        found: whether there is one.
        kind: "explosion": norms rose and stayed high or left the finite numbers; "spike": they came back;
            "initialization": they grew from the first steps on, so that there is no past to compare with;
            "overflow": the loss scale overflowed, which GradScaler provokes by design; "weights": a parameter
            changed without an update that explains it, and the gradient norm shows nothing; "updates": updates as
            large as the weights, likewise; "drift": a slow rise; "rhythm": single high steps that recur at equal
            distances and did no harm, as small last batches of epochs make them.
        step, last_step: at which it began, and the last of it.
        parameter: in which it was first.
        ended: "recovered", "non-finite" (to the end of the record), "high" (still, at the end).
        norm_before: the usual norm before it; None without a past.
        peak_norm, peak_step: largest finite norm of the main selection's gradients in it, and when that was.
        growth_per_step: mean factor by which the norm grew, from before it to its peak.
        score: robust z-score of the first step's log norm; None without a past or where it was not finite.
        spread: the parameters that it reached, in order.
        altered: parameters whose weights changed then, although no update explains it.
        overwritten: parameters whose update was larger than their weights at that step, after small ones.
        evidence: what all this rests on, in sentences.
        period: steps from one to the next, of a "rhythm".
    """

    found: bool = True
    kind: Kind | None = None
    step: int | None = None
    parameter: str | None = None
    ended: Ended | None = None
    last_step: int | None = None
    norm_before: float | None = None
    peak_norm: float | None = None
    peak_step: int | None = None
    growth_per_step: float | None = None
    score: float | None = None
    spread: tuple[Reached, ...] = ()
    altered: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    period: int | None = None


def find_explosions(run: Reader | Course) -> list[Explosion]:
    """All explosions of a run, in order; empty for a healthy one."""
    course = Course(run) if isinstance(run, Reader) else run
    found: list[Explosion] = []
    jumps, overwrites = find_jumps(course), find_overwrites(course)
    left = jumps
    events, rhythm = _events(course)
    for event in events:
        first, last = course.step(event.start), course.step(event.stop - 1)
        if event.baseline is None:
            found.append(_initial(course, event))
            overwrites = [o for o in overwrites if o.step > last]
            continue
        # Shortly before the event, in it, or first seen there.
        own_jumps = [j for j in jumps if j.after < last and first - 3 <= j.step <= max(last, first + 10)]
        own_overwrites = [o for o in overwrites if first - LONG_BEFORE <= o.step <= last + 1]
        found.append(_later(course, event, own_jumps, own_overwrites))
        left = [jump for jump in left if jump not in own_jumps]
        overwrites = [overwrite for overwrite in overwrites if overwrite not in own_overwrites]
    found += [_altered([j for j in left if j.step == step]) for step in dict.fromkeys(j.step for j in left)]
    altered = {explosion.step for explosion in found if explosion.altered}
    found += [_overwritten(course, overwrite) for overwrite in overwrites if overwrite.step not in altered]
    if not found:
        found += _drift(course)
    found += [_rhythm(course, rhythm)] if rhythm is not None else []
    return sorted(found, key=lambda explosion: explosion.step or 0)


def _events(course: Course) -> tuple[list[Event], Rhythm | None]:
    """All events in order, and the rhythm that others recur with."""
    totals, levels = course.totals, level_changes(course)
    events = find_events(totals, course.nonfinite, levels)
    apart = find_events(totals, course.nonfinite, levels, apart=0) if events else []
    rhythm = find_rhythm(course, apart)
    if rhythm is not None:
        beats = torch.arange(rhythm.rows[0] % rhythm.period, len(totals), rhythm.period, device="cpu")
        calm = totals.index_copy(0, beats, totals[(beats - 1).clamp(min=0)])  # a beat as the step before it
        events = find_events(calm, course.nonfinite, levels)
    return [replace(one, baseline=one.baseline or _short_past(course, one)) for one in events], rhythm


def worst(explosions: list[Explosion]) -> Explosion:
    """The one to look at first: what the run ended with, else the first sure fault, else the highest spike.

    A rhythm is none.
    """
    explosions = [explosion for explosion in explosions if explosion.kind != "rhythm"]

    def rank(explosion: Explosion) -> tuple[float, float]:
        severity = {"non-finite": 3.0, "high": 2.0}.get(explosion.ended or "", 0.0)
        if explosion.ended == "high" and (explosion.last_step or 0) - (explosion.step or 0) < CALM_ROWS:
            severity = 0.0  # it may have been a spike: the record ends with it
        if explosion.altered or explosion.overwritten or explosion.kind == "updates":
            return severity + 0.5, -(explosion.step or 0)
        height = (explosion.peak_norm or 0.0) / explosion.norm_before if explosion.norm_before else 1.0
        return severity, -1.0 if explosion.kind == "overflow" else height

    return max(explosions, key=rank) if explosions else Explosion(found=False)


def _later(course: Course, event: Event, jumps: list[Jump], overwrites: list[Overwrite]) -> Explosion:
    """An explosion that left a past."""
    assert event.baseline is not None
    step = course.step(event.start)
    first_jumps = [jump for jump in jumps if jump.step <= step or not jump.is_exact]
    reached = spread(course, event)
    first_overwrite = next((o for o in overwrites if o.step < step), None)
    if first_jumps:
        step = min([step, *(jump.step for jump in first_jumps)])
        reached = _put_first([jump.parameter for jump in first_jumps], reached, step)
    elif first_overwrite is not None:
        step = first_overwrite.step
        reached = _put_first([name for name, _ in first_overwrite.parameters[:1]], reached, step)
    before, first = event.baseline.norm, float(course.totals[event.start])
    overflow = course.skip_reasons.get(step) is SkipReason.LOSS_SCALE
    return Explosion(
        kind="overflow" if overflow else "spike" if event.ended == "recovered" else "explosion",
        step=step,
        norm_before=before,
        score=event.baseline.score(first) if 0 < first < math.inf else None,
        altered=tuple(jump.parameter for jump in first_jumps),
        overwritten=tuple(name for o in overwrites if o.step == step for name, _ in o.parameters),
        evidence=evidence.later(
            course, event, reached, first_jumps, None if first_jumps else first_overwrite
        ),
        **_seen(course, event, reached, before, event.start - 1),
    )


def _put_first(names: list[str], reached: list[Reached], step: int) -> list[Reached]:
    """The spread with these parameters in front, at ``step``."""
    growth = {r.parameter: r.growth for r in reached if r.step == step}
    first = [Reached(name, step, growth.get(name)) for name in names]
    return first + [r for r in reached if r.parameter not in names]


def _short_past(course: Course, event: Event) -> Baseline | None:
    """What was normal before a gradient that was not finite, where the few steps before it neither rose nor overwrote.

    None where they are no past: a climb out of the first steps has none.
    """
    past = log_norms(course.totals[: event.start])
    past = past[~past.isnan()]
    if not len(past) or not bool(course.nonfinite[event.start]):
        return None
    if float(past.max() - past[0]) > math.log10(RATIO) or larger_updates(course, course.step(event.start)):
        return None
    level, deviation = level_and_spread(past.unsqueeze(0))
    return Baseline(float(level), float(deviation))


def _initial(course: Course, event: Event) -> Explosion:
    """An explosion that had no past: told by updates larger than the weights that they change."""
    onsets = larger_updates(course, course.step(event.stop - 1))
    order = [Reached(name, step, _growth(course, name, step)) for name, step, _ in onsets]
    early = {reached.parameter for reached in order}
    reached = order + [r for r in spread(course, event) if r.parameter not in early]
    overflow = course.skip_reasons.get(course.step(event.start)) is SkipReason.LOSS_SCALE
    is_over = evidence.is_bad_start(course, event)
    return Explosion(
        kind="overflow" if overflow else "spike" if is_over else "initialization",
        step=reached[0].step if reached else course.step(event.start),
        evidence=evidence.initial(course, event, onsets),
        **_seen(course, event, reached, float(course.totals[0]), 0),
    )


def _growth(course: Course, name: str, step: int) -> float | None:
    """A parameter's norm at a step over that at the first step; None where that is not a number."""
    column = course.reader.names.index(name)
    first, now = (float(course.reader.norms(s, s + 1)[0, column]) for s in (course.step(0), step))
    return now / first if first > 0 and math.isfinite(now / first) else None


def _seen(course: Course, event: Event, reached: list[Reached], before: float, row: int) -> dict[str, Any]:
    """What an event went through: where it was, how it ended, and its peak over a norm ``before`` it in ``row``."""
    seen = {
        "parameter": reached[0].parameter if reached else None,
        "ended": event.ended,
        "last_step": course.step(event.stop - 1),
        "spread": tuple(reached),
    }
    part = course.totals[event.start : event.stop]
    heights = part.masked_fill(~torch.isfinite(part), -math.inf)
    if not bool((heights > -math.inf).any()):  # none, too, of norms that make no sense, in a damaged record
        return seen
    top = int(heights.argmax())
    peak, peak_row = float(part[top]), event.start + top
    growth = _rate(before, peak, peak_row - row)
    return seen | {"peak_norm": peak, "peak_step": course.step(peak_row), "growth_per_step": growth}


def _altered(jumps: list[Jump]) -> Explosion:
    """Weights that changed by themselves, without a trace in the gradient norm."""
    step = jumps[0].step
    most = max(jumps, key=lambda jump: abs(math.log(jump.ratio)) if jump.ratio else math.inf)
    return Explosion(
        kind="weights",
        step=step,
        parameter=most.parameter,
        ended="recovered",
        last_step=step,
        spread=tuple(Reached(jump.parameter, step, None) for jump in jumps),
        altered=tuple(jump.parameter for jump in jumps),
        evidence=tuple(map(evidence.jump, jumps)),
    )


def _overwritten(course: Course, overwrite: Overwrite) -> Explosion:
    """Updates as large as the weights, without a trace in the gradient norm."""
    row = int(torch.searchsorted(course.steps, overwrite.step))
    names = tuple(name for name, _ in overwrite.parameters)
    return Explosion(
        kind="updates",
        step=overwrite.step,
        parameter=names[0] if names else None,
        ended="high" if overwrite.lasts else "recovered",
        last_step=overwrite.last_step,
        spread=tuple(Reached(name, overwrite.step, None) for name in names),
        overwritten=names,
        evidence=tuple(filter(None, (evidence.rates(course, row), evidence.overwrite(overwrite)))),
    )


def _rhythm(course: Course, rhythm: Rhythm) -> Explosion:
    """High steps that recur, as one."""
    peak = max(rhythm.rows, key=course.totals.__getitem__)
    return Explosion(
        kind="rhythm",
        step=course.step(rhythm.rows[0]),
        ended="recovered",
        last_step=course.step(rhythm.rows[-1]),
        norm_before=rhythm.usual,
        peak_norm=float(course.totals[peak]),
        peak_step=course.step(peak),
        period=rhythm.period,
    )


def _drift(course: Course) -> list[Explosion]:
    """A rise of the norm over whole stretches of the run, without a jump; none where the loss fell during it."""
    stretch = len(course.totals) // _STRETCHES
    if stretch < _SHORTEST:
        return []
    levels, losses = _levels(course.totals, stretch), _levels(course.losses, stretch)
    lowest = int(levels.nan_to_num(nan=math.inf).argmin())
    rise = levels[lowest:]
    if len(rise) < 4 or not float(rise[-1] - rise[0]) > math.log10(_ROSE):
        return []
    if float((rise.diff() > 0).double().mean()) < _MOSTLY or bool(losses[-1] < losses[lowest]):
        return []
    first, last = course.step(lowest * stretch), course.step(-1)
    before, after = float(10 ** rise[0]), float(10 ** rise[-1])
    growths = _growths(course.reader, (first, first + stretch), (course.step(-stretch), None))
    return [
        Explosion(
            kind="drift",
            step=first,
            parameter=growths[0][0],
            ended="high",
            last_step=last,
            norm_before=before,
            peak_norm=after,
            peak_step=last,
            growth_per_step=_rate(before, after, last - first),
            spread=tuple(Reached(name, first, growth) for name, growth in growths if growth > 1),
            evidence=evidence.drift(stretch, before, after, growths),
        )
    ]


def _levels(values: Tensor, stretch: int) -> Tensor:
    """[_STRETCHES] median log of the positive values of each stretch."""
    return log_norms(values[: _STRETCHES * stretch]).reshape(_STRETCHES, stretch).nanmedian(dim=1).values


def _growths(reader: Reader, *spans: tuple[int, int | None]) -> list[tuple[str, float]]:
    """Each parameter's median norm in the last of two spans of steps over that in the first, largest first."""
    before, after = (bucket_norms(reader, 1, *span).median[0] for span in spans)
    growth = torch.where((before > 0) & (after > 0), after / before, math.nan).tolist()
    known = [(name, g) for name, g in zip(reader.names, growth, strict=True) if math.isfinite(g)]
    return sorted(known, key=lambda item: -item[1]) or [("", math.nan)]


def _rate(before: float, after: float, steps: int) -> float | None:
    """Mean factor a step from one norm to another; None where both are of one step."""
    return (after / before) ** (1 / steps) if before > 0 and after > 0 and steps else None
