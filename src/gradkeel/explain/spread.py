"""Which parameters an explosion reached, in which order."""

import math
from dataclasses import dataclass

import torch

from gradkeel.explain.course import Course
from gradkeel.explain.events import RECENT, Event, level_and_spread, log_norms

_FUTURE = 256  # rows of an event in which parameters are looked for
_DEVIATIONS, _RATIO = 3.5, 2.0  # a parameter counts as reached so far above its own past


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
    them; then those that grew most.
    """
    begin = max(0, event.start - RECENT)
    norms = course.reader.store.series("norms", begin, min(event.stop, event.start + _FUTURE))
    now = norms[event.start - begin :]
    past = norms[: event.start - begin] if event.start else norms[:1]
    logs = log_norms(now)
    level, deviation = level_and_spread(log_norms(past).T)
    bad = ~torch.isfinite(now)
    reached = bad | ((logs > level + _DEVIATIONS * deviation) & (logs > level + math.log10(_RATIO)))
    found = []
    for j in reached.any(dim=0).nonzero().flatten().tolist():
        row = int(reached[:, j].int().argmax())
        growth = float(10 ** (logs[row, j] - level[j]))
        order = (row, 0, -j) if bool(bad[row, j]) else (row, 1, -growth)
        step, name = course.step(event.start + row), course.reader.names[j]
        found.append((order, Reached(name, step, growth if math.isfinite(growth) else None)))
    return [reached for _, reached in sorted(found, key=lambda item: item[0])]
