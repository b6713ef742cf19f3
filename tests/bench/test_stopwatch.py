"""The stopwatch: everybody is prepared, checked and timed alike, and ratios are taken round by round."""

import gc
import itertools

import pytest

from gradkeel.bench import Contender, race
from gradkeel.bench.stopwatch import AGAIN, Race, quartiles


@pytest.fixture
def clock(monkeypatch):
    """Time passes when a contender says so."""
    now = [0.0]
    monkeypatch.setattr("gradkeel.bench.stopwatch.time.perf_counter", lambda: now[0])
    return now


def lasting(clock, name, *seconds, **options):
    lengths = itertools.cycle(seconds)

    def run():
        clock[0] += next(lengths)

    return Contender(name, run, **options)


def test_times_and_ratios_are_of_what_ran(clock):
    found = race([lasting(clock, "slow", 4.0), lasting(clock, "fast", 1.0)], rounds=7)
    assert found.baseline == "slow"
    assert {name: set(times) for name, times in found.seconds.items()} == {
        "slow": {4.0},
        "fast": {1.0},
        "slow" + AGAIN: {4.0},
    }
    assert found.time("fast").median == 1.0
    assert found.ratio("fast").median == 0.25
    assert found.ratio("slow", "fast").median == 4.0
    assert found.control.median == 1.0


def test_ratios_are_paired_within_a_round():
    found = Race("a", {"a": (1.0, 10.0, 100.0), "b": (2.0, 20.0, 200.0)}, {}, {})
    assert found.ratio("b") == quartiles([2.0, 2.0, 2.0])


def test_preparing_is_not_timed_and_happens_before_each_run(clock):
    events = []

    def prepare():
        events.append("prepare")
        clock[0] += 100.0

    def run():
        events.append("run")
        clock[0] += 1.0

    found = race([Contender("one", run, prepare)], rounds=5)
    assert set(found.seconds["one"]) == {1.0}
    assert events == ["prepare", "run"] * (len(events) // 2)
    assert len(events) // 2 == 2 * (1 + 2 + 5)  # with its control: the first run, the warm-up, the rounds


def test_waiting_for_an_accelerator_is_timed(clock):
    def synchronize():
        clock[0] += 3.0

    found = race([lasting(clock, "one", 1.0)], rounds=5, synchronize=synchronize)
    assert set(found.seconds["one"]) == {4.0}


def test_what_a_contender_leaves_is_checked_before_it_is_timed(clock):
    events = []
    contender = Contender("one", lambda: events.append("run"), error=lambda: events.append("error") or 0.5)
    assert race([contender], rounds=5).errors == {"one": 0.5}
    assert events[:2] == ["run", "error"]
    assert events.count("error") == 1


def test_the_order_is_another_in_each_round_and_the_same_for_a_seed(clock):
    def orders(seed):
        events = []
        race(
            [Contender(name, lambda name=name: events.append(name)) for name in "abc"],
            rounds=20,
            warmup=0,
            seed=seed,
        )
        rounds = events[4:]
        return [tuple(rounds[i : i + 4]) for i in range(0, 80, 4)]

    assert len(set(orders(0))) > 5
    assert orders(0) == orders(0)
    assert all(sorted(order) == ["a", "a", "b", "c"] for order in orders(1))


def test_a_limit_of_time_leaves_five_rounds(clock):
    found = race([lasting(clock, "one", 10.0)], rounds=100, seconds=1.0)
    assert len(found.seconds["one"]) == 5
    assert len(race([lasting(clock, "one", 1.0)], rounds=100, seconds=31.0).seconds["one"]) == 16


def test_the_garbage_collector_is_off_while_the_clock_runs_and_on_afterwards():
    seen = []
    race([Contender("one", lambda: seen.append(gc.isenabled()))], rounds=5, warmup=0)
    assert seen == [True] * 2 + [False] * 10
    assert gc.isenabled()


def test_the_garbage_collector_is_on_after_an_error():
    calls = itertools.count()

    def run():
        if next(calls) > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race([Contender("one", run)], rounds=5, warmup=0)
    assert gc.isenabled()


def test_names_are_needed():
    with pytest.raises(ValueError, match="names of their own"):
        race([Contender("one", list), Contender("one", list)])


def test_quartiles():
    assert quartiles([3.0]).high == 3.0
    found = quartiles([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
