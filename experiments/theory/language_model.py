"""R5, R6, R9 and R10: the claims of the ICLR 2020 paper on a character LSTM that trains in seconds."""

import math
import statistics

from gradkeel.compare.engine import compare
from gradkeel.compare.plan import Plan
from gradkeel.compare.run import Run
from gradkeel.compare.smoothness import ProbedRun, probed_run
from gradkeel.compare.task import load_task
from gradkeel.explain.smoothness.fit import fit_smoothness

from experiments.theory.experiment import Outcome, Series, experiment

TASK = "char-lstm"
CLIPPED = "global-norm:0.25"
STEPS = 200
RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
SEEDS = 5
PRODUCTS = (1.0, 2.0, 4.0, 8.0, 16.0)
PRODUCT_RATES = (8.0, 16.0, 32.0)

_probed: dict[tuple[str, float, int], ProbedRun] = {}


def probed(policy: str, lr: float, seed: int) -> ProbedRun:
    """A probed run of the task; each is trained once in a process."""
    key = policy, lr, seed
    if key not in _probed:
        _probed[key] = probed_run(load_task(TASK), policy=policy, lr=lr, seed=seed, steps=STEPS)
    return _probed[key]


def _trained(policies: tuple[str, ...], rates: tuple[float, ...], seeds: int) -> tuple[Run, ...]:
    return compare(Plan(TASK, policies, rates, tuple(range(seeds)), STEPS)).runs


def _correlation(run: ProbedRun, *, after: int) -> float:
    kept = [m for m in run.measurements if m.resolved and (m.step or 0) > after]
    return fit_smoothness([m.norm for m in kept], [m.smoothness for m in kept]).correlation


def _points(run: ProbedRun) -> Series:
    return {
        "norm": [m.norm for m in run.measurements],
        "smoothness": [m.smoothness for m in run.measurements],
        "step": [float(m.step or 0) for m in run.measurements],
    }


@experiment(
    "R5",
    "Smoothness grows with the gradient norm in clipped training of a language model",
    "log-log r > 0.7, slope 0.7 to 1.4, each of 2 seeds",
    quick=False,
)
def relation() -> Outcome:
    """char-lstm, lr 16, bound 0.25. Over seeds 0 to 5 r lies between 0.66 and 0.81."""
    runs = [probed(CLIPPED, 16.0, seed) for seed in (0, 1)]
    fits = [run.fit for run in runs]
    shown = "; ".join(f"r = {fit.correlation:.2f}, slope {fit.slope:.2f}" for fit in fits)
    passed = all(fit.correlation > 0.7 and 0.7 <= fit.slope <= 1.4 for fit in fits)
    return Outcome(shown, passed, _points(runs[0]))


@experiment(
    "R6",
    "Without clipping and with small steps the relation is weak",
    "r < 0.45 over the full run, and below R5",
    quick=False,
)
def weak_relation() -> Outcome:
    """char-lstm, lr 0.5 and 2, no clipping, 2 seeds each; and the same without the first 20 steps, for comparison."""
    runs = {(lr, seed): probed("none", lr, seed) for lr in (0.5, 2.0) for seed in (0, 1)}
    clipped = min(probed(CLIPPED, 16.0, seed).fit.correlation for seed in (0, 1))
    shown = ", ".join(f"{run.fit.correlation:.2f} (lr {lr:g})" for (lr, _), run in runs.items())
    later = ", ".join(f"{_correlation(run, after=20):.2f}" for run in runs.values())
    highest = max(run.fit.correlation for run in runs.values())
    return Outcome(
        f"r = {shown}; R5: {clipped:.2f} or more; after step 20: {later}",
        highest < 0.45 and highest < clipped,
        _points(runs[2.0, 0]),
    )


@experiment(
    "R9",
    "The best clipped learning rate beats the best unclipped one",
    f"final loss lower in every one of {SEEDS} seeds",
    quick=False,
)
def best_rates() -> Outcome:
    """char-lstm, 200 steps, lr 1 to 32 with and without clipping; a diverged run counts as infinite."""
    runs = _trained(("none", CLIPPED), RATES, SEEDS)
    final = {(r.policy, r.lr, r.seed): math.inf if r.diverged else r.final_loss for r in runs}
    best = {
        (policy, seed): min(final[policy, lr, seed] for lr in RATES)
        for policy in ("none", CLIPPED)
        for seed in range(SEEDS)
    }
    lost = [seed for seed in range(SEEDS) if not best[CLIPPED, seed] < best["none", seed]]
    exploded = sum(math.isinf(final["none", 16.0, seed]) for seed in range(SEEDS))
    shown = {p: sorted(best[p, seed] for seed in range(SEEDS)) for p in ("none", CLIPPED)}
    series: dict[str, list[float]] = {"lr": list(RATES)}
    for policy, name in (("none", "unclipped"), (CLIPPED, "clipped")):
        series[name] = [statistics.median(final[policy, lr, seed] for seed in range(SEEDS)) for lr in RATES]
    return Outcome(
        f"clipped {shown[CLIPPED][0]:.2f} to {shown[CLIPPED][-1]:.2f}, unclipped {shown['none'][0]:.2f} to "
        f"{shown['none'][-1]:.2f}; lower in {SEEDS - len(lost)} of {SEEDS} seeds; unclipped lr 16 diverges in "
        f"{exploded} of {SEEDS}",
        not lost,
        series,
    )


@experiment(
    "R10",
    "lr * bound is what one tunes: when you halve the learning rate, double the bound",
    "best lr * bound at lr 8, 16, 32 the same within 2 x",
    quick=False,
)
def invariant_product() -> Outcome:
    """char-lstm, bounds such that lr * bound is 1, 2, 4, 8, 16 at each learning rate, 3 seeds; median final loss."""
    series: dict[str, list[float]] = {"lr * bound": list(PRODUCTS)}
    best = {}
    for lr in PRODUCT_RATES:
        policies = tuple(f"global-norm:{product / lr!r}" for product in PRODUCTS)
        runs = _trained(policies, (lr,), 3)
        losses = [
            statistics.median(math.inf if r.diverged else r.final_loss for r in runs if r.policy == policy)
            for policy in policies
        ]
        series[f"lr {lr:g}"] = losses
        best[lr] = PRODUCTS[losses.index(min(losses))]
    shown = ", ".join(f"{product:g} at lr {lr:g}" for lr, product in best.items())
    return Outcome(f"best {shown}", max(best.values()) <= 2 * min(best.values()), series)
