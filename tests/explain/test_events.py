"""Where an event begins and ends, on norms whose right answer is known to the step."""

import math

import pytest
import torch

from gradkeel.explain import explain
from scripted import scripted_run

CALM = 300


def series(steps=CALM, **at):
    """Norms of 1, but for those given: ``s121=5.0``."""
    norms = torch.ones(steps, dtype=torch.float64)
    for step, norm in at.items():
        norms[int(step[1:]) - 1] = norm
    return norms


def waves(steps=CALM):
    """Norms that change between 1 and 10^0.2: a median of 1, and a robust deviation of 1.4826 * 0.2 * (1 + 8/32)."""
    return 10 ** (0.2 * (torch.arange(steps, dtype=torch.float64) % 2))


def found(path, norms, **options):
    return explain(scripted_run(path, norms, **options))


def steps_of(explanation):
    return [(event.step, event.last_step) for event in explanation.events]


@pytest.mark.parametrize(
    ("norms", "events"),
    [
        (series(s121=2.9), []),  # less than three times the usual
        (series(s121=3.1), [(121, 121)]),
        (series(s100=2.9, s150=4.3), []),  # less than half as high again as 50 steps before
        (series(s100=2.9, s150=4.4), [(150, 150)]),
        (series(s100=2.9, s250=4.3), [(250, 250)]),  # and more than 128 steps later that is forgotten
        (series(s8=50.0), []),  # before there is a past, only a hundred times the first norm is an alarm
        (series(s9=50.0), [(9, 9)]),  # eight steps are a past
        (series(s5=99.0), []),
        (series(s5=101.0), [(5, 5)]),
        (series(s100=9.0, s121=20.0), [(100, 121)]),  # 20 steps after the first was over: one event
        (series(s100=9.0, s122=20.0), [(100, 100), (122, 122)]),
        (series(s100=9.0, s101=2.1, s102=2.1), [(100, 102)]),  # it is over at twice the usual
        (series(s100=9.0, s101=1.9, s102=1.9), [(100, 100)]),
        (series(s104=1.5, s105=2.0, s106=2.9, s107=9.0), [(104, 107)]),  # the climb belongs to it
        (series(s104=1.3, s105=2.0, s106=2.9, s107=9.0), [(105, 107)]),
        (series(s100=9.0, s103=2.5, s106=2.5), [(100, 106)]),  # not five calm steps in a row
        (series(s100=9.0, s106=2.5), [(100, 100)]),
    ],
)  # fmt: skip
def test_events_of_one_norm(tmp_path, norms, events):
    assert steps_of(found(tmp_path / "run.keel", norms)) == events


@pytest.mark.parametrize(("step", "events"), [(16, [(16, 16)]), (17, [])])
def test_a_hundred_times_the_first_norm_is_an_alarm_in_the_first_sixteen_steps(tmp_path, step, events):
    norms = series(**{f"s{step}": 101.0})
    norms[1 : step - 1] = norms[step:] = 40.0  # beside which 101 is little
    assert steps_of(found(tmp_path / "run.keel", norms)) == events


@pytest.mark.parametrize(
    ("steps", "exponent", "is_event"),
    [
        # sqrt(2 ln 300) + 1.1 = 4.48 deviations of 0.371 are 1.660 decades.
        (300, 1.64, False),
        (300, 1.68, True),
        (1200, 1.68, False),  # 4.87 deviations in a run of 1200 steps: 1.803 decades
        (1200, 1.82, True),
    ],
)
def test_a_surprise_is_measured_in_deviations_and_grows_with_the_run(tmp_path, steps, exponent, is_event):
    norms = waves(steps)
    norms[steps - 100] = 10**exponent
    explosion = found(tmp_path / "run.keel", norms).explosion
    assert explosion.found == is_event
    if is_event:
        assert explosion.norm_before == pytest.approx(1)
        assert explosion.score == pytest.approx(exponent / (1.4826 * 0.2 * 1.25))
        assert (explosion.peak_step, explosion.peak_norm) == (steps - 99, pytest.approx(10**exponent))


@pytest.mark.parametrize(("exponent", "last"), [(1.0, 201), (1.2, 231)])
def test_a_noisy_norm_is_back_within_three_deviations(tmp_path, exponent, last):
    norms = waves()
    norms[200], norms[201:231] = 1000.0, 10**exponent  # three deviations are 1.11 decades
    explosion = found(tmp_path / "run.keel", norms).explosion
    assert (explosion.step, explosion.last_step, explosion.ended) == (201, last, "recovered")


def test_a_sudden_stretch_of_calm_does_not_make_the_usual_spread_an_alarm(tmp_path):
    norms = waves(400)
    norms[200:248] = 1.0
    norms[240] = 30.0  # far above the calm, and within the run's own spread
    assert not found(tmp_path / "run.keel", norms).explosion.found


@pytest.mark.parametrize(
    ("last", "worst"),
    [(5, 101), (6, 295)],  # five steps at the end may be a spike that the record cuts off
)
def test_the_end_of_the_record_comes_first_where_it_is_more_than_a_spike(tmp_path, last, worst):
    norms = series(s101=100.0)
    norms[-last:] = 9.0
    explanation = found(tmp_path / "run.keel", norms)
    assert explanation.explosion.step == worst
    assert [event.ended for event in explanation.events] == ["recovered", "high"]
    assert explanation.events[1].evidence[-1] == "It was still high at step 300, the last one recorded."


def test_what_ends_in_nan_comes_before_what_ends_high(tmp_path):
    norms = torch.ones(300, 2)
    norms[200:230] = 50.0
    norms[270:] = math.nan
    explanation = found(tmp_path / "run.keel", norms)
    assert (explanation.explosion.step, explanation.explosion.ended) == (271, "non-finite")
    assert explanation.explosion.kind == "explosion"
    assert (explanation.explosion.peak_norm, explanation.explosion.peak_step) == (None, None)
    assert explanation.explosion.evidence[-1] == "It was not finite at step 300, the last one recorded."


def test_at_most_fifty_events_are_told(tmp_path):
    norms = series(1400)
    norms[40::26] = 9.0 * 1.6 ** torch.arange(len(norms[40::26]))  # each is news beside the one before
    events = found(tmp_path / "run.keel", norms).events
    assert [event.step for event in events] == list(range(41, 41 + 50 * 26, 26))


def test_growth_is_counted_from_the_step_before(tmp_path):
    explosion = found(tmp_path / "run.keel", series(s106=4.0, s107=16.0, s108=64.0, s109=4.0)).explosion
    assert (explosion.step, explosion.last_step, explosion.peak_step) == (106, 109, 108)
    assert explosion.peak_norm == 64
    assert explosion.norm_before == pytest.approx(1)
    assert explosion.growth_per_step == pytest.approx(4)


def test_equal_spikes_are_all_found(tmp_path):
    spikes = [100 + 30 * i + i % 3 for i in range(40)]  # at equal distances they would be a rhythm
    found_steps = [
        step
        for step, _ in steps_of(found(tmp_path / "run.keel", series(1400, **{f"s{i}": 9.0 for i in spikes})))
    ]
    assert found_steps == spikes
