"""A range of bounds, and which of them work."""

import math

import pytest

from compare_runs import EXPLODING, comparison, run
from gradkeel.compare import compare, make_plan
from gradkeel.compare.page import _bands
from gradkeel.compare.sweep import SweepPoint, parse_sweep, sweep_points
from gradkeel.errors import PolicySpecError


def points(groups, **other):
    """Regions by bound, of policies ``norm:BOUND`` whose runs are given."""
    runs = [one for group in groups.values() for one in group]
    result = comparison(runs, sweep=parse_sweep("norm:0.01..1000"), **other)
    return sweep_points(result.plan.sweep, result.runs)


def group(bound, *ends, start=100.0, clip_rate=0.5, lr=0.1):
    policy = f"norm:{bound:g}"
    return [run(policy, lr, s, (start, start, end), clip_rate=clip_rate) for s, end in enumerate(ends)]


def test_bounds_are_half_a_decade_apart():
    sweep = parse_sweep("global-norm:0.01..100")
    assert sweep.name == "global-norm"
    assert sweep.bounds == (0.01, 0.0316, 0.1, 0.316, 1, 3.16, 10, 31.6, 100)
    assert sweep.policies[1] == "global-norm:0.0316"
    assert {0.01, 1, 10, 100, 1e3} <= set(parse_sweep("norm:.01..1e3").bounds)


def test_a_short_range_has_five_bounds_and_options_stay():
    sweep = parse_sweep("global-norm:1..2,norm_type=inf,exclude=*.bias")
    assert len(sweep.bounds) == 5
    assert sweep.policies[0] == "global-norm:1,norm_type=inf,exclude=*.bias"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "norm",
        "norm:1",
        "norm:2..1",
        "norm:0..1",
        "norm:-1..1",
        "norm:a..b",
        "1..2",
        "norm:1..inf",
        "norm:1..nan",
    ],
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(PolicySpecError, match=r"two bounds above 0.*global-norm:0\.01\.\.100"):
        parse_sweep(text)


def test_regions_by_what_the_loss_did():
    found = points(
        {
            0.01: group(0.01, 90, 99, 95, clip_rate=1.0),
            1: group(1, 10, 11, 12, clip_rate=1.0),
            10: group(10, 60, 70, 80, clip_rate=0.2),
            100: group(100, 1, 2, 3, clip_rate=0.1),
            1000: [run("norm:1000", 0.1, s, EXPLODING) for s in range(3)],
        }
    )
    # At 10 the loss came down by less than half of what the best bound reached, with few steps clipped.
    assert [p.region for p in found] == ["too tight", "works", "too loose", "works", "too loose"]
    assert [p.bound for p in found] == [0.01, 1, 10, 100, 1000]
    assert found[4].final_loss == math.inf
    assert (found[4].diverged, found[4].runs) == (3, 3)
    assert (found[1].final_loss, found[1].lowest, found[1].highest) == (100, 100, 100)


def test_where_half_of_the_seeds_diverge_a_bound_does_not_work():
    mixed = [run("norm:1", 0.1, 0, (100, 5, 1)), run("norm:1", 0.1, 1, EXPLODING)]
    assert points({1: mixed})[0].region == "too loose"


def test_each_learning_rate_is_judged_by_itself():
    found = points(
        {
            1: [*group(1, 50, lr=0.1), *group(1, 1, lr=0.2)],
            10: [*group(10, 40, lr=0.1), *group(10, 99, lr=0.2)],
        }
    )
    assert [(p.lr, p.bound, p.region) for p in found] == [
        (0.1, 1, "works"), (0.1, 10, "works"), (0.2, 1, "works"), (0.2, 10, "too loose"),
    ]  # fmt: skip


def test_bands_join_neighbours_of_one_region_and_leave_no_gap():
    def at(bound, region):
        return SweepPoint("p", bound, 0.1, 1.0, 1.0, 1.0, 0, 1, region)

    bands = _bands([at(1, "works"), at(100, "works"), at(10000, "too loose"), at(1e6, "works")])
    assert [band.label for band in bands] == ["works", "too loose", "works"]
    assert [band.first for band in bands[1:]] == [band.last for band in bands[:-1]]
    assert (bands[0].first, bands[0].last, bands[-1].last) == pytest.approx((0.1, 1e3, 1e7))
    assert len(_bands([at(1, "works")])) == 1


def test_exploding_linear_has_more_than_one_range_that_works():
    # The medians of the final loss are about 4000, 0.8, 80, 1e-13 and 1e5: worse, better, worse, best, worst.
    policies = [f"norm:{bound:g}" for bound in (0.01, 1, 10, 100, 1000)]
    plan = make_plan("exploding-linear", policies=policies, seeds=9)
    runs = compare(plan, jobs=1).runs
    found = sweep_points(parse_sweep("norm:0.01..1000"), runs)
    assert [p.bound for p in found] == [0.01, 1, 10, 100, 1000]
    tight, one, ten, hundred, loose = (p.final_loss for p in found)
    assert 1e3 < tight < 1e4
    assert one < 2
    assert 10 < ten < 200
    assert hundred < 1e-6
    assert loose > 1e4
    assert [p.region for p in found] == ["too tight", "works", "works", "works", "too loose"]
