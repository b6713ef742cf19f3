"""The cause of a bad step, by experiment: the same step again with one thing changed, before its update is made."""

import contextlib
import itertools
import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from gradkeel.errors import GradkeelWarning
from gradkeel.explain.inspection import Inspection, in_float32, samples_of, take
from gradkeel.explain.readable import readable
from gradkeel.explain.undisturbed import Restore, randomness, undisturbed
from gradkeel.guard import Guard, SkipReason, StepReport
from gradkeel.language import heard, say
from gradkeel.record.notes import write_note

Batch = TypeVar("Batch")
Cause = Literal["sample", "batch", "numerics", "state", "transient", "learning_rate"]
NOTE = "autopsy."
_PAST, _FEWEST = 32, 8
_RATE_ROSE = 2.0


@dataclass(frozen=True, slots=True)
class Experiment:
    """The step with one thing changed.

    Attributes:
        change: what was changed, in words.
        norm: 2-norm of the gradients that came out, NaN or inf where they were not finite.
        is_bad: whether the fault was still there.
    """

    change: str
    norm: float
    is_bad: bool


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
    """

    step: int
    cause: Cause
    sample: int | None
    module: str | None
    op: str | None
    norm: float
    usual: float | None
    experiments: tuple[Experiment, ...]

    def __str__(self) -> str:
        """It in words."""
        return str(self.words())

    def words(self) -> str:
        """It in a sentence that can be translated."""
        if not math.isfinite(self.norm):
            size = say("was not finite")
        else:
            ratio = readable(self.norm / self.usual) if self.usual else ""
            times = say(", {ratio} times its usual", ratio=ratio) if ratio else ""
            size = say("was {norm}{times}", norm=readable(self.norm), times=times)
        what = {
            "sample": say("Sample {sample} of the batch does it", sample=self.sample),
            "batch": say("This batch does it: another one is sound"),
            "numerics": say("Numerics do it: weights and data are finite"),
            "learning_rate": say("The weights do it, on any batch, after the learning rate had risen"),
            "state": say("The weights do it, on any batch"),
            "transient": say(
                "The same step again was sound: hardware, or something that is not deterministic"
            ),
        }[self.cause]
        return say(
            "Step {step}: the norm {size}. {what}{place}{operation}.",
            step=self.step,
            size=size,
            what=what,
            place=say("; first in module {module!r}", module=self.module) if self.module else "",
            operation=say(", operation {op}", op=heard(self.op)) if self.op else "",
        )


class Autopsy(Generic[Batch]):
    """Finds out what made a step bad, by running that step again with one thing changed.

    At the moment at which the guard has decided, the weights are still those that made the gradient. On an alarm, a
    gradient that is not finite or whose norm is ``ratio`` times the median of the last 32, the step is run again as it
    was, on the last good batch, in halves down to the sample, in float32, and with an eye on each module and
    operation. Parameters, gradients, buffers and random states are bit for bit the same afterwards; optimizer and
    scaler are not touched. The result is in ``last``, in the record, and in one `GradkeelWarning`.

    A batch is kept by reference until the next good one. Reading the norm syncs the host on an accelerator, at each
    step. For one process; nothing is tried where the guard raises on non-finite gradients, nor under an accumulation
    window, whose gradient is of several batches.

    Args:
        guard: made by `gradkeel.attach`; with ``model=`` so that modules can be named.
        loss: gives the [] mean loss of a batch, autocast included; called again in experiments.
        max_reruns: at most so many forward and backward passes for one autopsy.
        max_autopsies: at most so many in a run.
        ratio: how many times the usual a norm is an alarm.

    Attributes:
        last: the last `AutopsyResult`, or None.

    Raises:
        ValueError: a number is out of its range, or several processes train together.

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
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ValueError(
                "Autopsy(guard): it runs steps again on one process, and several train together here; leave it out"
            )
        self.last: AutopsyResult | None = None
        self._guard, self._loss = guard, loss
        self._max_reruns, self._left, self._ratio = max_reruns, max_autopsies, ratio
        self._norms: deque[float] = deque(maxlen=_PAST)
        self._rates: deque[float] = deque(maxlen=_PAST)
        self._batch: tuple[Batch, Restore] | None = None
        self._good: Batch | None = None
        self._unwritten: AutopsyResult | None = None
        self._seen = 0
        guard.recorders.append(self)

    def __call__(self, batch: Batch) -> Self:
        """Keep a reference to the batch of the coming step, and the random states before its forward pass."""
        self._batch = (batch, randomness(self._guard.parameters))
        return self

    def __enter__(self) -> Self:
        """Itself, with the batch that it was called with."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget the batch if its step has failed."""
        if kind is not None:
            self._batch = None

    def loss(self) -> Tensor:
        """[] the loss of the batch under way.

        Raises:
            RuntimeError: there is none.
        """
        if self._batch is None:
            raise RuntimeError(
                "Autopsy.loss(): no batch is under way; call it inside of `with autopsy(batch):`"
            )
        return self._loss(self._batch[0])

    # ---- as a recorder of the guard ----------------------------------------------------------------------------------

    def before_step(self, report: StepReport) -> None:
        """Look at the step that was decided on, while the weights are still those that made its gradient."""
        if self._batch is None or report.step == self._seen:
            return
        self._seen = report.step
        batch, replay_randomness = self._batch
        self._batch = None
        if report.why in (SkipReason.LOSS_SCALE, SkipReason.NO_GRADIENT, SkipReason.EMPTY_WINDOW):
            return
        norm = report.norm
        usual = statistics.median(self._norms) if len(self._norms) >= _FEWEST else None
        rate = self._guard.optimizer.param_groups[0].get("lr", 0.0)
        self._rates.append(float(rate))
        limit = math.inf if usual is None else self._ratio * usual
        if math.isfinite(norm) and not norm > limit:
            self._norms.append(norm)
            self._good = batch
            return
        if self._left and self._guard.window is None:
            self._left -= 1
            with undisturbed(self._guard.parameters, self._guard.model) as restart, torch.enable_grad():
                trials = _Trials(self._guard, self._loss, restart, replay_randomness, limit, self._max_reruns)
                rose = any(
                    now > _RATE_ROSE * before for before, now in itertools.combinations(self._rates, 2)
                )
                self.last = _examine(trials, report, batch, self._good, usual, rate_rose=rose)
            self._unwritten = self.last

    def record(self, report: StepReport) -> None:
        """Write the result into the record, and warn."""
        result, self._unwritten = self._unwritten, None
        if result is None:
            return
        for recorder in self._guard.recorders:
            path = getattr(recorder, "path", None)
            if path is not None and getattr(recorder, "rank", 0) == 0:
                recorder.flush()  # type: ignore[attr-defined]  # a file's recorder
                write_note(path, f"{NOTE}{result.step}", result)
        warnings.warn(str(result), GradkeelWarning, stacklevel=2)

    def close(self) -> None:
        """Let go of the batches; called by ``guard.detach()``."""
        self._batch = self._good = None


class _EndedError(Exception):
    """No further pass is allowed, or one has failed."""


class _Trials:
    """Runs a step again and again, and notes what came out."""

    def __init__(
        self,
        guard: Guard,
        loss: Callable[[Any], Tensor],
        restart: Restore,
        replay_randomness: Restore,
        limit: float,
        budget: int,
    ) -> None:
        self.guard, self._loss, self._limit, self._budget = guard, loss, limit, budget
        self._restart, self._replay = restart, replay_randomness
        self.done: list[Experiment] = []

    def run(
        self, change: str, batch: Any, context: contextlib.AbstractContextManager[Any] | None = None
    ) -> bool:
        """Whether the fault is there with this changed."""
        if self._budget < 1:
            raise _EndedError
        self._budget -= 1
        self._restart()
        self._replay()
        for parameter in self.guard.parameters:
            parameter.grad = None
        try:
            with context or contextlib.nullcontext():
                self._loss(batch).backward()
        except Exception as error:  # the user's code may not take such a batch
            self.done.append(Experiment(f"{change} (failed: {type(error).__name__})", math.nan, is_bad=True))
            raise _EndedError from error
        gradients = [p.grad for p in self.guard.parameters if p.grad is not None]
        norm = math.hypot(
            *(float(torch.linalg.vector_norm(g.detach(), dtype=torch.float64)) for g in gradients)
        )
        is_bad = not math.isfinite(norm) or norm > self._limit
        self.done.append(Experiment(change, norm, is_bad))
        return is_bad


def _examine(
    trials: _Trials, report: StepReport, batch: Any, good: Any, usual: float | None, *, rate_rose: bool
) -> AutopsyResult:
    sample: int | None = None
    cause: Cause = "batch"
    look = Inspection(trials.guard.model)
    with contextlib.suppress(_EndedError):
        if not trials.run("the same again", batch, look.watching()):
            cause = "transient"
        elif not math.isfinite(report.norm) and not trials.run("in float32", batch, in_float32()):
            cause = "numerics"
        elif good is None or trials.run("the last good batch", good, look.comparing()):
            cause = _of_weights(trials, look, rate_rose=rate_rose)
        else:
            sample = _bad_sample(trials, batch)
            cause = "batch" if sample is None else "sample"
    module = look.module or _module_of(report)
    return AutopsyResult(report.step, cause, sample, module, look.op, report.norm, usual, tuple(trials.done))


def _of_weights(trials: _Trials, look: Inspection, *, rate_rose: bool) -> Cause:
    """What it is where any batch shows it, or where there is no other to ask."""
    sound = all(bool(torch.isfinite(p).all()) for p in trials.guard.parameters)
    if sound and look.op is not None:
        return "numerics"
    return "learning_rate" if rate_rose else "state"


def _bad_sample(trials: _Trials, batch: Any) -> int | None:
    """Index of the one sample that does it; None where there is not exactly one, or they cannot be told apart.

    By halves, and at last by leaving out one: a single sample has no variance, which batch normalization needs.
    """
    size = samples_of(batch)
    if size is None or size < 2:
        return None
    low, high = 0, size
    while high - low > 2:
        middle = (low + high) // 2
        halves = [(low, middle), (middle, high)]
        bad = [trials.run(f"samples {a} to {b - 1} alone", take(batch, range(a, b))) for a, b in halves]
        if sum(bad) != 1:
            return None
        low, high = halves[bad.index(True)]
    for sample in range(low, high):
        others = [i for i in range(size) if i != sample]
        if not trials.run(f"without sample {sample}", take(batch, others)):
            return sample
    return None


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
        Experiment(str(e["change"]), math.nan if e["norm"] is None else float(e["norm"]), bool(e["is_bad"]))
        for e in note["experiments"]
    )
    norm = math.nan if note["norm"] is None else float(note["norm"])
    return AutopsyResult(**{**note, "norm": norm, "experiments": experiments})
