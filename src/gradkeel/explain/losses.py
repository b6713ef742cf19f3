"""What the loss did over a whole run, and where it leaves its own past: in a record, and during training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from gradkeel.guard.report import SkipReason

Number = TypeVar("Number", float, Tensor)
PAST = 32
FEWEST = PAST // 2
_ROSE, _LOST = 3.0, 0.3
_HOP = 8  # steps after which the past is looked at anew
_CALM, _ONE_EVENT = 5, 20
TAIL = 10
_IDLE = (SkipReason.NO_GRADIENT, SkipReason.EMPTY_WINDOW)
FLAT = 0.02  # of the first loss
_NOISE = 4.0  # times the usual change from step to step
_SIGNIFICANT = 5.0  # standard errors between two levels of the loss
_WANDERED = 0.2  # of the first loss
_WORSE = 0.15  # of what training had gained: so much more after an event is not recovered
_RESTLESS = 2  # times that it had jumped up like that before
_SIGNED = 0.1  # of the losses: so many are positive, and so many negative
_NOTHING, _LITTLE = 1e-4, 1e-2  # of the later losses: the first one, and the first three
_RETURNED = 0.3  # of what training had gained: more than this lost again is not recovered


def loss_rises(usual: Number, highest: Number, first: float) -> tuple[Number, Number, Number]:
    """A loss is an alarm that is above ``usual`` by more than each of these: by far the highest, and much is lost.

    ``usual`` and ``highest`` are the median and maximum of the last losses, ``first`` is the run's first one.
    """
    return _ROSE * (highest - usual), abs(usual), _LOST * (first - usual)


def find_losses(losses: Tensor) -> list[tuple[int, bool]]:
    """Rows at which the losses [k] left their past, NaN where not known, and whether they came back; in order."""
    known = losses[torch.isfinite(losses)]
    if len(known) <= FEWEST:
        return []
    before = torch.cat([losses.new_full((PAST,), torch.nan), losses]).unfold(0, PAST, _HOP)
    before = torch.where(torch.isfinite(before), before, torch.nan)
    enough = (~before.isnan()).sum(dim=1) >= FEWEST
    highest = before.nan_to_num(nan=-torch.inf).amax(dim=1)
    usual = before.nanmedian(dim=1).values
    limits = usual + torch.stack(loss_rises(usual, highest, float(known[0]))).amax(dim=0)
    limits = torch.where(enough, limits, torch.inf).repeat_interleave(_HOP)[: len(losses)]
    rows = (losses > limits).nonzero().flatten().tolist()
    starts = rows[:1] + [b for a, b in pairwise(rows) if b - a > _ONE_EVENT]
    return [(row, _is_over(losses[row + 1 :], float(limits[row]))) for row in starts]


def _is_over(later: Tensor, limit: float) -> bool:
    """Whether it stayed below for a few steps."""
    calm = later[torch.isfinite(later)] <= limit
    return len(calm) >= _CALM and bool(calm.unfold(0, _CALM, 1).all(dim=1).any())


@dataclass(frozen=True, slots=True)
class LossCourse:
    """What the loss of a run did: its levels at the beginning, at its best and at the end, and how it got there."""

    begin: float  # the first one, untouched by training
    first: float
    best: float
    last: float
    highest: float  # level
    noise: float  # its usual change from step to step
    error: float  # up to here two levels differ by noise
    left: int | None  # the step from which on it was above its best for good
    is_finite: bool  # at the end
    is_sudden: bool = True  # it left at once
    is_restless: bool = False  # it had jumped up as it did then before
    is_surrogate: bool = False  # only its gradient means something

    @property
    def is_clearly_above(self) -> bool:
        """Whether it ended above where it began, by more than noise."""
        return not self.is_finite or self.last > self.first + max(self.noise / 2, FLAT * abs(self.first))

    @property
    def is_lost(self) -> bool:
        """Whether it ended far above its best."""
        lost = self.last - self.best
        return not self.is_finite or (
            lost > max(self.error, FLAT * abs(self.first))
            and lost > _RETURNED * max(self.first - self.best, 0)
        )

    @property
    def is_back(self) -> bool:
        """Whether it ended at most a little above where it began."""
        return self.last - self.first <= _RETURNED * (self.first - self.best)

    @property
    def has_fallen(self) -> bool:
        """Whether it ever was below its beginning, if only by a little."""
        return self.best < self.first - FLAT * abs(self.first)

    @property
    def has_wandered(self) -> bool:
        """Whether it was far above its beginning, by more than noise."""
        return self.highest > self.first + max(_NOISE * self.noise, _WANDERED * abs(self.first))

    @property
    def has_learned(self) -> bool:
        """Whether it ended below where it began, by more than noise."""
        return self.is_finite and self.last < self.begin - max(2 * self.noise, 2 * FLAT * abs(self.begin))

    @property
    def had_learned(self) -> bool:
        """Whether it ever was below where it began, by more than noise."""
        return self.best < self.first - max(self.error, 2 * FLAT * abs(self.first))

    def is_worse_since(self, losses: Tensor, row: int) -> bool:
        """Whether it ended higher than shortly before a row of the losses [k], by more than noise."""
        past = losses[:row]
        past = past[torch.isfinite(past)][-2 * TAIL :]
        before = float(past.median()) if len(past) else math.inf
        return self.last - before > max(self.error, _WORSE * (self.first - before), FLAT * abs(self.first))


def had_loss(steps: Tensor, losses: Tensor, reasons: Mapping[int, SkipReason]) -> Tensor:
    """[k] bool: steps whose missing loss tells something; one that nothing was computed for has none to be missed."""
    had = torch.ones(len(losses), dtype=torch.bool, device="cpu")
    idle = [step for step, reason in reasons.items() if reason in _IDLE]
    return had if not idle else ~(torch.isin(steps, torch.tensor(idle, device="cpu")) & losses.isnan())


def not_finite(losses: Tensor) -> Tensor:
    """[k] bool: losses that were logged and not finite; where most steps have one, a NaN is a loss too."""
    known = ~losses.isnan()
    before = known.double().cumsum(0) - known.double()
    count = torch.arange(len(losses), dtype=torch.float64, device="cpu")
    return losses.isinf() | (~known & (before >= 0.9 * count) & (count >= 4))


def loss_course(all_steps: Tensor, losses: Tensor) -> LossCourse | None:
    """What the losses [k] of these steps [k] did; None for fewer than two."""
    known = torch.isfinite(losses)
    if int(known.sum()) < 2:
        return None
    bad = not_finite(losses)
    values, steps = losses[known], all_steps[known]
    # The lowest of very many short stretches would be low by chance alone.
    width = min(max(TAIL, len(values) // 100), max(1, len(values) // 4))
    hop = max(1, width // TAIL)
    # One batch may be odd, and so may the steps after it.
    first = min(float(values[0]), float(values[:3].median()))
    levels = values.unfold(0, width, hop).median(dim=1).values
    best = int(levels.argmin())
    tail = width if len(values) < 3 * TAIL else max(TAIL, len(values) // 10)
    last = float(values[-tail:].median())
    # After the last that was not finite one is known again; NaN that follow count as not logged once they are many.
    is_finite = not bool(bad.any()) or bool(known[int(bad.nonzero()[-1]) :].any())
    lowest, highest, best = float(levels[best]), float(levels.max()), best * hop
    # What is usual is what was so until the best: a sick run must not hide itself.
    changes = values[: max(best + width, 2 * TAIL)].diff().abs()
    noise = float(changes.median()) if len(changes) else 0.0
    # Standard error of a median of so many, from the usual change between two values.
    error = _SIGNIFICANT * 1.3 * noise / math.sqrt(width) if len(values) >= 3 * TAIL else _NOISE * noise
    surrogate = _is_surrogate(values, max(abs(highest), abs(last)))
    left = _left(values, best, lowest, last) if last - lowest > error else None
    if left is None:
        onset = None if is_finite else int(all_steps[bad][0])
        return LossCourse(
            float(values[0]),
            first,
            lowest,
            last,
            highest,
            noise,
            error,
            onset,
            is_finite,
            is_surrogate=surrogate,
        )
    before, after = values[max(0, left - TAIL) : left], values[left : left + TAIL]
    jump = float(after.median() - before.median()) if len(before) else math.inf
    size = 0.5 * (last - lowest)
    course = LossCourse(
        float(values[0]), first, lowest, last, highest, noise, error, int(steps[left]), is_finite, jump > size
    )
    # Standard error of the difference of two such medians: among so many stretches, some differ by a few by chance.
    is_clear = size > _SIGNIFICANT * 1.3 * math.sqrt(2) * noise / math.sqrt(TAIL)
    is_restless = is_clear and _jumps(values[:left], size) >= _RESTLESS
    return replace(course, is_restless=is_restless, is_surrogate=surrogate)


def _is_surrogate(values: Tensor, size: float) -> bool:
    """Whether only the loss's gradient means something: it is around 0 all along, or begins at 0, of this later size.

    So is that of a policy gradient, and its penalty for leaving the first policy. A density's loss may fall through 0,
    but has one sign at first; and a loss that is 0 because all is learned has no gradient there, which the verdict
    looks at.
    """
    halves = values.tensor_split(2)
    both = [min(int((half > 0).sum()), int((half < 0).sum())) >= _SIGNED * len(half) for half in halves]
    first, level = abs(float(values[0])), abs(float(values[:3].median()))
    at_zero = first < _NOTHING * size and level < _LITTLE * size
    return len(values) >= 2 * TAIL and (all(both) or at_zero)


def _jumps(values: Tensor, size: float) -> int:
    """How often the loss jumped up by more than this, from one stretch to the next."""
    if len(values) < 2 * TAIL:
        return 0
    levels = values.unfold(0, TAIL, 1).median(dim=1).values
    rows = (levels[TAIL:] - levels[:-TAIL] > size).nonzero().flatten()
    return int((rows.diff() > TAIL).sum()) + min(1, len(rows))


def _left(values: Tensor, best: int, lowest: float, last: float) -> int:
    """The row after the best stretch from which on the loss is above it, in by far the most rows to the end.

    Single batches that happen to fit do not bring a loss back, and a few bad ones before are not its leaving.
    """
    above = values[best:] > lowest + 0.4 * (last - lowest)
    since = (
        (2 * above.long() - 1).flip(0).cumsum(0).flip(0)
    )  # how many more are above than not, from here to the end
    return best + int(since.argmax())


def level(values: Tensor) -> float:
    """The median of the finite ones; NaN without any."""
    finite = values[torch.isfinite(values)]
    return float(finite.median()) if len(finite) else math.nan
