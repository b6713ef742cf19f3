"""The cause of a bad step, by experiment: the same step again with one thing changed, before its update is made."""

import dataclasses
import itertools
import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from gradkeel.errors import GradkeelWarning, check_kind
from gradkeel.explain.findings import NOTE, AutopsyResult
from gradkeel.explain.losses import FEWEST, PAST, loss_rises
from gradkeel.explain.trials import Micro, Trials, examine
from gradkeel.explain.undisturbed import randomness, undisturbed
from gradkeel.guard import Guard, SkipReason, StepReport
from gradkeel.norms import Window
from gradkeel.record.notes import write_note
from gradkeel.selection import learning_rate

Batch = TypeVar("Batch")
_FEWEST_NORMS = 8
_RATE_ROSE = 2.0


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

    Batches are kept by reference until the next good ones. Reading norm and loss syncs the host on an accelerator, at
    each step. Nothing is tried where the guard raises on non-finite gradients, nor in a window of several denominators.

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
        check_kind(guard, Guard, "Autopsy(guard=...)", "guard must be what attach() returns")
        check_kind(
            loss, Callable, "Autopsy(loss=...)", "loss must be a function of a batch that returns its loss"
        )
        if max_reruns < 1 or max_autopsies < 1 or not ratio > 1:
            raise ValueError(
                f"Autopsy(max_reruns={max_reruns}, max_autopsies={max_autopsies}, ratio={ratio}): the first two must "
                "be 1 or more, and the ratio above 1"
            )
        self.last: AutopsyResult | None = None
        self._guard, self._loss = guard, loss
        self._one_a_device = list({p.device: p for p in guard.parameters}.values())
        self._max_reruns, self._ratio = max_reruns, ratio
        self._left = [max_autopsies, max_autopsies]  # of steps that are not finite, and of those that are
        self._norms: deque[float] = deque(maxlen=PAST)
        self._losses: deque[float] = deque(maxlen=PAST)
        self._rates: deque[float] = deque(maxlen=PAST)
        self._first_loss = math.nan
        self._now: list[Micro] = []  # with the window's weight before each
        self._good: list[Micro] = []
        self._told: Tensor | None = None  # loss of the batches so far
        self._unwritten: AutopsyResult | None = None
        self._seen = 0
        guard.recorders.append(self)

    def __call__(self, batch: Batch) -> Self:
        """Keep a reference to a batch of the coming step, and Python's and torch's random states before its pass."""
        window = self._guard.window
        before = 0.0 if window is None else window.weight()
        self._now.append(Micro(batch, randomness(self._one_a_device, numpy=False), before))
        return self

    def __enter__(self) -> Self:
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
        loss = self._loss(self._now[-1].batch)
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
        if report.told_why() in (SkipReason.LOSS_SCALE, SkipReason.NO_GRADIENT, SkipReason.EMPTY_WINDOW):
            return
        step = _weighed(now, guard.window)
        rate = learning_rate(guard.optimizer.param_groups[0])
        self._rates.append(math.nan if rate is None else float(rate))
        given = report.scalars.get("loss", told) if guard.ranks is None else None
        norm, loss = report.norm, math.nan if given is None else float(given)
        usual = statistics.median(self._norms) if len(self._norms) >= _FEWEST_NORMS else None
        usual_loss, loss_limit = self._usual_loss()
        limits = math.inf if usual is None else self._ratio * usual, loss_limit
        is_finite = math.isfinite(norm) and (given is None or math.isfinite(loss))
        if is_finite and not (norm > limits[0] or loss > limits[1]):
            self._norms.append(norm)
            self._losses.append(loss)
            self._first_loss = loss if math.isnan(self._first_loss) else self._first_loss
            self._good = step
            return
        if not self._left[is_finite] or not (guard.window is None or len(guard.window.per) == 1):
            return
        self._left[is_finite] -= 1
        rose = any(b > _RATE_ROSE * a for a, b in itertools.combinations(self._rates, 2))
        with undisturbed(guard.parameters, guard.model, in_place=True) as restart, torch.enable_grad():
            trials = Trials(guard, self._loss, restart, step, limits, self._max_reruns)
            result = examine(trials, report, self._good, usual, is_finite=is_finite, rate_rose=rose)
        if math.isfinite(norm) and not norm > limits[0]:
            result = dataclasses.replace(result, loss=loss, usual_loss=usual_loss)
        self.last = self._unwritten = result

    def _usual_loss(self) -> tuple[float, float]:
        """The median of the last losses, 0 without any, and from where on another one is an alarm."""
        known = [loss for loss in self._losses if not math.isnan(loss)]  # NaN: nobody told it
        usual = statistics.median(known) if known else 0.0
        if len(known) < FEWEST:
            return usual, math.inf
        return usual, usual + max(loss_rises(usual, max(known), self._first_loss))

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


def _weighed(now: Sequence[Micro], window: Window | None) -> list[Micro]:
    """The batches of a step with what each has added to the window's weight; without a window they count alike."""
    if window is None:
        return [Micro(micro.batch, micro.replay) for micro in now]
    sums = [micro.weight for micro in now] + [window.weight()]  # not read here: each would sync the host
    added = [after - before for before, after in itertools.pairwise(sums)]
    return [Micro(micro.batch, micro.replay, weight) for micro, weight in zip(now, added, strict=True)]
