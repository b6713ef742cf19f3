"""Parameters that hardly learn: vanishing, dead and frozen ones."""

import math
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from gradkeel.explain.course import Course
from gradkeel.explain.presence import last_gradients
from gradkeel.record import Reader, bucket_norms

SHARE = 1e-3
"""A gradient counts as vanishing below this share of the median parameter's."""
_STRETCHES, _FEWEST = 64, 16


@dataclass(frozen=True, slots=True)
class Faded:
    """A parameter that hardly learns, at the end of the record.

    Attributes:
        parameter: its name.
        since: about the step from which on it has been so.
        share: median norm of its gradient over that of the median parameter, in the last quarter; 0 for a dead one.
    """

    parameter: str
    since: int
    share: float


@dataclass(frozen=True, slots=True)
class Fading:
    """All of them.

    Attributes:
        vanishing: gradients below a thousandth of the median parameter's, in the last quarter of the run.
        dead: gradients that were exactly zero throughout the last quarter.
        frozen: parameters that got no gradient at all in the last quarter, or none of whose measured updates moved
            them.
        stopped: the frozen ones that had gradients until they were frozen in mid-run, with the step since when.
    """

    vanishing: tuple[Faded, ...] = ()
    dead: tuple[Faded, ...] = ()
    frozen: tuple[str, ...] = ()
    stopped: tuple[Faded, ...] = ()


def find_fading(course: Course) -> Fading:
    """Which parameters hardly learn."""
    reader = course.reader
    buckets = bucket_norms(reader, _STRETCHES)
    if len(buckets.first) < _FEWEST:
        return Fading()  # too short a run to speak of its last quarter
    late = len(buckets.first) * 3 // 4
    without = _without_gradient(reader, int(buckets.first[late]))
    frozen = without | _unmoved(course)
    zero = buckets.high == 0
    dead = zero[late:].all(dim=0) & ~frozen
    learning = ~(dead | frozen)
    middle = torch.where(learning, buckets.median, math.nan).nanmedian(dim=1, keepdim=True).values
    shares = buckets.median / middle
    low = shares < SHARE
    vanishing = low[late:].all(dim=0) & learning
    share = shares[late:].nanmedian(dim=0).values
    return Fading(
        vanishing=_faded(reader, buckets.first, low, vanishing, share),
        dead=_faded(reader, buckets.first, zero, dead, torch.zeros_like(share)),
        frozen=tuple(compress(reader.names, frozen.tolist())),
        stopped=_stopped(course, without),
    )


def _faded(reader: Reader, first: Tensor, state: Tensor, chosen: Tensor, share: Tensor) -> tuple[Faded, ...]:
    result = []
    for j in chosen.nonzero().flatten().tolist():
        lively = (~state[:, j]).nonzero()
        since = int(lively[-1]) + 1 if len(lively) else 0
        result.append(Faded(reader.names[j], int(first[since]), float(share[j])))
    return tuple(result)


def _stopped(course: Course, without: Tensor) -> tuple[Faded, ...]:
    """Those without a gradient at the end that had one."""
    if not bool(without.any()):
        return ()
    last = last_gradients(course.reader).masked_fill(~without, -1)
    chosen = (last >= 0).nonzero().flatten().tolist()
    return tuple(Faded(course.reader.names[j], course.step(int(last[j]) + 1), 0.0) for j in chosen)


def _without_gradient(reader: Reader, since: int) -> Tensor:
    """[n] bool: no gradient at all from step ``since`` on."""
    result = torch.ones(len(reader.names), dtype=torch.bool, device="cpu")
    first, last = reader.store.row_range(since, None)
    for _, present in reader.store.pieces("present", first, last):
        result &= ~present.bool().any(dim=0)
        if not bool(result.any()):
            break
    return result


def _unmoved(course: Course) -> Tensor:
    """[n] bool: several updates were measured at steps that were made, and all were zero."""
    steps, _, updates = course.samples
    made = torch.tensor([step not in course.skips for step in steps.tolist()], dtype=torch.bool, device="cpu")
    measured = ~updates.isnan() & made.unsqueeze(1)
    return (measured.sum(dim=0) >= 3) & ~((updates != 0) & measured).any(dim=0)
