"""From a record to what a verdict is made from."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import compress

import torch

from gradkeel.explain.course import Course
from gradkeel.explain.explosion import Explosion
from gradkeel.explain.fading import Fading
from gradkeel.explain.findings import AutopsyResult
from gradkeel.explain.renewals import find_renewals
from gradkeel.explain.signs import EARLY, Signals, find_signs
from gradkeel.explain.verdict import Diagnosis, Verdict, judge
from gradkeel.explain.weights import LARGE, larger_updates
from gradkeel.language import readable, say

_NEAR = 3  # steps between an onset and the autopsy of it
_EARLY = (Verdict.DIVERGED_FROM_START, Verdict.DIVERGED_IN_WARMUP)
_DIVERGED = (*_EARLY, Verdict.DIVERGED, Verdict.CLIPPING_HIDES_DIVERGENCE, Verdict.STALLED)
_DOUBTED = 0.5  # the confidence that is left where a run began with unusual weights
_LAG, _LAGGING = 3.0, 3  # times, and at how many steps at least: after a single bad batch it is below 1


def diagnose(
    course: Course, events: list[Explosion], fading: Fading, autopsies: Sequence[AutopsyResult]
) -> Diagnosis:
    """The verdict on a recorded run; a module that an autopsy names is where it went wrong at that step."""
    steps, weights, updates = course.samples
    whole = torch.linalg.vector_norm(updates, dim=1) / torch.linalg.vector_norm(weights, dim=1)
    shares = [(s, r) for s, r in zip(steps.tolist(), whole.tolist(), strict=True) if r == r]
    matrices = {p.name for p in course.reader.parameters if len(p.shape) > 1}
    first = course.step(0)
    faded = [(f.parameter, f.since) for f in (*fading.dead, *fading.vanishing)]
    had_gradient = compress(
        course.reader.names, (course.reader.norms(first, first + 1) > 0).any(dim=0).tolist()
    )
    # One that gets no gradient any more is frozen on purpose, but not all of them.
    stopped = {one.parameter: one.since for one in fading.stopped}
    is_any_left = len(fading.frozen) < len(course.reader.names)
    unmoved = set(fading.frozen) - (stopped.keys() if is_any_left else set())
    faded += [(name, stopped.get(name, first)) for name in had_gradient if name in unmoved]
    faults = [event for event in events if event.kind != "rhythm"]
    rhythm = next((event for event in events if event.kind == "rhythm"), None)
    renewals = find_renewals(course)
    diagnosis = judge(
        Signals(
            steps=course.steps,
            losses=course.losses,
            totals=course.totals,
            coefficients=course.reader.coefficients(),
            rates=course.rates,
            nonfinite=course.nonfinite,
            skips=course.skip_reasons,
            larger=larger_updates(course, course.step(-1)),
            shares=shares,
            signs=find_signs(course, faults, rhythm, renewals),
            renewals=renewals,
            # A bias before a normalization has no gradient, by its nature: only weights are told of.
            hardly=[(name, since) for name, since in faded if name in matrices],
            weights=len(matrices),
        )
    )
    onset = diagnosis.onset
    if onset is None:
        return _doubted(course, diagnosis)
    # Where updates overwrite the weights from the start, later steps only suffer from it.
    last = onset if diagnosis.verdict in _EARLY else onset + _NEAR
    near = [one for one in autopsies if onset - _NEAR <= one.step <= last]
    if near:
        autopsy = min(near, key=lambda one: abs(one.step - onset))
        own = [name for name in course.reader.names if name.startswith(f"{autopsy.module}.")]
        where = tuple(own[:3]) if autopsy.module and own else diagnosis.where
        reasons = (*diagnosis.reasons, autopsy.words())
        diagnosis = dataclasses.replace(diagnosis, where=where, reasons=reasons, cause=autopsy.cause)
    return dataclasses.replace(diagnosis, cause=_cause(course, onset, diagnosis, events, shares, autopsies))


def _cause(
    course: Course,
    onset: int,
    diagnosis: Diagnosis,
    events: Sequence[Explosion],
    shares: Sequence[tuple[int, float]],
    autopsies: Sequence[AutopsyResult],
) -> str | None:
    """What did it: by experiment where there is one of this very step, else by what the record shows."""
    if diagnosis.cause not in (None, "state"):
        return diagnosis.cause
    if diagnosis.verdict is Verdict.LOSS_SCALE_OVERFLOW:
        return "loss_scale"
    if any(onset == event.step and event.altered for event in events):
        return "weights_changed"
    early = onset - course.step(0) < EARLY
    if early and (found := _unusual_weights(course)):
        return (
            "initialization" if diagnosis.verdict in _DIVERGED and set(found) & set(diagnosis.where) else None
        )
    rose = _rose(course, onset)
    large = any(share > LARGE for step, share in shares if step <= onset + EARLY)
    overwrote = large or any(event.overwritten for event in events)
    blamed = any(one.cause == "learning_rate" and one.step <= onset for one in autopsies)
    if (diagnosis.verdict in _DIVERGED and (rose or overwrote or blamed)) or (early and overwrote):
        return "learning_rate"
    return "second_moment_lag" if diagnosis.cause is None and _lagged(course, onset) else diagnosis.cause


def _lagged(course: Course, onset: int) -> bool:
    """Whether Adam's second moment was far behind the gradients at most of the steps after the onset that tell."""
    after = course.reader.scalar("second_moment_lag", onset + 1, onset + EARLY + 1)
    after = after[~after.isnan()]
    return len(after) >= _LAGGING and bool(after.median() > _LAG)


def _rose(course: Course, onset: int) -> bool:
    """Whether the learning rate was rising until then, or had doubled lately."""
    row = int(torch.searchsorted(course.steps, onset))
    recent = course.rates[max(0, row - EARLY) : row + 1]
    return bool(recent[-1:] > 1.2 * recent[:1])


def _doubted(course: Course, diagnosis: Diagnosis) -> Diagnosis:
    """A run in which nothing happened, but which began with weights that are no usual ones: it need not train well."""
    unusual = _unusual_weights(course) if course.step(0) == 1 else {}
    if not unusual:
        return diagnosis
    name = max(unusual, key=lambda one: unusual[one])
    words = say(
        "The first weights of {parameter} were {times} times as large as the largest usual initialization makes them.",
        parameter=name,
        times=readable(unusual[name]),
    )
    reasons, confidence = (*diagnosis.reasons, words), min(diagnosis.confidence, _DOUBTED)
    return dataclasses.replace(diagnosis, reasons=reasons, confidence=confidence)


def _unusual_weights(course: Course) -> dict[str, float]:
    """Matrices whose first entries are five times as large as the largest usual initialization makes them, or more.

    That is a variance of 2 / fan-in (He et al. 2015, Delving Deep into Rectifiers); tables of embeddings have
    entries of variance 1.
    """
    _, weights, _ = course.samples
    if not len(weights):
        return {}
    found = {}
    for parameter, size in zip(course.reader.parameters, weights[0].tolist(), strict=True):
        if len(parameter.shape) < 2:
            continue
        entry = size / math.sqrt(parameter.size)
        usual = math.sqrt(2 / math.prod(parameter.shape[1:]))
        if entry > 5 * usual and entry > 1.5:
            found[parameter.name] = entry / usual
    return found
