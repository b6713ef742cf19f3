"""The cause of a bad step, by experiment: the same step again with one thing changed, before its update is made."""

import contextlib
import dataclasses
import itertools
import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from gradkeel.errors import GradkeelWarning
from gradkeel.explain.inspection import Inspection, in_float32, samples_of, take
from gradkeel.explain.losses import FEWEST, PAST, loss_rises
from gradkeel.explain.readable import readable
from gradkeel.explain.undisturbed import Restore, randomness, undisturbed
from gradkeel.guard import Guard, SkipReason, StepReport
from gradkeel.norms import Window
from gradkeel.record.notes import write_note
from gradkeel.tensors import is_distributed

Batch = TypeVar("Batch")
Cause = Literal["sample", "batch", "numerics", "state", "transient", "learning_rate"]
NOTE = "autopsy."
_FEWEST = 8  # norms
_RATE_ROSE = 2.0
_MOST_LEFT_OUT = 16


@dataclass(frozen=True, slots=True)
class Experiment:
    """The step with one thing changed.

    Attributes:
        change: what was changed, in words.
        norm: 2-norm of the gradients that came out, NaN or inf where they were not finite.
        is_bad: whether the fault was still there.
        loss: the mean loss that came out.
    """

    change: str
    norm: float
    is_bad: bool
    loss: float = math.nan


@dataclass(frozen=True, slots=True)
class AutopsyResult:
    """What the experiments on a bad step showed.

    Attributes:
        step: its number.
        cause: "sample": one sample of the batch; "batch": this batch, as a whole; "numerics": an operation that left
            its range on sound weights and data; "learning_rate": the weights, after the learning rate had risen;
            "state": the weights, whatever the batch; "transient": the same step again was sound.
        sample: index of the bad sample in the batch, or None.
        module: name of the first module whose output was not finite, or ten times its usual, or None.
        op: the first operation that gave a non-finite number from finite ones, or None.
        norm: of the gradients as the step saw them.
        usual: the median norm of the steps before, or None.
        experiments: what was changed, and what came out, in order.
        micro: index of the bad batch among the several of this step, or None.
        rank: the rank whose batch it was, or None.
        loss, usual_loss: of the step, and the median before, where the loss was the alarm; else None.
    """

    step: int
    cause: Cause
    sample: int | None
    module: str | None
    op: str | None
    norm: float
    usual: float | None
    experiments: tuple[Experiment, ...]
    micro: int | None = None
    rank: int | None = None
    loss: float | None = None
    usual_loss: float | None = None

    def __str__(self) -> str:
        """It in words."""
        size = "the norm was not finite"
        if self.loss is not None and not math.isfinite(self.loss):
            size = "the loss was not finite"
        elif self.loss is not None:
            size = f"the loss was {readable(self.loss)}, its usual {readable(self.usual_loss or 0.0)}"
        elif math.isfinite(self.norm):
            times = f", {readable(self.norm / self.usual)} times its usual" if self.usual else ""
            size = f"the norm was {readable(self.norm)}{times}"
        batch = "" if self.micro is None else f" {self.micro}"
        batch += "" if self.rank is None else f" of rank {self.rank}"
        what = {
            "sample": f"Sample {self.sample} of {f'batch{batch}' if batch else 'the batch'} does it",
            "batch": f"{f'Batch{batch}' if batch else 'This batch'} does it: another one is sound",
            "numerics": "Numerics do it: weights and data are finite",
            "learning_rate": "The weights do it, on any batch, after the learning rate had risen",
            "state": "The weights do it, on any batch",
            "transient": "The same step again was sound: hardware, or something that is not deterministic",
        }[self.cause]
        place = f"; first in module {self.module!r}" if self.module else ""
        return f"Step {self.step}: {size}. {what}{place}{f', operation {self.op}' if self.op else ''}."


@dataclass(frozen=True, slots=True)
class _Micro:
    """A batch of a step, how to put back the random states before its pass, and its weight in a window."""

    batch: Any
    replay: Restore
    weight: float = 1.0


class Autopsy(Generic[Batch]):
    """Finds out what made a step bad, by running that step again with one thing changed.

    At the moment at which the guard has decided, the weights are still those that made the gradient. On an alarm, a
    gradient that is not finite, one whose norm is ``ratio`` times the median of the last 32, or a loss far above all of
    the last 32, the step is run again as it was, on the last good batch, in halves down to the sample, in float32, and
    with an eye on each module and operation. Parameters, gradients, buffers and random states are bit for bit the same
    afterwards; optimizer and scaler are not touched. The result is in ``last``, in the record, and in one
    `GradkeelWarning`.

    Where several batches make a step, all of them are run again, and the bad one is found first. Ranks that train
    together run the step again together, say whose batch it is, and all have the same result; each of them needs an
    autopsy. The loss, which each has of its own batch, is no alarm there.

    Batches are kept by reference until the next good ones. Reading the norm syncs the host on an accelerator, at each
    step. Nothing is tried where the guard raises on non-finite gradients, nor in a window of several denominators.

    Args:
        guard: made by `gradkeel.attach`; with ``model=`` so that modules can be named.
        loss: gives the [] loss of a batch that backward is run on, autocast included, a loss scale not; in a window
            the sum or the mean, as the accumulator's ``reduction`` says. Called again in experiments.
        max_reruns: the step is run again at most so many times for one autopsy.
        max_autopsies: at most so many in a run of steps that are not finite, and as many of others.
        ratio: how many times the usual a norm is an alarm.

    Attributes:
        last: the last `AutopsyResult`, or None.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> autopsy = gk.Autopsy(guard, loss=lambda batch: criterion(model(batch[0]), batch[1]))  # doctest: +SKIP
        >>> for batch in loader:                                                                 # doctest: +SKIP
        ...     with autopsy(batch):
        ...         autopsy.loss().backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        guard: Guard,
        *,
        loss: Callable[[Batch], Tensor],
        max_reruns: int = 40,
        max_autopsies: int = 1,
        ratio: float = 10.0,
    ) -> None:
        if max_reruns < 1 or max_autopsies < 1 or not ratio > 1:
            raise ValueError(
                f"Autopsy(max_reruns={max_reruns}, max_autopsies={max_autopsies}, ratio={ratio}): the first two must "
                "be 1 or more, and the ratio above 1"
            )
        self.last: AutopsyResult | None = None
        self._guard, self._loss = guard, loss
        self._max_reruns, self._ratio = max_reruns, ratio
        self._left = [max_autopsies, max_autopsies]  # of steps that are not finite, and of those that are
        self._norms: deque[float] = deque(maxlen=PAST)
        self._losses: deque[float] = deque(maxlen=PAST)
        self._rates: deque[float] = deque(maxlen=PAST)
        self._first_loss = math.nan
        self._now: list[tuple[Batch, Restore, Tensor | float]] = []
        self._good: list[_Micro] = []
        self._told: Tensor | None = None  # loss of the batches so far
        self._unwritten: AutopsyResult | None = None
        self._seen = 0
        guard.recorders.append(self)

    def __call__(self, batch: Batch) -> Self:
        """Keep a reference to a batch of the coming step, and Python's and torch's random states before its pass."""
        window = self._guard.window
        weighed = 0.0 if window is None else window.weight()
        self._now.append((batch, randomness(self._guard.parameters, numpy=False), weighed))
        return self

    def __enter__(self) -> Self:
        """Itself, with the batch that it was called with."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget the batch if its pass has failed."""
        if kind is not None:
            self._now.pop()

    def loss(self) -> Tensor:
        """[] the loss of the batch under way.

        Raises:
            RuntimeError: there is none.
        """
        if not self._now:
            raise RuntimeError(
                "Autopsy.loss(): no batch is under way; call it inside of `with autopsy(batch):`"
            )
        loss = self._loss(self._now[-1][0])
        self._told = loss.detach() if self._told is None else self._told + loss.detach()
        return loss

    # ---- as a recorder of the guard ----------------------------------------------------------------------------------

    def before_step(self, report: StepReport) -> None:
        """Look at the step that was decided on, while the weights are still those that made its gradient."""
        guard = self._guard
        (now, self._now), (told, self._told) = (self._now, []), (self._told, None)
        if not now or report.step == self._seen:
            return
        self._seen = report.step
        if report.why in (SkipReason.LOSS_SCALE, SkipReason.NO_GRADIENT, SkipReason.EMPTY_WINDOW):
            return
        step = _weighed(now, guard.window)
        self._rates.append(float(guard.optimizer.param_groups[0].get("lr", 0.0)))
        given = report.scalars.get("loss", told) if guard.ranks is None else None
        norm, loss = report.norm, math.nan if given is None else float(given)
        usual = statistics.median(self._norms) if len(self._norms) >= _FEWEST else None
        limits = math.inf if usual is None else self._ratio * usual, self._loss_limit()
        is_finite = math.isfinite(norm) and (given is None or math.isfinite(loss))
        if is_finite and not (norm > limits[0] or loss > limits[1]):
            self._norms.append(norm)
            self._losses.append(loss)
            self._first_loss = loss if math.isnan(self._first_loss) else self._first_loss
            self._good = step
            return
        if not self._left[is_finite] or not (guard.window is None or guard.window.is_of_one()):
            return
        self._left[is_finite] -= 1
        rose = any(b > _RATE_ROSE * a for a, b in itertools.combinations(self._rates, 2))
        with undisturbed(guard.parameters, guard.model, in_place=True) as restart, torch.enable_grad():
            trials = _Trials(guard, self._loss, restart, step, limits, self._max_reruns)
            result = _examine(trials, report, self._good, usual, is_finite=is_finite, rate_rose=rose)
        if math.isfinite(norm) and not norm > limits[0]:
            usual_loss = statistics.median(self._losses) if self._losses else 0.0
            result = dataclasses.replace(result, loss=loss, usual_loss=usual_loss)
        self.last = self._unwritten = result

    def _loss_limit(self) -> float:
        known = [loss for loss in self._losses if math.isfinite(loss)]
        if len(known) < FEWEST:
            return math.inf
        usual = statistics.median(known)
        return usual + max(loss_rises(usual, max(known), self._first_loss))

    def record(self, report: StepReport) -> None:
        """Write the result into the record, and warn; one of the ranks does."""
        result, self._unwritten = self._unwritten, None
        if result is None or (self._guard.ranks is not None and self._guard.ranks.here):
            return
        for recorder in self._guard.recorders:
            path = getattr(recorder, "path", None)
            if path is not None:
                recorder.flush()  # type: ignore[attr-defined]  # a file's recorder
                write_note(path, f"{NOTE}{result.step}", result)
        warnings.warn(str(result), GradkeelWarning, stacklevel=2)

    def close(self) -> None:
        """Let go of the batches; called by ``guard.detach()``."""
        self._now, self._good = [], []


def _weighed(now: Sequence[tuple[Any, Restore, Tensor | float]], window: Window | None) -> list[_Micro]:
    """The batches of a step with what each has added to the window's weight."""
    if window is None:
        return [_Micro(batch, replay) for batch, replay, _ in now]
    sums = [float(weighed) for _, _, weighed in now] + [float(window.weight())]
    return [
        _Micro(batch, replay, after - before)
        for (batch, replay, _), (before, after) in zip(now, itertools.pairwise(sums), strict=True)
    ]


class _EndedError(Exception):
    """No further pass is allowed, or one has failed."""


class _Trials:
    """Runs a step again and again, on all ranks together, and notes what came out.

    Attributes:
        step: the batches of this rank.
        done: what was tried.
    """

    def __init__(
        self,
        guard: Guard,
        loss: Callable[[Any], Tensor],
        restart: Restore,
        step: Sequence[_Micro],
        limits: tuple[float, float],
        budget: int,
    ) -> None:
        self.guard, self.ranks, self.step = guard, guard.ranks, step
        self._loss, self._limits, self._budget, self._restart = loss, limits, budget, restart
        self.done: list[Experiment] = []

    def run(
        self,
        change: str,
        step: Sequence[_Micro],
        context: contextlib.AbstractContextManager[Any] | None = None,
    ) -> bool:
        """Whether the fault is there with this changed; all ranks must ask with equally many batches."""
        if self._budget < 1:
            raise _EndedError
        self._budget -= 1
        self._restart()
        for parameter in self.guard.parameters:
            parameter.grad = None
        losses: list[Tensor] = []
        with context or contextlib.nullcontext():
            for micro in step:
                micro.replay()
                self._try(change, partial(self._forward, micro, losses))
                self._try(change, losses[-1].backward)
        window, weights = self.guard.window, self.told(sum(micro.weight for micro in step))
        loss = sum(self.told(sum(float(one.detach()) for one in losses)))
        norm = self._norm()
        if window is None:
            loss /= len(weights)
        else:
            norm *= window.mean_of(
                sum(micro.weight for micro in step) if window.ranks is None else sum(weights)
            )
            loss /= sum(weights) or 1.0
        norm = max(self.told(norm), key=lambda one: math.inf if math.isnan(one) else one)
        is_bad = not math.isfinite(norm + loss) or norm > self._limits[0] or loss > self._limits[1]
        self.done.append(Experiment(change, norm, is_bad, loss))
        return is_bad

    def _forward(self, micro: _Micro, losses: list[Tensor]) -> None:
        window, loss = self.guard.window, self._loss(micro.batch)
        if window is not None:
            loss = loss * (micro.weight if window.reduction == "mean" else float(micro.weight > 0))
        losses.append(loss)

    def _try(self, change: str, do: Callable[[], object]) -> None:
        """Do it; where it fails, on whichever rank, all of them end: none may wait for one that does not come."""
        failure: Exception | None = None
        try:
            do()
        except Exception as error:  # noqa: BLE001  # the user's code may not take such a batch
            failure = error
        told = self.told(float(failure is not None))
        if any(told):
            why = (
                type(failure).__name__
                if self.ranks is None
                else f"on rank {self.ranks.members[told.index(1.0)]}"
            )
            self.done.append(Experiment(f"{change} (failed: {why})", math.nan, is_bad=True))
            raise _EndedError from failure

    def _norm(self) -> float:
        """2-norm of all gradients, those that ranks share put together."""
        gradients = [p.grad.detach() for p in self.guard.parameters if p.grad is not None]
        whole = [g.full_tensor() if is_distributed(g) else g for g in gradients]  # type: ignore[attr-defined]
        return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in whole))

    def told(self, number: float) -> list[float]:
        """Each rank's number."""
        if self.ranks is None:
            return [number]
        row = torch.tensor([number], dtype=torch.float64, device=self.guard.device)
        return [float(one) for one in self.ranks.gather(row).flatten()]


def _examine(
    trials: _Trials,
    report: StepReport,
    good: Sequence[_Micro],
    usual: float | None,
    *,
    is_finite: bool,
    rate_rose: bool,
) -> AutopsyResult:
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


def _first_of(trials: _Trials, look: Inspection) -> tuple[str | None, str | None]:
    """Module and operation, of the first rank that has seen one: the others may only have been told its numbers."""
    if trials.ranks is None:
        return look.module, look.op
    told = trials.told(2.0 * (look.module is not None) + (look.op is not None))
    module, op = trials.ranks.broadcast((look.module, look.op), told.index(max(told)))
    return module, op


def _of_weights(trials: _Trials, look: Inspection, *, rate_rose: bool) -> Cause:
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

    def search(self, trials: _Trials, good: Sequence[_Micro]) -> None:
        """By halves, the other ranks on their last good batches, as many as the one that is looked at has."""
        step, here, place = trials.step, 0, 0

        def others(count: int) -> list[_Micro]:
            return list(itertools.islice(itertools.cycle(good), count))

        if trials.ranks is not None:
            here, members = trials.ranks.here, trials.ranks.members
            found = _halved(
                len(members),
                lambda a, b: trials.run(
                    f"batches of ranks {members[a]} to {members[b - 1]} alone",
                    step if a <= here < b else others(len(step)),
                ),
            )
            if found is None:
                return
            place, self.rank = found, members[found]
        if len(step) > 1:
            self.micro = _halved(
                len(step),
                lambda a, b: trials.run(
                    f"batches {a} to {b - 1} alone", step[a:b] if here == place else others(b - a)
                ),
            )
            if self.micro is None:
                return
        micro = step[self.micro or 0]
        size = int(trials.told(float(samples_of(micro.batch) or 0))[place])

        def bad(change: str, samples: Sequence[int]) -> bool:
            if here != place:
                return trials.run(change, others(1))
            part = _Micro(take(micro.batch, samples), micro.replay, micro.weight * len(samples) / size)
            return trials.run(change, [part])

        self.sample = _bad_sample(size, bad)


def _halved(size: int, is_bad: Callable[[int, int], bool]) -> int | None:
    """The one of so many that does it, or None where there is not exactly one."""
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        halves = [(low, middle), (middle, high)]
        bad = [is_bad(*half) for half in halves]
        if sum(bad) != 1:
            return None
        low, high = halves[bad.index(True)]
    return low


def _bad_sample(size: int, is_bad: Callable[[str, Sequence[int]], bool]) -> int | None:
    """Index of the one sample that does it; None where there is not exactly one, or they cannot be told apart.

    By halves, and at last by leaving out each of those left: a single sample has no variance, which batch normalization
    needs, and a few of them may look bad by chance.
    """
    if size < 2:
        return None
    low, high = 0, size
    while high - low > 3:
        middle = (low + high) // 2
        halves = [(low, middle), (middle, high)]
        bad = [is_bad(f"samples {a} to {b - 1} alone", range(a, b)) for a, b in halves]
        if sum(bad) != 1:
            break
        low, high = halves[bad.index(True)]
    if high - low > _MOST_LEFT_OUT:
        return None
    gone = [
        sample
        for sample in range(low, high)
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


def of_note(note: Mapping[str, Any]) -> AutopsyResult:
    """A result as a record holds it."""
    experiments = tuple(
        Experiment(str(e["change"]), _number(e["norm"]), bool(e["is_bad"]), _number(e.get("loss")))
        for e in note["experiments"]
    )
    told = {**note, "norm": _number(note["norm"]), "experiments": experiments}
    if told.get("usual_loss") is not None:
        told["loss"] = _number(note["loss"])
    return AutopsyResult(**told)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
