"""The one verdict on a run, from everything that was recorded of it: the loss first, for it is what training is for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from gradkeel.explain.readable import readable
from gradkeel.explain.updates import LARGE
from gradkeel.guard import SkipReason
from gradkeel.language import say

EARLY = 20
"""Steps within which a run diverges from its start."""
TAIL = 10
HIDDEN = 0.01
"""Clipping that multiplies by less than this hides what the gradients do."""
_NOISE = 4.0  # times the usual change from step to step
_RETURNED = 0.3  # of what training had gained: more than this lost again is not recovered
_FLAT = 0.02  # of the first loss


class Verdict(StrEnum):
    """What a run came to."""

    HEALTHY = "healthy"
    DIVERGED_FROM_START = "diverged_from_start"
    DIVERGED_IN_WARMUP = "diverged_in_warmup"
    DIVERGED = "diverged"
    CLIPPING_HIDES_DIVERGENCE = "clipping_hides_divergence"
    SPIKE_RECOVERED = "spike_recovered"
    SPIKE_UNRECOVERED = "spike_unrecovered"
    DRIFT = "drift"
    NON_FINITE = "non_finite"
    LOSS_SCALE_OVERFLOW = "loss_scale_overflow"
    VANISHING = "vanishing"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One verdict, and what it rests on.

    Attributes:
        verdict: one of a closed list.
        onset: step at which it began, or None.
        where: up to three parameters, first first; () where all were hit at once, or none.
        confidence: from 0 to 1; lower where evidence that would have decided was not recorded.
        missing: what was not recorded and would have helped, each with how to record it.
        reasons: the evidence, in sentences.
    """

    verdict: Verdict
    onset: int | None
    where: tuple[str, ...]
    confidence: float
    missing: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that the norms or the weights showed: where it began, in which parameters, and how it ended."""

    kind: str
    step: int
    where: tuple[str, ...]
    is_over: bool


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """What a verdict is made from.

    Attributes:
        steps: [k] numbers of the steps.
        losses, totals, coefficients, rates: [k] loss, gradient norm, what clipping multiplied by, and learning rate;
            NaN where not known.
        nonfinite: [k] bool: steps with a gradient that was not finite.
        skips: why steps were skipped, by number.
        larger: parameter, step and ratio of each first update larger than the weights it changed.
        shares: steps, and the norm of the whole update over that of all weights.
        signs: what the norms and weights showed, in order.
        hardly: weights that hardly learn, with the step since when.
    """

    steps: Tensor
    losses: Tensor
    totals: Tensor
    coefficients: Tensor
    rates: Tensor
    nonfinite: Tensor
    skips: Mapping[int, SkipReason]
    larger: Sequence[tuple[str, int, float]] = ()
    shares: Sequence[tuple[int, float]] = ()
    signs: Sequence[Sign] = ()
    hardly: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, slots=True)
class _Loss:
    """What the loss did: its levels at the beginning, at its best and at the end, its noise, and where it left."""

    first: float
    best: float
    last: float
    noise: float
    left: int | None
    is_finite: bool
    is_sudden: bool = True

    @property
    def is_above(self) -> bool:
        """Whether it ended above where it began."""
        return not self.is_finite or self.last > self.first

    @property
    def is_clearly_above(self) -> bool:
        return not self.is_finite or self.last > self.first + max(self.noise / 2, _FLAT * abs(self.first))

    @property
    def is_lost(self) -> bool:
        """Whether it ended far above its best."""
        lost = self.last - self.best
        return not self.is_finite or (
            lost > max(_NOISE * self.noise, _FLAT * abs(self.first))
            and lost > _RETURNED * max(self.first - self.best, 0)
        )

    @property
    def has_learned(self) -> bool:
        return self.is_finite and self.last < self.first - max(2 * self.noise, 2 * _FLAT * abs(self.first))


def judge(signals: Signals) -> Diagnosis:
    """The verdict on a run."""
    return _Judge(signals).verdict()


class _Judge:
    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.loss = _loss(signals)
        self.reasons: list[str] = []
        self._first_bad = _first_bad(signals)

    def verdict(self) -> Diagnosis:
        """The first of these that holds."""
        for ask in (self._born_bad, self._from_start, self._not_finite, self._lost, self._spiked, self._idle):
            found = ask()
            if found is not None:
                return found
        return self._say(Verdict.HEALTHY, None, (), 0.9)

    def _say(
        self, verdict: Verdict, onset: int | None, where: Sequence[str], confidence: float, *reasons: str
    ) -> Diagnosis:
        missing = self._missing()
        sure = confidence * 0.8 ** len(missing)
        return Diagnosis(verdict, onset, tuple(where[:3]), round(sure, 3), missing, (*self.reasons, *reasons))

    def _missing(self) -> tuple[str, ...]:
        missing: list[str] = []
        if self.loss is None:
            missing.append(say("the loss: guard.log(loss=loss) before optimizer.step()"))
        if not self.signals.shares and not self.signals.larger:
            missing.append(
                say("updates relative to the weights: record='run.keel' without sharding, or per_rank=True")
            )
        return tuple(missing)

    # ---- not a number ----------------------------------------------------------------------------------------------

    def _born_bad(self) -> Diagnosis | None:
        """Non-finite out of calm, and after no update that was far too large."""
        row = self._first_bad
        return None if row is None or self._overwrites(until=row) is not None else self._not_finite()

    def _not_finite(self) -> Diagnosis | None:
        """Non-finite out of calm: nothing rose before it."""
        row = self._first_bad
        if row is None or self._rose_before(row):
            return None
        step = int(self.signals.steps[row])
        where = next((sign.where for sign in self.signals.signs if sign.step == step), ())
        words = say("All gradients were hit at once: it came with the loss, or the batch.")
        if where:
            words = say(
                "It began in {parameter}: backward runs from the end, and was finite until there.",
                parameter=where[0],
            )
        first = say("At step {step} the first number was not finite.", step=step)
        return self._say(Verdict.NON_FINITE, step, where, 0.95, first, words)

    def _rose_before(self, row: int) -> bool:
        """Whether norm or loss had left their past before a row, so that it only ends what had begun."""
        s = self.signals
        past, now = s.totals[max(0, row - 32) : max(0, row - 3)], s.totals[max(0, row - 3) : row]
        now = now[torch.isfinite(now)]
        past = past[torch.isfinite(past)]
        if not len(past):
            return len(now) > 1 and float(now.max()) > 10 * float(s.totals[0])
        return len(now) > 0 and float(now.max()) > 30 * float(past.median())

    # ---- far too large steps -----------------------------------------------------------------------------------------

    def _overwrites(self, until: int | None = None) -> int | None:
        """The first step whose update was a large part of all weights."""
        last = None if until is None else int(self.signals.steps[until])
        for step, share in self.signals.shares:
            if (last is None or step <= last) and not share <= LARGE:
                return step
        return None

    def _from_start(self) -> Diagnosis | None:
        """A run that never trained, or stopped to in its warm-up, because its steps were too large."""
        s, loss = self.signals, self.loss
        large = self._overwrites()
        warmup = self._warmup_end()
        early = max(EARLY, warmup or 0)
        first = int(s.steps[0]) if len(s.steps) else 0
        if loss is None:
            began = [sign for sign in s.signs if sign.kind == "initialization" and not sign.is_over]
            bad = large is not None and large - first < early and bool(began)
        else:
            left = loss.left if loss.left is not None and loss.left - first < early + EARLY else None
            failed = loss.is_clearly_above or (warmup and loss.is_lost and left is not None)
            failed = failed or (not loss.has_learned and large is not None)
            bad = bool(failed) and (left is not None or (large is not None and large - first < early))
            large = min((step for step in (large, left) if step is not None), default=None) if bad else large
        if not bad or large is None:
            return None
        where = [name for name, step, _ in s.larger if step <= large + 3]
        if s.larger:
            name, step, ratio = s.larger[0]
            told = say(
                "At step {step} the update of {name} was {times} times its weights.",
                step=step, name=name, times=readable(ratio),
            )  # fmt: skip
            self.reasons.append(told)
        verdict = Verdict.DIVERGED_IN_WARMUP if warmup and large - first > 1 else Verdict.DIVERGED_FROM_START
        return self._diverged(verdict, large, where)

    def _warmup_end(self) -> int | None:
        """How many steps the learning rate rose from the beginning; None where it did not."""
        rates = self.signals.rates
        if (
            len(rates) < 3
            or not bool(torch.isfinite(rates).all())
            or not float(rates.max()) > 2 * float(rates[0])
        ):
            return None
        return int(rates.argmax()) + 1

    def _diverged(self, verdict: Verdict, onset: int, where: Sequence[str]) -> Diagnosis:
        """A divergence, under the name that clipping gives it where it hides it."""
        s, loss = self.signals, self.loss
        row = int(torch.searchsorted(s.steps, onset))
        hidden = float((s.coefficients[row:] < HIDDEN).double().mean()) if row < len(s.steps) else 0.0
        if loss is not None:
            self.reasons.append(
                say(
                    "The loss began at {first}, was {best} at best, and ended at {end}.",
                    first=readable(loss.first),
                    best=readable(loss.best),
                    end=readable(loss.last) if loss.is_finite else say("not finite"),
                )
            )
        if hidden > 0.5:
            verdict = Verdict.CLIPPING_HIDES_DIVERGENCE
            told = say(
                "In {share:.0%} of the steps since, clipping multiplied by less than {limit:g}.",
                share=hidden, limit=HIDDEN,
            )  # fmt: skip
            self.reasons.append(told)
        return self._say(verdict, onset, where, 0.9 if loss is not None else 0.7)

    # ---- later ---------------------------------------------------------------------------------------------------

    def _nearest(self, step: int | None) -> Sign | None:
        """What the norms or weights showed at about this step."""
        near = [sign for sign in self.signals.signs if step is None or -10 <= step - sign.step <= 30]
        return min(near, key=lambda sign: abs(sign.step - (step or sign.step)), default=None)

    def _lost(self) -> Diagnosis | None:
        """The loss ended above its beginning, or far above its best."""
        loss = self.loss
        if loss is None or not (loss.is_clearly_above or loss.is_lost):
            return None
        sign = self._nearest(loss.left)
        onset = sign.step if sign else loss.left
        if onset is None or not (sign or loss.is_sudden or loss.is_clearly_above):
            return None  # a slow rise within what it had gained: games between networks do that
        where = sign.where if sign else ()
        if sign and sign.kind == "drift":
            return self._say(Verdict.DRIFT, onset, where, 0.8)
        if loss.is_clearly_above:
            return self._diverged(Verdict.DIVERGED, onset, where)
        best, end = readable(loss.best), readable(loss.last)
        told = say(
            "The loss was {best} at best, and ended at {end}: it did not come back.", best=best, end=end
        )
        self.reasons.append(told)
        return self._say(Verdict.SPIKE_UNRECOVERED, onset, where, 0.85 if sign else 0.7)

    def _spiked(self) -> Diagnosis | None:
        """What the norms and weights showed, in a run whose loss is sound, or not known."""
        signs = self.signals.signs
        if not signs:
            return None
        faults = [sign for sign in signs if sign.kind != "overflow"]
        if not faults:
            return self._say(Verdict.LOSS_SCALE_OVERFLOW, signs[0].step, signs[0].where, 0.9)
        sign = next((one for one in faults if not one.is_over), faults[0])
        if sign.kind == "drift":
            return self._say(Verdict.DRIFT, sign.step, sign.where, 0.7)
        if sign.is_over or self.loss is not None:
            return self._say(Verdict.SPIKE_RECOVERED, sign.step, sign.where, 0.8)
        if sign.kind == "initialization":
            return self._diverged(Verdict.DIVERGED_FROM_START, sign.step, sign.where)
        return self._diverged(Verdict.DIVERGED, sign.step, sign.where)

    def _idle(self) -> Diagnosis | None:
        """Nothing happened, and in part nothing was learned."""
        if self.signals.hardly:
            names = [name for name, _ in self.signals.hardly]
            since = min(step for _, step in self.signals.hardly)
            return self._say(Verdict.VANISHING, since, names, 0.8)
        loss = self.loss
        if loss is None:
            return None
        tiny = bool(self.signals.shares) and max(share for _, share in self.signals.shares) < 1e-5
        if loss.is_above or (tiny and not loss.has_learned):
            first, last = readable(loss.first), readable(loss.last)
            words = say("The loss began at {first} and ended at {last}.", first=first, last=last)
            return self._say(Verdict.STALLED, int(self.signals.steps[0]), (), 0.6, words)
        return None


def _lost_losses(losses: Tensor) -> Tensor:
    """[k] bool: losses that were logged and not finite; where most steps have one, a NaN is a loss too."""
    known = ~losses.isnan()
    before = known.double().cumsum(0) - known.double()
    count = torch.arange(len(losses), dtype=torch.float64)
    return losses.isinf() | (~known & (before >= 0.9 * count) & (count >= 4))


def _first_bad(signals: Signals) -> int | None:
    """The first row at which something was not finite, a loss scale's overflows left out."""
    bad = (signals.nonfinite | _lost_losses(signals.losses)).nonzero().flatten().tolist()
    reasons, steps = signals.skips, signals.steps
    return next((row for row in bad if reasons.get(int(steps[row])) is not SkipReason.LOSS_SCALE), None)


def _loss(signals: Signals) -> _Loss | None:
    losses = signals.losses
    known = torch.isfinite(losses)
    if int(known.sum()) < 2:
        return None
    bad = _lost_losses(losses)
    values, steps = losses[known], signals.steps[known]
    width = min(TAIL, max(1, len(values) // 4))
    first = float(values[0])
    changes = values.diff().abs()
    noise = float(changes[: max(1, 3 * len(changes) // 4)].median()) if len(changes) else 0.0
    levels = values.unfold(0, width, 1).median(dim=1).values
    best = int(levels.argmin())
    last = float(levels[-1]) if len(values) < 3 * TAIL else float(values[-TAIL:].median())
    is_finite = not bool(bad[-1])
    lowest = float(levels[best])
    left = _left(values, best, lowest, last, noise)
    if left is None:
        onset = None if is_finite else int(signals.steps[bad][0])
        return _Loss(first, lowest, last, noise, onset, is_finite)
    before, after = values[max(0, left - TAIL) : left], values[left : left + TAIL]
    jump = float(after.median() - before.median()) if len(before) else math.inf
    return _Loss(first, lowest, last, noise, int(steps[left]), is_finite, jump > 0.5 * (last - lowest))


def _left(values: Tensor, best: int, lowest: float, last: float, noise: float) -> int | None:
    """The first row after the best stretch from which on the loss is above it for good; None where it is not."""
    if not last - lowest > _NOISE * noise:
        return None
    middle = lowest + 0.4 * (last - lowest)
    lower = (values[best:] <= middle).nonzero().flatten()
    after = best + (int(lower[-1]) + 1 if len(lower) else 0)
    # Single batches that happen to fit do not bring a loss back: the last of a few is not the last of many.
    spans = (values[best:].unfold(0, min(5, len(values) - best), 1).median(dim=1).values <= middle).nonzero()
    stay = best + (int(spans[-1]) + min(5, len(values) - best) // 2 + 1 if len(spans) else 0)
    row = min(after, stay)
    while row < len(values) - 1 and float(values[row]) <= middle:
        row += 1
    return row if row < len(values) else None
