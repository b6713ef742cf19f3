"""What the samples of the weights show: changes that no update explains, and updates as large as the weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradkeel.explain.course import Course
from gradkeel.explain.events import NEGLIGIBLE, log_norms
from gradkeel.record import Reader
from gradkeel.record.sampling import EVERY

LEAST, LEAST_ESTIMATED = 1.5, 3.0
"""A change by less than this factor is passed over: where the update was measured, and where it is estimated."""
_PAST = 10  # samples whose largest update stands for the ones that were not measured
_SLACK = 3.0  # times that
_SPIKE = 10.0  # times its usual a gradient norm makes updates for which no others stand
LARGE, USUAL = 0.3, 0.1
"""An update of this share of the weights is no step any more; up to this one it may be."""
TIMES = 10.0
FEWEST = 8


@dataclass(frozen=True, slots=True)
class Jump:
    """A parameter's norm before and after a change that the optimizer did not make."""

    parameter: str
    step: int  # before whose update the new norm was first there; if not exact, where gradients and loss changed most
    after: int  # the last step at which the old norm was measured
    until: int  # the first at which the new one was
    before_norm: float
    after_norm: float
    is_exact: bool  # the norm was measured at the step before, so that the step is certain

    @property
    def ratio(self) -> float:
        """New norm over old norm."""
        return self.after_norm / self.before_norm if self.before_norm else math.inf


def find_jumps(course: Course) -> list[Jump]:
    """All such changes that the samples of the weights show, in order.

    A norm changes by no more than the norm of the update: ``| |w'| - |w| | <= |dw|``; up to three times the largest of
    the last ten measured updates are passed over too, for loops write as much on purpose: weight decay, averaging,
    Lookahead. Where the updates between two samples were not measured, each is taken as such a one, times the growth
    since of the learning rate and of a negligible gradient, and as any size where the gradient norm spiked or the
    parameter had no gradient before; and as that is only an estimate, a change of more than a quarter of all
    parameters at once is then put down to the optimizer.
    """
    steps, weights, updates = course.samples
    if len(steps) < 2:
        return []
    gaps = steps[1:] - steps[:-1]
    change = (weights[1:] - weights[:-1]).abs()
    estimated = (gaps != 1).unsqueeze(1) | updates[:-1].isnan()
    spikes = _growth(course, course.totals, lambda past: past.median(dim=1).values)
    growth = _growth(course, course.rates, lambda past: past.amin(dim=1))
    growth *= torch.where(spikes > _SPIKE, math.inf, 1.0)
    usual = _SLACK * _largest_lately(updates)[:-1]
    reach = torch.where(estimated, (gaps * growth).unsqueeze(1) * usual, usual) + 1e-5 * weights[:-1]
    larger, smaller = torch.maximum(weights[1:], weights[:-1]), torch.minimum(weights[1:], weights[:-1])
    least = torch.where(estimated, LEAST_ESTIMATED, LEAST)
    jumped = (change > reach) & (larger > least * smaller) & torch.isfinite(larger)
    together = jumped.sum(dim=1, keepdim=True) > max(1, len(course.reader.names) // 4)
    jumped &= ~(estimated & together)
    jumps = []
    for i, j in jumped.nonzero().tolist():
        if bool(estimated[i, j]) and not float(change[i, j]) > _own_growth(course, i, j) * float(reach[i, j]):
            continue
        exact = int(gaps[i]) == 1
        after, until = steps[i : i + 2].tolist()
        step = until if exact else _sharpest_change(course.reader, after, until)
        before, now = weights[i : i + 2, j].tolist()
        jumps.append(Jump(course.reader.names[j], step, after, until, before, now, exact))
    return jumps


def _growth(course: Course, values: Tensor, level: Callable[[Tensor], Tensor]) -> Tensor:
    """[s - 1] highest of a number a step from each sample up to the next, over its level shortly before it."""
    steps = course.samples[0]
    if not len(values) or bool(values.isnan().all()):
        return torch.ones(len(steps) - 1, dtype=torch.float64, device="cpu")
    rows = torch.searchsorted(course.steps, steps)
    padded = torch.cat([values[:1].expand(EVERY), values]).nan_to_num()
    before = level(padded.unfold(0, EVERY, 1)[rows[:-1]])
    parts = (values[first:last] for first, last in pairwise(rows.tolist()))
    now = torch.tensor(
        [float(part.nan_to_num().amax()) if len(part) else 0.0 for part in parts], device="cpu"
    )
    return torch.where(before > 0, (now / before).clamp(min=1.0), math.inf)


def _own_growth(course: Course, i: int, j: int) -> float:
    """How far a negligible gradient rose above its past between two samples; inf for any where there was none before.

    Adam makes about as large an update of any gradient, until that is small beside its epsilon; then it follows the
    gradient, and that of rounding noise may become many times as large.
    """
    after, until = course.samples[0][i : i + 2].tolist()
    row = int(torch.searchsorted(course.steps, after))
    past = course.reader.norms(course.step(max(0, row - EVERY + 1)), after + 1)[:, j].nanmedian()
    now = course.reader.norms(after, until)
    is_large = ~(now[:, j] < NEGLIGIBLE * torch.linalg.vector_norm(now, dim=1))
    highest = float(now[:, j].nan_to_num(nan=math.inf).amax())
    if not past > 0:
        return math.inf if highest > 0 else 1.0
    return 1.0 if bool(is_large.any()) else max(1.0, highest / float(past))


def _largest_lately(updates: Tensor) -> Tensor:
    """[s, n] largest of the last few measured updates up to each sample; NaN where there is none."""
    known = ~updates.isnan().all(dim=1)
    measured = updates[known]
    if not len(measured):
        return updates
    padded = torch.cat(
        [measured.new_full((_PAST - 1, measured.shape[1]), -math.inf), measured.nan_to_num(nan=-math.inf)]
    )
    largest = padded.unfold(0, _PAST, 1).amax(dim=2)
    index = known.cumsum(0) - 1
    result = largest[index.clamp(min=0)]
    return result.masked_fill((index < 0).unsqueeze(1) | (result == -math.inf), math.nan)


def _sharpest_change(reader: Reader, after: int, until: int) -> int:
    """The step in (after, until] that best splits log norms and log loss into a before and an after."""
    first, stop = after - 15, until + 16
    steps = reader.steps(first, stop)
    series = torch.cat([reader.norms(first, stop), reader.losses(first, stop).unsqueeze(1)], dim=1)
    logs = log_norms(series)
    logs = logs[:, ~logs.isnan().any(dim=0)]
    candidates = [i for i in range(1, len(steps)) if after < int(steps[i]) <= until]
    if not logs.shape[1] or not candidates:
        return until
    return int(steps[max(candidates, key=lambda i: _gain(logs, i))])


def _gain(logs: Tensor, i: int) -> float:
    """How much of the variance a split before row ``i`` explains, summed over standardized series."""
    scaled = (logs - logs.mean(dim=0)) / logs.std(dim=0).clamp(min=1e-12)
    rest = sum(((part - part.mean(dim=0)) ** 2).sum() for part in (scaled[:i], scaled[i:]))
    return -float(rest)


@dataclass(frozen=True, slots=True)
class Overwrite:
    """An update as large as the weights, after updates had been small."""

    step: int
    last_step: int  # the last measured one of its kind
    ratio: float  # norm of the whole update over that of all weights
    before: float  # the usual such ratio before
    parameters: tuple[
        tuple[str, float], ...
    ]  # updated by more than their weights, by how much; largest first
    lasts: bool  # updates were still so large when last measured


def find_overwrites(course: Course) -> list[Overwrite]:
    """All of them, in order."""
    names, (steps, weights, updates) = course.reader.names, course.samples
    measured = ~updates.isnan().all(dim=1) & torch.isfinite(weights).all(dim=1)
    steps, weights, updates = steps[measured], weights[measured], updates[measured]
    whole = torch.linalg.vector_norm(updates.nan_to_num(nan=math.inf), dim=1)
    ratios = whole / torch.linalg.vector_norm(weights, dim=1)
    found: list[Overwrite] = []
    row = FEWEST
    while row < len(ratios):
        before = float(ratios[:row].median())
        if not (float(ratios[row]) > max(LARGE, TIMES * before) and before < USUAL):
            row += 1
            continue
        small = (ratios[row:] < USUAL).nonzero()
        stop = row + int(small[0]) if len(small) else len(ratios)
        own = updates[row] / weights[row]
        larger = [(float(own[j]), names[j]) for j in range(len(names)) if weights[row, j] > 0 and own[j] > 1]
        found.append(
            Overwrite(
                step=int(steps[row]),
                last_step=int(steps[stop - 1]),
                ratio=float(ratios[row]),
                before=before,
                parameters=tuple((name, ratio) for ratio, name in sorted(larger, reverse=True)),
                lasts=stop == len(ratios),
            )
        )
        row = stop
    return found


def larger_updates(course: Course, last_step: int) -> list[tuple[str, int, float]]:
    """Parameter, step and ratio of each first update larger than the weights it changed, ``|dw| / |w| > 1``.

    In order of the steps, and of the ratio within one; a parameter whose weights are all zero has no ratio.
    """
    steps, weights, updates = course.samples
    known = (weights > 0) & ~updates.isnan()
    # A weight that became NaN has no finite norm, and is larger than anything.
    ratios = torch.where(weights > 0, (updates / weights).nan_to_num(nan=math.inf), 0.0)
    larger = (ratios > 1) & (steps <= last_step).unsqueeze(1) & (known | ~torch.isfinite(weights))
    found = []
    for j in larger.any(dim=0).nonzero().flatten().tolist():
        row = int(larger[:, j].int().argmax())
        found.append((course.reader.names[j], int(steps[row]), float(ratios[row, j])))
    return sorted(found, key=lambda item: (item[1], -item[2]))
