"""What the norms, the weights and the loss of a run showed, in order: what its verdict rests on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from gradkeel.explain.course import Course
from gradkeel.explain.events import CALM_ROWS, ONE_EVENT
from gradkeel.explain.explosion import Explosion
from gradkeel.explain.losses import find_losses
from gradkeel.guard import SkipReason

EARLY = 20
"""Steps within which a run diverges from its start."""
_OFTEN, _SIMILAR, _PART = 8, 4.0, 4
"""What comes so often, is no more than so many times as high as the highest of the others, and goes on for a quarter of
a run, is how the run goes."""
_SOON, _NEAR = 3, 5  # steps
_BEFORE, _NOISE = 8, 4.0  # rows that show the loss as it was, and times its usual change that a jump is


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that the norms or the weights showed: where it began, in which parameters, and how it ended.

    ``recurs`` is whether the run showed the like again and again, ``renews`` whether the loss rose by itself.
    """

    kind: str
    step: int
    where: tuple[str, ...]
    is_over: bool
    recurs: bool = False
    renews: bool = False

    @property
    def lasts(self) -> bool:
        """Whether it began at its step and is not over; a drift has no such beginning."""
        return not self.is_over and self.kind != "drift"


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """What a verdict is made from; tensors are [k], one number a step, and NaN where it is not known."""

    steps: Tensor
    losses: Tensor
    totals: Tensor  # gradient norms
    coefficients: Tensor  # what clipping multiplied by
    rates: Tensor
    nonfinite: Tensor  # bool: steps with a gradient that was not finite
    skips: Mapping[int, SkipReason]  # by the steps' numbers
    larger: Sequence[tuple[str, int, float]] = ()  # first updates larger than weights: parameter, step, ratio
    shares: Sequence[tuple[int, float]] = ()  # step, and the whole update's norm over that of all weights
    signs: Sequence[Sign] = ()  # in order
    renewals: Sequence[int] = ()  # steps at which the loss rose by itself, and was learned away
    hardly: Sequence[tuple[str, int]] = ()  # weights that hardly learn, with the step since when
    weights: int = 0  # how many there are, biases left out

    def warmup_end(self) -> int | None:
        """How many steps the learning rate rose from the beginning; None where it did not."""
        rates = self.rates
        if len(rates) < 3 or not bool(rates.isfinite().all()):
            return None
        top = int(rates.argmax())
        rose = rates[top] > 2 * rates[0] and rates[(top + 1) // 2] > rates[0]  # and not only at the end
        return top + 1 if rose else None


def find_signs(
    course: Course, events: Sequence[Explosion], rhythm: Explosion | None, renewals: Sequence[int]
) -> list[Sign]:
    """All signs of a run, from its events, its rhythm and its renewals, in order."""
    altered = {event.step for event in events if event.altered or event.overwritten}
    found = [*(_sign(course, event) for event in events), *_of_losses(course, events, rhythm)]
    signs = sorted(found, key=attrgetter("step"))
    recurring = set(_recurring(course, [sign for sign in signs if sign.step not in altered]))
    return [
        replace(
            sign,
            recurs=sign in recurring,
            renews=sign.kind in ("loss", "spike", "explosion")
            and sign.step not in altered
            and any(abs(sign.step - step) <= _NEAR for step in renewals),
        )
        for sign in signs
    ]


def _recurring(course: Course, signs: Sequence[Sign]) -> list[Sign]:
    """Spikes and jumps of the loss that are over, for a good part of the run, and none of them by far the highest.

    Where the loss mostly jumps in the very step in which the gradient does, it is no update that makes them jump.
    """
    rows = torch.searchsorted(
        course.steps, torch.tensor([sign.step for sign in signs], device="cpu")
    ).tolist()
    found = [
        (sign, row)
        for sign, row in zip(signs, rows, strict=True)
        if sign.is_over
        and sign.kind in ("spike", "loss")
        and not bool(course.nonfinite[row : row + ONE_EVENT].any())
    ]
    if len(found) < _OFTEN:
        return []
    noise = float(course.losses.diff().abs().nanmedian())
    with_loss = [sign.kind == "loss" or _jumps_with_loss(course.losses, row, noise) for sign, row in found]
    measured = _measured(course, [sign.step for sign, _ in found if sign.kind == "spike"])
    if 2 * sum(with_loss) < len(found) or 2 * sum(measured) < len(measured):
        return []
    rows = [row for _, row in found]
    if course.totals[-ONE_EVENT:].nanmedian() > _peaks(course.totals, rows).median():
        return []  # what follows the last event that was looked for is one
    is_usual, last = torch.ones(len(rows), dtype=torch.bool, device="cpu"), 0
    for values in (course.totals, course.losses):
        above = values - values[torch.isfinite(values)].median()
        spread = float(above[torch.isfinite(above)].abs().median())
        heights = _peaks(above, rows).clamp(min=spread)
        second, highest = heights.sort().values[-2:]
        is_usual &= (heights < highest) | (highest <= _SIMILAR * second)
        # Later ones, which have become the past of each other, are no signs any more.
        last = max(last, int((above >= heights.median() / 2).nonzero()[-1:].sum()))
    if last - rows[0] < len(course.steps) / _PART:
        return []
    return [sign for (sign, _), own in zip(found, is_usual.tolist(), strict=True) if own]


def _measured(course: Course, steps: Sequence[int]) -> list[bool]:
    """Of each of these steps, whether its update was measured, or one right after it: some would be large."""
    sampled, _, updates = course.samples
    known = sampled[~updates.isnan().all(dim=1)]
    after = torch.searchsorted(known, torch.tensor(steps, device="cpu")).tolist()
    return [
        place < len(known) and int(known[place]) < step + _SOON
        for place, step in zip(after, steps, strict=True)
    ]


def _jumps_with_loss(losses: Tensor, row: int, noise: float) -> bool:
    """Whether the loss is high in a row, and not only after it."""
    before = losses[max(0, row - _BEFORE) : row].nanmedian() if row else losses[row]
    rise = float(losses[row] - before)
    return rise > _NOISE * noise and 2 * rise > float(_peaks(losses, [row]) - before)


def _peaks(values: Tensor, rows: Sequence[int]) -> Tensor:
    """[k] the highest value from each of these rows on, within one event."""
    finite = torch.where(torch.isfinite(values), values, -torch.inf)
    return torch.stack([finite[row : row + ONE_EVENT].amax() for row in rows])


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
