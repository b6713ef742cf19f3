"""From a record to what a verdict is made from."""

import dataclasses
from collections.abc import Sequence

import torch

from gradkeel.explain.autopsy import AutopsyResult
from gradkeel.explain.course import Course
from gradkeel.explain.explosion import Explosion, larger_updates
from gradkeel.explain.fading import Fading
from gradkeel.explain.verdict import Diagnosis, Sign, Signals, judge

_NEAR = 3  # steps between an onset and the autopsy of it


def diagnose(
    course: Course, events: list[Explosion], fading: Fading, autopsies: Sequence[AutopsyResult] = ()
) -> Diagnosis:
    """The verdict on a recorded run.

    Args:
        course: of the run.
        events: its explosions.
        fading: what hardly learns.
        autopsies: what experiments showed; a module that they name is where the run went wrong at that step.
    """
    steps, weights, updates = course.samples
    whole = torch.linalg.vector_norm(updates, dim=1) / torch.linalg.vector_norm(weights, dim=1)
    shares = [(s, r) for s, r in zip(steps.tolist(), whole.tolist(), strict=True) if r == r]
    matrices = {p.name for p in course.reader.parameters if len(p.shape) > 1}
    # A bias before a normalization has no gradient, by its nature: only weights are told of.
    faded = [(f.parameter, f.since) for f in (*fading.dead, *fading.vanishing) if f.parameter in matrices]
    faded += [
        (name, course.step(0)) for name in fading.frozen if name in matrices and _had_gradient(course, name)
    ]
    diagnosis = judge(
        Signals(
            steps=course.steps,
            losses=course.losses,
            totals=course.totals,
            coefficients=course.reader.coefficients(),
            rates=course.rates,
            nonfinite=course.nonfinite,
            skips=course.skip_reasons,
            larger=larger_updates(course, course.step(len(course.steps) - 1)),
            shares=shares,
            signs=[_sign(course, event) for event in events],
            hardly=faded,
        )
    )
    for autopsy in autopsies:
        if diagnosis.onset is not None and abs(autopsy.step - diagnosis.onset) <= _NEAR:
            own = [name for name in course.reader.names if name.startswith(f"{autopsy.module}.")]
            where = tuple(own[:3]) if autopsy.module and own else diagnosis.where
            return dataclasses.replace(diagnosis, where=where, reasons=(*diagnosis.reasons, autopsy.words()))
    return diagnosis


def _sign(course: Course, event: Explosion) -> Sign:
    assert event.step is not None
    first = [reached.parameter for reached in event.spread]
    at_once = len(first) == len(course.reader.names) > 1 and all(r.growth is None for r in event.spread)
    where = () if at_once else (*event.altered, *(name for name in first if name not in event.altered))
    return Sign(str(event.kind), event.step, where[:3], event.ended == "recovered")


def _had_gradient(course: Course, name: str) -> bool:
    column = course.reader.names.index(name)
    return bool(course.reader.norms(course.step(0), course.step(0) + 1)[0, column] > 0)
