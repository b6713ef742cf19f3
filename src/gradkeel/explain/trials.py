"""A bad step again and again, with one thing changed each time, on all ranks together."""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradkeel.explain.findings import AutopsyResult, Cause, Experiment
from gradkeel.explain.inspection import Inspection, in_float32, samples_of, take
from gradkeel.explain.undisturbed import Restore
from gradkeel.guard import Guard, StepReport
from gradkeel.tensors import is_distributed

_MOST_LEFT_OUT = 16


@dataclass(frozen=True, slots=True)
class Micro:
    """A batch of a step, how to put back the random states before its pass, and its weight in a window."""

    batch: Any
    replay: Restore
    weight: Tensor | float = 1.0


class _EndedError(Exception):
    """No further pass is allowed, or one has failed."""


@dataclass(slots=True, eq=False)
class Trials:
    """Runs a step again and again, on all ranks together, and notes what came out."""

    guard: Guard
    loss: Callable[[Any], Tensor]
    restart: Restore
    step: Sequence[Micro]  # the batches of this rank
    limits: tuple[float, float]  # above which a norm and a loss are bad
    budget: int  # passes that are left
    done: list[Experiment] = field(default_factory=list)

    def run(
        self,
        change: str,
        step: Sequence[Micro],
        context: contextlib.AbstractContextManager[Any] | None = None,
    ) -> bool:
        """Whether the fault is there with this changed; all ranks must ask with equally many batches."""
        if self.budget < 1:
            raise _EndedError
        self.budget -= 1
        self.restart()
        for parameter in self.guard.parameters:
            parameter.grad = None
        losses: list[Tensor] = []
        with context or contextlib.nullcontext():
            for micro in step:
                micro.replay()
                losses.append(self._try(change, partial(self._loss_of, micro)))
                self._try(change, losses[-1].backward)
        window, weight = self.guard.window, float(sum(micro.weight for micro in step))
        weights = self.told(weight)
        loss = sum(self.told(sum(float(one.detach()) for one in losses)))
        norm = self._norm()
        if window is None:
            loss /= len(weights)
        else:
            norm *= window.mean_of(weight if window.ranks is None else sum(weights))
            loss /= sum(weights) or 1.0
        norm = max(self.told(norm), key=lambda one: math.inf if math.isnan(one) else one)
        is_bad = not math.isfinite(norm + loss) or norm > self.limits[0] or loss > self.limits[1]
        self.done.append(Experiment(change, norm, is_bad, loss))
        return is_bad

    def _loss_of(self, micro: Micro) -> Tensor:
        window, loss = self.guard.window, self.loss(micro.batch)
        if window is None:
            return loss
        weight = float(micro.weight)
        return loss * (weight if window.reduction == "mean" else float(weight > 0))

    def _try(self, change: str, do: Callable[[], Any]) -> Any:
        """Do it; where it fails, on whichever rank, all of them end: none may wait for one that does not come."""
        done, failure = None, None
        try:
            done = do()
        except Exception as error:  # noqa: BLE001  # the user's code may not take such a batch
            failure = error
        told = self.told(float(failure is not None))
        if any(told):
            ranks = self.guard.ranks
            why = type(failure).__name__ if ranks is None else f"rank {ranks.members[told.index(1.0)]}"
            self.done.append(Experiment(f"{change} (failed: {why})", math.nan, is_bad=True))
            raise _EndedError from failure
        return done

    def _norm(self) -> float:
        """2-norm of all gradients, those that ranks share put together."""
        gradients = [p.grad.detach() for p in self.guard.parameters if p.grad is not None]
        whole = [g.full_tensor() if is_distributed(g) else g for g in gradients]
        return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in whole))

    def told(self, number: float) -> list[float]:
        """Each rank's number."""
        if self.guard.ranks is None:
            return [number]
        row = torch.tensor([number], dtype=torch.float64, device=self.guard.device)
        return [float(one) for one in self.guard.ranks.gather(row).flatten()]


def examine(
    trials: Trials,
    report: StepReport,
    good: Sequence[Micro],
    usual: float | None,
    *,
    is_finite: bool,
    rate_rose: bool,
) -> AutopsyResult:
    """What the trials of a step show, beside the batches of the last good one and the ``usual`` norm before it.

    ``is_finite``: norm and loss were; ``rate_rose``: the learning rate has risen lately.
    """
    found = _Culprit()
    cause: Cause = "batch"
    look = Inspection(trials.guard.model)
    with contextlib.suppress(_EndedError):
        if not trials.run("the same again", trials.step, look.watching()):
            cause = "transient"
        elif not is_finite and not trials.run("in float32", trials.step, in_float32()):
            cause = "numerics"
        elif not good or trials.run("the last good batch", good, look.comparing()):
            cause = _of_weights(trials, look, rate_rose=rate_rose)
        else:
            found.search(trials, good)
            cause = "batch" if found.sample is None else "sample"
    module, op = _first_of(trials, look)
    norm, experiments = report.norm, tuple(trials.done)
    return AutopsyResult(
        report.step, cause, found.sample, module or _module_of(report), op, norm, usual, experiments,
        found.micro, found.rank,
    )  # fmt: skip


def _first_of(trials: Trials, look: Inspection) -> tuple[str | None, str | None]:
    """Module and operation, of the first rank that has seen one: the others may only have been told its numbers."""
    ranks = trials.guard.ranks
    if ranks is None:
        return look.module, look.op
    told = trials.told(2.0 * (look.module is not None) + (look.op is not None))
    module, op = ranks.broadcast((look.module, look.op), told.index(max(told)))
    return module, op


def _of_weights(trials: Trials, look: Inspection, *, rate_rose: bool) -> Cause:
    """What it is where any batch shows it, or where there is no other to ask."""
    sound = all(bool(torch.isfinite(p).all()) for p in trials.guard.parameters)
    if any(trials.told(float(sound and look.op is not None))):
        return "numerics"
    return "learning_rate" if rate_rose else "state"


@dataclass(slots=True)
class _Culprit:
    """Whose batch it is that does it, which of several, and which of its samples; None where that is not known."""

    rank: int | None = None
    micro: int | None = None
    sample: int | None = None

    def search(self, trials: Trials, good: Sequence[Micro]) -> None:
        """By halves, the other ranks on their last good batches, as many as the one that is looked at has."""
        step, ranks, here, place = trials.step, trials.guard.ranks, 0, 0

        def others(count: int) -> list[Micro]:
            return list(itertools.islice(itertools.cycle(good), count))

        if ranks is not None:
            here, members = ranks.here, ranks.members
            found = _halved(
                len(members),
                lambda half: trials.run(
                    f"batches of ranks {members[half[0]]} to {members[half[-1]]} alone",
                    step if here in half else others(len(step)),
                ),
            )
            if len(found) > 1:
                return
            place = found[0]
            self.rank = members[place]
        if len(step) > 1:
            found = _halved(
                len(step),
                lambda half: trials.run(
                    f"batches {half[0]} to {half[-1]} alone",
                    step[half.start : half.stop] if here == place else others(len(half)),
                ),
            )
            if len(found) > 1:
                return
            self.micro = found[0]
        micro = step[self.micro or 0]
        size = int(trials.told(float(samples_of(micro.batch) or 0))[place])

        def bad(change: str, samples: Sequence[int]) -> bool:
            if here != place:
                return trials.run(change, others(1))
            part = Micro(take(micro.batch, samples), micro.replay, micro.weight * len(samples) / size)
            return trials.run(change, [part])

        self.sample = _bad_sample(size, bad)


def _halved(size: int, is_bad: Callable[[range], bool], few: int = 1) -> range:
    """Which of so many do it: halved as long as exactly one half is bad, and down to a few of them."""
    left = range(size)
    while len(left) > few:
        middle = len(left) // 2
        halves = left[:middle], left[middle:]
        bad = [is_bad(half) for half in halves]
        if sum(bad) != 1:
            break
        left = halves[bad.index(True)]
    return left


def _bad_sample(size: int, is_bad: Callable[[str, Sequence[int]], bool]) -> int | None:
    """Index of the one sample that does it; None where there is not exactly one, or they cannot be told apart.

    By halves, and at last by leaving out each of those left: a single sample has no variance, which batch normalization
    needs, and a few of them may look bad by chance.
    """
    if size < 2:
        return None
    left = _halved(size, lambda half: is_bad(f"samples {half[0]} to {half[-1]} alone", half), few=3)
    if len(left) > _MOST_LEFT_OUT:
        return None
    gone = [
        sample
        for sample in left
        if not is_bad(f"without sample {sample}", [i for i in range(size) if i != sample])
    ]
    return gone[0] if len(gone) == 1 else None


def _module_of(report: StepReport) -> str | None:
    """The module in whose parameter non-finite gradients begin; None where all, or none, are hit."""
    norms = report.norms
    hit = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if not hit or len(hit) == len(norms):
        return None
    order = {
        name: place
        for one in report.selections
        for name, place in zip(one.measured.names, one.order or range(len(one.measured.names)), strict=True)
    }
    return max(hit, key=lambda name: order.get(name, 0)).rpartition(".")[0] or None
