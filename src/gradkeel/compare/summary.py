"""From runs to a table: one row a policy, at its own best learning rate."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gradkeel.compare.run import TAIL, Run


@dataclass(frozen=True)
class Row:
    """One policy at its best learning rate: the one with the lowest median score over seeds.

    Attributes:
        policy, lr: which.
        loss: median over seeds of the score (validation loss, else final loss), a diverged run counting as inf; NaN
            where a script logs no loss.
        lowest, highest: range of the score over the seeds that did not diverge; NaN where all did.
        diverged, runs: how many runs of the policy diverged, of how many, over all learning rates.
        diverged_at_best, runs_at_best: the same at ``lr``.
        clip_rate: median share of steps that were clipped.
        steps_to_target: median over seeds of the first step at which the median of the last ten losses is at or
            below ``target_loss``, inf for seeds that never are.
        target_loss: the task's, or the final loss of the last policy in the table that trains; NaN without one.
        volatility: median over seeds of the mean step-to-step change of the loss, relative to the mean loss, over the
            second half of the run; NaN where all diverged.
        seconds_per_step: median over the runs.
    """

    policy: str
    lr: float | None
    loss: float
    lowest: float
    highest: float
    diverged: int
    runs: int
    diverged_at_best: int
    runs_at_best: int
    clip_rate: float
    steps_to_target: float
    target_loss: float
    volatility: float
    seconds_per_step: float


def summarize(runs: Sequence[Run], target_loss: float | None = None) -> list[Row]:
    """The table's rows, best first; policies all of whose runs diverged stand last."""
    policies = dict.fromkeys(run.policy for run in runs)
    best = {policy: best_runs(runs, policy) for policy in policies}
    if target_loss is None:
        # What every policy that trains gets to: the worst of their final losses.
        trained = [chosen for chosen in best.values() if math.isfinite(_score(chosen))]
        ends = [_median_score([run.final_loss for run in chosen]) for chosen in trained]
        target_loss = max(ends, default=math.nan)
    rows = [
        _row(best[policy], [run for run in runs if run.policy == policy], target_loss) for policy in policies
    ]
    return sorted(rows, key=lambda row: (_place(row.loss), row.diverged_at_best / row.runs_at_best))


def best_runs(runs: Sequence[Run], policy: str) -> list[Run]:
    """The runs of ``policy`` at its best learning rate, by seed."""
    by_lr: dict[float | None, list[Run]] = {}
    for run in runs:
        if run.policy == policy:
            by_lr.setdefault(run.lr, []).append(run)
    chosen = min(by_lr.values(), key=lambda group: (_place(_score(group)), _diverged(group)))
    return sorted(chosen, key=lambda run: run.seed)


def steps_to(losses: Sequence[float], target: float) -> float:
    """Updates made until the median of the last ten losses is at or below ``target``; inf if it never is."""
    for end in range(TAIL, len(losses) + 1):
        if statistics.median(losses[end - TAIL : end]) <= target:
            return float(end - 1)
    return math.inf


def volatility(losses: Sequence[float]) -> float:
    """Mean ``|loss[i + 1] - loss[i]|`` over the second half, relative to the mean loss there."""
    half = losses[len(losses) // 2 :]
    mean = statistics.fmean(half) if half else math.nan
    if len(half) < 2 or not math.isfinite(mean) or mean == 0:
        return math.nan
    return statistics.fmean(abs(b - a) for a, b in itertools.pairwise(half)) / abs(mean)


def _row(chosen: Sequence[Run], every: Sequence[Run], target: float) -> Row:
    kept = [run.score for run in chosen if math.isfinite(run.score)]
    calm = [value for run in chosen if not run.diverged and not math.isnan(value := volatility(run.losses))]
    return Row(
        policy=chosen[0].policy,
        lr=chosen[0].lr,
        loss=_score(chosen),
        lowest=min(kept, default=math.nan),
        highest=max(kept, default=math.nan),
        diverged=_diverged(every),
        runs=len(every),
        diverged_at_best=_diverged(chosen),
        runs_at_best=len(chosen),
        clip_rate=statistics.median(run.clip_rate for run in chosen),
        steps_to_target=_median_score([steps_to(run.losses, target) for run in chosen]),
        target_loss=target,
        volatility=statistics.median(calm) if calm else math.nan,
        seconds_per_step=statistics.median(run.seconds_per_step for run in every),
    )


def _diverged(runs: Sequence[Run]) -> int:
    return sum(run.diverged for run in runs)


def _score(runs: Sequence[Run]) -> float:
    return _median_score([run.score for run in runs])


def _median_score(values: Sequence[float]) -> float:
    """Median of finite values, then unknown ones (NaN), then inf, in this order; no mean is taken across kinds."""
    ordered = sorted(values, key=_place)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return (low + high) / 2 if math.isfinite(high) else high


def _place(value: float) -> tuple[int, float]:
    return (0, value) if math.isfinite(value) else (1 if math.isnan(value) else 2, 0.0)
