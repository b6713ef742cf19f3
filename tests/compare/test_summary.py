"""The table's rows."""

import math

import pytest

from compare_runs import EXPLODING, run
from gradkeel.compare import summarize
from gradkeel.compare.summary import best_runs, steps_to, volatility

INF, NAN = math.inf, math.nan


def test_each_policy_stands_at_its_own_best_learning_rate_and_the_best_comes_first():
    runs = [run("none", lr, seed, (4, 2, end)) for lr, end in ((1, 1.5), (2, 3)) for seed in range(3)]
    runs += [run("norm:1", lr, seed, (4, 2, end)) for lr, end in ((1, 2), (2, 1)) for seed in range(3)]
    rows = summarize(runs)
    assert [(row.policy, row.lr, row.loss) for row in rows] == [("norm:1", 2, 1), ("none", 1, 1.5)]


def test_a_policy_that_diverges_stands_last_and_is_counted_over_all_learning_rates():
    runs = [run("none", 0.1, seed, EXPLODING) for seed in range(3)]
    runs += [run("none", 0.2, 0, (4, 2, 1)), *(run("none", 0.2, seed, EXPLODING) for seed in (1, 2))]
    runs += [run("norm:1", 0.1, seed, (4, 2, 3)) for seed in range(3)]
    best, worst = summarize(runs)
    assert (best.policy, best.diverged, best.runs) == ("norm:1", 0, 3)
    assert (worst.policy, worst.loss, worst.lr) == ("none", INF, 0.2)
    assert (worst.diverged, worst.runs, worst.diverged_at_best, worst.runs_at_best) == (5, 6, 2, 3)
    assert (worst.lowest, worst.highest) == (1, 1)
    assert worst.steps_to_target == INF


def test_median_and_range_over_seeds():
    row = summarize([run("none", 0.1, seed, (9, 8, end)) for seed, end in enumerate((1, 2, 7))])[0]
    assert (row.loss, row.lowest, row.highest) == (2, 1, 7)
    even = summarize([run("none", 0.1, seed, (9, 8, end)) for seed, end in enumerate((1, 2, 5, 7))])[0]
    assert even.loss == 3.5
    half = [run("none", 0.1, 0, (9, 8, 1)), run("none", 0.1, 1, EXPLODING)]
    assert summarize(half)[0].loss == INF


def test_without_validation_the_final_loss_ranks_and_without_losses_nothing_does():
    assert summarize([run("none", losses=(4, 3, 2), validation_loss=None)])[0].loss == 3
    unknown = run("norm:1", losses=(), validation_loss=None)
    rows = summarize([run("none", losses=(), bad_step=4, validation_loss=None), unknown])
    assert [row.policy for row in rows] == ["norm:1", "none"]
    assert math.isnan(rows[0].loss)
    assert rows[1].loss == INF


def test_steps_to_a_target():
    falling = [10.0 - i for i in range(20)]
    # The median of losses 0 to 9 is 5.5; it falls by one with each further step.
    assert steps_to(falling, 5.5) == 9
    assert steps_to(falling, 4.0) == 11
    assert steps_to(falling, -50) == INF
    assert steps_to([1.0], 5) == INF
    given = summarize([run("none", losses=falling)], target_loss=4.0)[0]
    assert (given.steps_to_target, given.target_loss) == (11, 4.0)


def test_without_a_target_it_is_what_the_worst_that_trains_ends_at():
    runs = [run("none", losses=[5.0] * 20), run("norm:1", losses=[9.0] * 5 + [1.0] * 15)]
    rows = summarize([*runs, run("value:1", losses=EXPLODING)])
    assert {row.target_loss for row in rows} == {5.0}
    # The median of the first ten losses, five of them 9 and five 1, is 5.
    assert rows[0].steps_to_target == 9
    assert math.isnan(summarize([run("none", losses=EXPLODING)])[0].target_loss)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([9, 9, 2, 4, 2, 4], 0.6),
        ([5, 5, 5, 5], 0),
        ([1, 1], NAN),
        ([], NAN),
        ([1, 1, 1, INF], NAN),
        ([0] * 4, NAN),
    ],
)
def test_volatility_is_the_mean_change_in_the_second_half_relative_to_the_mean(losses, expected):
    assert volatility(losses) == pytest.approx(expected, nan_ok=True)


def test_volatility_is_of_runs_that_did_not_diverge():
    runs = [run("none", seed=0, losses=(4, 2, 2, 2)), run("none", seed=1, losses=(1, 50, 2, 60))]
    assert summarize(runs)[0].volatility == 0
    assert math.isnan(summarize(runs[1:])[0].volatility)


def test_clip_rate_and_time_are_medians():
    runs = [run("norm:1", seed=i, clip_rate=i / 10, seconds_per_step=i) for i in range(3)]
    assert (summarize(runs)[0].clip_rate, summarize(runs)[0].seconds_per_step) == (0.1, 1)


def test_best_runs_are_in_the_order_of_seeds():
    runs = [run("none", 0.1, seed) for seed in (2, 0, 1)]
    assert [one.seed for one in best_runs(runs, "none")] == [0, 1, 2]
