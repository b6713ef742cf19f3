"""The one verdict on a run, from everything that was recorded of it: the loss first, for it is what training is for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from gradkeel.explain import renewals
from gradkeel.explain.events import CALM_ROWS
from gradkeel.explain.losses import TAIL, had_loss, level, loss_course, not_finite
from gradkeel.explain.signs import EARLY, Sign, Signals
from gradkeel.explain.weights import LARGE
from gradkeel.guard import SkipReason
from gradkeel.language import count, readable, say

HIDDEN = 0.01
"""Clipping that multiplies by less than this hides what the gradients do."""
_STEPS, _GREW = 0.04, 10.0
"""Steps of less than this share of all weights, while gradients grow by less than that, do not make a loss rise."""
_NOTHING = 1e-9  # of the first gradient
_UNSURE = 0.5  # how sure one is of a run that is healthy if its objective moves


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
        cause: what did it, where that is known: of `AutopsyResult.cause`, or "initialization", "loss_scale",
            "weights_changed", "second_moment_lag"; else None.
    """

    verdict: Verdict
    onset: int | None
    where: tuple[str, ...]
    confidence: float
    missing: tuple[str, ...]
    reasons: tuple[str, ...]
    cause: str | None = None


def judge(signals: Signals) -> Diagnosis:
    """The verdict on a run."""
    return _Judge(signals).verdict()


class _Judge:
    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        skips = map(signals.skips.get, signals.steps.tolist())
        counts = torch.tensor([w is not SkipReason.LOSS_SCALE for w in skips], dtype=torch.bool, device="cpu")
        # Where gradients are not finite to the end, and no loss was logged any more, it was not finite either.
        to_end = (counts & signals.nonfinite).flip(0).long().cumprod(0).flip(0).bool()
        losses = signals.losses.masked_fill(to_end & signals.losses.isnan(), math.inf)
        had = had_loss(signals.steps, losses, signals.skips)
        self.loss = loss_course(signals.steps[had], losses[had])
        bad = signals.nonfinite.clone()
        bad[had] |= not_finite(losses[had])
        self.reasons: list[str] = []
        self._are_small = bool(signals.shares) and all(share <= _STEPS for _, share in signals.shares)
        self._moves_by_itself = len(signals.renewals) >= renewals.AGAIN or (
            self.loss is not None and (self.loss.is_restless or self.loss.is_surrogate)
        )
        self._recurring = self._usual()
        usual = set(self._recurring)
        self._signs = [sign for sign in signals.signs if sign not in usual]
        self._candidates = [sign for sign in signals.signs if sign.renews or sign not in usual]
        self._first_bad: int | None = next(iter((bad & counts).nonzero().flatten().tolist()), None)
        self._is_moved = self._objective_moves()

    def _usual(self) -> list[Sign]:
        """Signs that recur at small steps, or that are what was asked anew, where the loss is no worse for them."""
        s, loss = self.signals, self.loss
        recurring = [sign for sign in s.signs if self._are_small and (sign.recurs or sign.renews)]
        if not recurring or loss is None:
            return recurring
        first = int(torch.searchsorted(s.steps, recurring[0].step))
        return [] if not self._moves_by_itself and loss.is_worse_since(s.losses, first) else recurring

    def verdict(self) -> Diagnosis:
        """The first of these that holds."""
        for ask in (
            self._born_bad, self._from_start, self._not_finite, self._lost, self._died, self._spiked, self._idle,
        ):  # fmt: skip
            found = ask()
            if found is not None:
                return found
        return self._healthy(0.9)

    def _healthy(self, confidence: float, *reasons: str) -> Diagnosis:
        """Nothing that is no part of how the run goes."""
        often = [sign for sign in self._recurring if sign.recurs]
        confidence = min(confidence, _UNSURE if self._recurring else 1.0)
        if self.signals.renewals and confidence == _UNSURE:
            reasons = (renewals.words(self.signals.renewals), *reasons)
        if often:
            words = say(
                "From step {first} to step {last} the gradient norm or the loss left its past {n} times and came back "
                "each time, and no step was large: that is how this run goes, as in reinforcement learning, or its "
                "data.", first=often[0].step, last=often[-1].step, n=len(often),
            )  # fmt: skip
            reasons = (*reasons, words)
        return self._say(Verdict.HEALTHY, None, (), confidence, *reasons)

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

    def _objective_moves(self) -> bool:
        """Whether the loss rose by itself, and not by what training did to the weights.

        A step that raises its own loss is a large part of the weights, or the gradients grow with the loss. Where
        neither is so, a loss that rises and never fell, or that slowly comes back, is one whose objective moves: an
        agent that meets more, two networks that play against each other. One that had fallen and jumps met other data,
        unless it is a surrogate or what is asked was renewed again and again; and one that jumps where norms or weights
        do was moved by that.
        """
        s, loss = self.signals, self.loss
        if loss is None or not loss.is_finite or not self._are_small:
            return False
        near = None if loss.left is None else self._nearest(loss.left)
        fell = loss.has_fallen and not self._moves_by_itself
        if fell and (loss.is_sudden or not loss.is_back or near):
            return False
        if loss.is_sudden and near and near.kind != "loss" and near in self._signs:
            return False
        if any(
            not sign.is_over and not (self._moves_by_itself and sign.kind == "loss") for sign in self._signs
        ):
            return False
        row = len(s.steps) if loss.left is None else int(torch.searchsorted(s.steps, loss.left))
        before = max(level(s.totals[: max(1, row)]), level(s.totals[: 2 * TAIL]))
        return not level(s.totals[-2 * TAIL :]) > _GREW * before

    # ---- not a number ----------------------------------------------------------------------------------------------

    def _born_bad(self) -> Diagnosis | None:
        """Non-finite out of calm, and after no update that was far too large."""
        return self._not_finite() if self._overwrites(until=self._first_bad) is None else None

    def _not_finite(self) -> Diagnosis | None:
        """Non-finite out of calm: nothing rose before it."""
        row = self._first_bad
        if row is None or self._rose_before(row):
            return None
        step = int(self.signals.steps[row])
        where = next((sign.where for sign in self.signals.signs if sign.step == step), ())
        words = say("All gradients were hit at once: it came with the loss, or the batch.")
        if math.isfinite(self.signals.losses[row]):
            words = say(
                "All gradients were hit at once, and the loss was finite: it came with the start of backward, with "
                "another clip, which makes all NaN where one is, or from another rank."
            )
        if where:
            words = say(
                "It began in {parameter}: backward runs from the end, and was finite until there.",
                parameter=where[0],
            )
        first = say("At step {step} the first number was not finite.", step=step)
        return self._say(Verdict.NON_FINITE, step, where, 0.95, first, words)

    def _rose_before(self, row: int) -> bool:
        """Whether norm or loss had left their past before a row, so that it only ends what had begun."""
        totals, last = self.signals.totals, max(0, row - 3)
        parts = totals[max(0, row - 32) : last], totals[last:row]
        past, now = (part[torch.isfinite(part)] for part in parts)
        if not len(past):
            return len(now) > 1 and float(now.max()) > 10 * float(totals[0])
        return len(now) > 0 and float(now.max()) > 30 * float(past.median())

    # ---- far too large steps -----------------------------------------------------------------------------------------

    def _overwrites(self, until: int | None = None) -> int | None:
        """The first step whose update was a large part of all weights."""
        last = math.inf if until is None else int(self.signals.steps[until])
        return next(
            (step for step, share in self.signals.shares if step <= last and not share <= LARGE), None
        )

    def _from_start(self) -> Diagnosis | None:
        """A run that never trained, or stopped to in its warm-up, because its steps were too large."""
        s, loss = self.signals, self.loss
        if self._is_moved:
            return None
        large = self._overwrites()
        warmup = self.signals.warmup_end()
        early = max(EARLY, warmup or 0)
        first = int(s.steps[0]) if len(s.steps) else 0
        if loss is None:
            began = [sign for sign in s.signs if sign.kind == "initialization" and not sign.is_over]
            bad = large is not None and large - first < early and bool(began)
        else:
            left = loss.left if loss.left is not None and loss.left - first < early + EARLY else None
            if left is None and loss.left is not None and loss.had_learned:
                return None  # it trained until then
            failed = loss.is_clearly_above or (warmup and loss.is_lost and left is not None)
            tells = large is not None and len(s.steps) >= EARLY  # of fewer steps, each may be as large
            failed = failed or ((not loss.has_learned or self._collapsed()) and tells)
            bad = bool(failed) and (left is not None or (large is not None and large - first < early))
            large = min((step for step in (large, left) if step is not None), default=None) if bad else large
        if not bad or large is None:
            return None
        larger = [one for one in s.larger if one[1] <= large + 3]
        where = [name for name, *_ in larger]
        near = next((one for one in larger if one[1] >= large - EARLY), None)
        if near is not None:
            name, step, ratio = near
            self.reasons.append(say(
                "At step {step} the update of {name} was {times} times its weights.",
                step=step, name=name, times=readable(ratio),
            ))  # fmt: skip
        verdict = Verdict.DIVERGED_IN_WARMUP if warmup and large > first else Verdict.DIVERGED_FROM_START
        return self._diverged(verdict, large, where)

    def _collapsed(self) -> bool:
        """Whether hardly any gradient was left after the first steps, of whatever loss."""
        totals = self.signals.totals
        return bool((totals[1:EARLY] < _NOTHING * totals[:1]).any())

    def _diverged(self, verdict: Verdict, onset: int, where: Sequence[str]) -> Diagnosis:
        """A divergence, under the name that clipping gives it where it hides it."""
        s, loss = self.signals, self.loss
        row = int(torch.searchsorted(s.steps, onset))
        hidden = float((s.coefficients[row:] < HIDDEN).double().mean()) if row < len(s.steps) else 0.0
        if loss is not None:
            last = readable(loss.last) if loss.is_finite else say("not finite")
            self.reasons.append(say(
                "The loss began at {first}, was {best} at best, and ended at {last}."
                if loss.best < loss.first
                else "The loss began at {first} and ended at {last}.",
                first=readable(loss.first), best=readable(loss.best), last=last,
            ))  # fmt: skip
        if hidden > 0.5:
            verdict = Verdict.CLIPPING_HIDES_DIVERGENCE
            self.reasons.append(say(
                "In {share:.0%} of the steps since, clipping multiplied by less than {limit:g}.",
                share=hidden, limit=HIDDEN,
            ))  # fmt: skip
        return self._say(verdict, onset, where, 0.9 if loss is not None else 0.7)

    # ---- later ---------------------------------------------------------------------------------------------------

    def _nearest(self, step: int | None) -> Sign | None:
        """What the norms or weights showed at about this step."""
        near = [
            sign
            for sign in self._candidates
            if step is None or -10 <= step - sign.step <= 30 or (sign.lasts and sign.step <= step)
        ]
        return min(near, key=lambda sign: abs(sign.step - (step or sign.step)), default=None)

    def _lost(self) -> Diagnosis | None:
        """The loss ended above its beginning, or far above its best."""
        loss = self.loss
        if loss is None or self._is_moved or not (loss.is_clearly_above or loss.is_lost):
            return None
        sign = self._nearest(loss.left)
        onset = sign.step if sign else loss.left
        if onset is None or not (sign or loss.is_sudden or loss.is_clearly_above):
            return None  # a slow rise within what it had gained
        where = sign.where if sign else ()
        if sign and sign.kind == "drift":
            return self._say(Verdict.DRIFT, onset, where, 0.8)
        if loss.is_clearly_above:
            return self._diverged(Verdict.DIVERGED, onset, where)
        self.reasons.append(say(
            "The loss was {best} at best, and ended at {end}: it did not come back.",
            best=readable(loss.best), end=readable(loss.last),
        ))  # fmt: skip
        return self._say(Verdict.SPIKE_UNRECOVERED, onset, where, 0.85 if sign else 0.7)

    def _spiked(self) -> Diagnosis | None:
        """What the norms and weights showed, in a run whose loss is sound, or not known."""
        signs = [sign for sign in self._signs if not (self._is_moved and sign.kind == "loss")]
        if not signs:
            return None
        faults = [sign for sign in signs if sign.kind != "overflow"]
        if not faults:
            return self._say(Verdict.LOSS_SCALE_OVERFLOW, signs[0].step, signs[0].where, 0.9)
        sign = next((one for one in faults if not one.is_over), faults[0])
        if sign.kind == "drift":
            return self._say(Verdict.DRIFT, sign.step, sign.where, 0.7)
        if self._is_worse_since(sign.step):
            return self._say(Verdict.SPIKE_UNRECOVERED, sign.step, sign.where, 0.7)
        is_told = self.loss is not None and not sign.is_over
        if is_told and sign.step > int(self.signals.steps[-1]) - CALM_ROWS:
            words = say("The record ends with it: whether it comes back is not known.")
            return self._say(Verdict.SPIKE_RECOVERED, sign.step, sign.where, _UNSURE, words)
        if sign.is_over or self.loss is not None:
            return self._say(Verdict.SPIKE_RECOVERED, sign.step, sign.where, 0.8)
        initial = sign.kind == "initialization"
        verdict = Verdict.DIVERGED_FROM_START if initial else Verdict.DIVERGED
        return self._diverged(verdict, sign.step, sign.where)

    def _is_worse_since(self, step: int) -> bool:
        """Whether the loss, after an event, ended higher than before it."""
        s, loss = self.signals, self.loss
        if loss is None or (self._is_moved and not loss.has_fallen):
            return False
        return loss.is_worse_since(s.losses, int(torch.searchsorted(s.steps, step)))

    def _died(self) -> Diagnosis | None:
        """Most weights get no gradient any more, and did before: what they were was overwritten."""
        s, loss = self.signals, self.loss
        if not s.hardly or 2 * len(s.hardly) < s.weights or (loss is not None and loss.has_learned):
            return None
        since, early = min(step for _, step in s.hardly), self._overwrites()
        first, warmup = int(s.steps[0]), self.signals.warmup_end()
        if early is None and warmup and first < since <= warmup + EARLY:
            early = since
        if early is None:
            return None
        onset = min(early, since)
        where = [name for name, step, _ in s.larger if step <= onset + 3]
        self.reasons.append(count(
            len(s.hardly),
            "{n} of {weights} hardly learns since about step {step}.",
            "{n} of {weights} hardly learn since about step {step}.",
            weights=count(s.weights, "{n} weight", "{n} weights"), step=since,
        ))  # fmt: skip
        if warmup and first < onset <= warmup + EARLY:
            return self._diverged(Verdict.DIVERGED_IN_WARMUP, onset, where)
        is_early = onset - first < EARLY
        return self._diverged(Verdict.DIVERGED_FROM_START if is_early else Verdict.DIVERGED, onset, where)

    def _idle(self) -> Diagnosis | None:
        """Nothing happened, and in part nothing was learned."""
        if self.signals.hardly:
            names, steps = zip(*self.signals.hardly, strict=True)
            return self._say(Verdict.VANISHING, min(steps), names, 0.8)
        loss = self.loss
        if loss is None:
            return None
        if loss.is_surrogate and self._is_moved:
            words = say(
                "The loss began at 0, or was positive and negative again and again, as that of a policy gradient: "
                "its level says nothing of the training, and steps were small.",
            )
            return self._healthy(_UNSURE, words)
        if self._moves_by_itself and loss.is_lost and self._is_moved:
            words = say(
                "The loss was {best} at best, and ended at {end}, but it had jumped up like that before, and steps "
                "were small: its objective moves, as in games between networks and in reinforcement learning, or the "
                "data did.",
                best=readable(loss.best), end=readable(loss.last),
            )  # fmt: skip
            return self._healthy(_UNSURE, words)
        tiny = bool(self.signals.shares) and max(share for _, share in self.signals.shares) < 1e-5
        above = not loss.is_finite or loss.last > loss.first
        first, last = readable(loss.first), readable(loss.last)
        if above and self._is_moved and (loss.has_fallen or loss.has_wandered):
            words = say(
                "The loss began at {first} and ended at {last}, but steps were small and gradients did not grow "
                "with it: its objective moves, as in games between networks and in reinforcement learning, or the "
                "data did.",
                first=first, last=last,
            )  # fmt: skip
            return self._healthy(_UNSURE, words)
        if above or (tiny and not loss.has_learned):
            words = say("The loss began at {first} and ended at {last}.", first=first, last=last)
            return self._say(Verdict.STALLED, int(self.signals.steps[0]), (), 0.6, words)
        return None
