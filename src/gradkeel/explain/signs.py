"""What the norms, the weights and the loss of a run showed, in order: what its verdict rests on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from gradkeel.explain.course import Course
from gradkeel.explain.events import CALM_ROWS
from gradkeel.explain.explosion import Explosion
from gradkeel.explain.losses import find_losses

EARLY = 20
"""Steps within which a run diverges from its start."""
_step = attrgetter("step")


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that the norms or the weights showed: where it began, in which parameters, and how it ended."""

    kind: str
    step: int
    where: tuple[str, ...]
    is_over: bool

    @property
    def lasts(self) -> bool:
        """Whether it began at its step and is not over; a drift has no such beginning."""
        return not self.is_over and self.kind != "drift"


def find_signs(course: Course, events: Sequence[Explosion], rhythm: Explosion | None) -> list[Sign]:
    """All signs of a run, from its events and its rhythm."""
    return sorted([*map(partial(_sign, course), events), *_of_losses(course, events, rhythm)], key=_step)


def _sign(course: Course, event: Explosion) -> Sign:
    assert event.step is not None
    first = [reached.parameter for reached in event.spread]
    at_once = len(first) == len(course.reader.names) > 1 and all(r.growth is None for r in event.spread)
    where = () if at_once else (*event.altered, *(name for name in first if name not in event.altered))
    return Sign(str(event.kind), event.step, where[:3], event.ended == "recovered")


def _of_losses(course: Course, events: Sequence[Explosion], rhythm: Explosion | None) -> Iterator[Sign]:
    """Where the loss left its own past, and the gradients did not, or not as they do again and again."""
    for row, is_over in find_losses(course.losses):
        step = course.step(row)
        beats = rhythm and rhythm.period and (step - (rhythm.step or 0)) % rhythm.period == 0
        if beats and (is_over or row + CALM_ROWS >= len(course.steps)):
            continue
        if not any(-EARLY < (one.step or 0) - step < EARLY for one in events):
            yield Sign("loss", step, (), is_over)
