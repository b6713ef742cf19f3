"""A range of bounds: ``global-norm:0.01..100`` as policies, and which of them work."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gradkeel.compare.run import Run, tail_median
from gradkeel.errors import PolicySpecError
from gradkeel.language import say

TIGHT, WORKS, LOOSE = say("too tight"), say("works"), say("too loose")


@dataclass(frozen=True)
class Sweep:
    """The policies of a sweep."""

    name: str  # the policy without its bound, such as global-norm
    bounds: tuple[float, ...]  # in ascending order, evenly spaced on a logarithmic scale
    policies: tuple[str, ...]  # one spec string a bound


@dataclass(frozen=True)
class SweepPoint:
    """What one bound came to at one learning rate."""

    policy: str
    bound: float
    lr: float | None
    final_loss: float  # median over seeds; inf for runs whose loss did not stay finite
    lowest: float
    highest: float
    diverged: int  # so many of the runs
    runs: int
    region: str  # "too tight", "works" or "too loose"


def parse_sweep(text: str) -> Sweep:
    """Read ``POLICY:LOW..HIGH[,KEY=VALUE...]``: half a decade between bounds, and at least five of them.

    Raises:
        PolicySpecError: the text is no such range.
    """
    name, _, rest = text.strip().partition(":")
    span, comma, options = rest.partition(",")
    low, dots, high = span.partition("..")
    try:
        first, last = float(low), float(high)
    except ValueError:
        first = last = math.nan
    if not (name and dots and 0 < first < last < math.inf):
        raise PolicySpecError(
            f"sweep {text!r}: it must be a policy and two bounds above 0, the lower one first, "
            "as in global-norm:0.01..100"
        )
    count = max(5, round(2 * math.log10(last / first)) + 1)
    bounds = [first * (last / first) ** (i / (count - 1)) for i in range(count)]
    labels = [f"{float(f'{bound:.3g}'):g}" for bound in bounds]
    return Sweep(
        name, tuple(map(float, labels)), tuple(f"{name}:{label}{comma}{options}" for label in labels)
    )


def sweep_points(sweep: Sweep, runs: Sequence[Run]) -> list[SweepPoint]:
    """Each bound at each learning rate, and its region; nothing is assumed about the order of regions.

    A bound *works* where fewer than half of its runs diverged and the median loss came down at least half as far as
    under the best bound. It is *too tight* where it fails without making the loss worse while more than half of the
    steps were clipped, else *too loose*.
    """
    points = []
    for lr in dict.fromkeys(run.lr for run in runs):
        groups = [
            (bound, [run for run in runs if (run.policy, run.lr) == (policy, lr)])
            for policy, bound in dict.fromkeys(zip(sweep.policies, sweep.bounds, strict=True))
        ]
        best = min((_end(group) for _, group in groups if group), default=math.inf)
        points += [_point(bound, group, best) for bound, group in groups if group]
    return points


def _point(bound: float, group: Sequence[Run], best: float) -> SweepPoint:
    finals = [run.final_loss if math.isfinite(run.final_loss) else math.inf for run in group]
    return SweepPoint(
        policy=group[0].policy,
        bound=bound,
        lr=group[0].lr,
        final_loss=statistics.median(finals),
        lowest=min(finals),
        highest=max(finals),
        diverged=sum(run.diverged for run in group),
        runs=len(group),
        region=_region(group, best),
    )


def _region(group: Sequence[Run], best: float) -> str:
    start = statistics.median(_start_of(run) for run in group)
    end = _end(group)
    if 2 * sum(run.diverged for run in group) < len(group) and start - end >= (start - best) / 2:
        return WORKS
    mostly_clipped = statistics.median(run.clip_rate for run in group) > 0.5
    return TIGHT if end <= start and mostly_clipped else LOOSE


def _start_of(run: Run) -> float:
    start = run.initial_validation_loss
    return tail_median(run.losses[:10]) if start is None else start


def _end(group: Sequence[Run]) -> float:
    ends = [run.final_loss if run.validation_loss is None else run.validation_loss for run in group]
    return statistics.median(end if math.isfinite(end) else math.inf for end in ends)
