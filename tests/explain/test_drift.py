"""A slow rise of the norm's level, on levels that are known for each stretch of the run."""

import math

import pytest
import torch

from gradkeel.explain import explain
from scripted import scripted_run

STRETCHES = 24


def levels(rise, *, lowest=0, falls=()):
    """[24] levels that go up to ``rise`` times the lowest one, but for those in ``falls``, which go down a little."""
    ups = STRETCHES - 1 - lowest - len(falls)
    factor = (rise * 1.01 ** len(falls)) ** (1 / ups)
    values = [1.02**lowest]
    for i in range(1, STRETCHES):
        values.append(values[-1] / 1.02 if i <= lowest else values[-1] * (1 / 1.01 if i in falls else factor))
    return torch.tensor(values, dtype=torch.float64)


def norms_of(values, width=10):
    return values.repeat_interleave(width)


@pytest.mark.parametrize(("rise", "is_drift"), [(9.9, False), (10.1, True)])
def test_a_rise_by_ten_times_is_a_drift(tmp_path, rise, is_drift):
    explosion = explain(scripted_run(tmp_path / "run.keel", norms_of(levels(rise)))).explosion
    assert (explosion.kind == "drift") == is_drift
    assert explosion.found == is_drift


def test_fewer_than_240_steps_are_no_drift(tmp_path):
    norms = norms_of(levels(20.0))
    assert explain(scripted_run(tmp_path / "240.keel", norms)).explosion.kind == "drift"
    assert not explain(scripted_run(tmp_path / "239.keel", norms[:239])).explosion.found


@pytest.mark.parametrize(("falls", "is_drift"), [((3, 7, 11, 15), True), ((3, 7, 11, 15, 19), False)])
def test_the_level_has_to_go_up_in_four_of_five_stretches(tmp_path, falls, is_drift):
    # From the lowest on there are 20 changes, so that four are a fifth.
    values = levels(12.0, lowest=3, falls=[fall + 3 for fall in falls if fall + 3 < STRETCHES])
    assert explain(scripted_run(tmp_path / "run.keel", norms_of(values))).explosion.found == is_drift


@pytest.mark.parametrize(("lowest", "is_drift"), [(20, True), (21, False)])
def test_a_drift_has_four_stretches_at_least(tmp_path, lowest, is_drift):
    # Down by 2% from stretch to stretch, and then up by a steady factor a step: twelve times in the last one's middle.
    width = 40
    falling = 1.02 ** -torch.arange(lowest + 1, dtype=torch.float64).repeat_interleave(width)
    rest = torch.arange(1, width * (STRETCHES - lowest - 1) + 1, dtype=torch.float64)
    norms = torch.cat([falling, falling[-1] * 12 ** (rest / (len(rest) - width / 2))])
    explosion = explain(scripted_run(tmp_path / "run.keel", norms)).explosion
    assert explosion.found == is_drift
    if is_drift:
        assert (explosion.kind, explosion.step) == ("drift", lowest * width + 1)


@pytest.mark.parametrize(("end", "is_drift"), [(0.99, False), (1.0, True), (1.5, True)])
def test_a_loss_that_fell_meanwhile_excuses_it(tmp_path, end, is_drift):
    losses = torch.full((240,), 5.0)  # of no matter: before the norm was lowest
    losses[30:] = 1.0
    losses[-10:] = end
    path = scripted_run(tmp_path / "run.keel", norms_of(levels(12.0, lowest=3)), losses=losses)
    assert explain(path).explosion.found == is_drift


def test_what_is_told_of_a_drift(tmp_path):
    values = levels(12.0, lowest=3)
    norms = torch.stack([norms_of(values), norms_of(values) ** 1.5, torch.full((240,), 1e-3)], dim=1)
    norms[norms[:, 0] < 1, 2] = 0
    path = scripted_run(tmp_path / "run.keel", norms)
    explosion = explain(path).explosion
    before, after = (math.hypot(x, x**1.5, 1e-3) for x in (1.0, 12.0))
    assert (explosion.kind, explosion.step, explosion.parameter, explosion.ended) == (
        "drift",
        31,
        "b",
        "high",
    )
    assert (explosion.last_step, explosion.peak_step) == (240, 240)
    assert explosion.norm_before == pytest.approx(before)
    assert explosion.peak_norm == pytest.approx(after)
    assert explosion.growth_per_step == pytest.approx((after / before) ** (1 / 209))
    assert [(r.parameter, r.step, r.growth) for r in explosion.spread] == [
        ("b", 31, pytest.approx(12**1.5)),
        ("a", 31, pytest.approx(12)),
    ]  # and not the one that stayed as it was
    assert explosion.evidence == (
        f"The level of the gradient norm (its median over 10 steps) rose from {before:.3g} to {after:.3g}, "
        f"{after / before:.3g} times, without a jump.",
        "The level of b rose most: 41.6 times.",
    )


def test_a_drift_beside_a_jump_is_not_told(tmp_path):
    norms = norms_of(levels(12.0))
    norms[120] *= 50
    explanation = explain(scripted_run(tmp_path / "run.keel", norms))
    assert [(event.kind, event.step) for event in explanation.events] == [("spike", 121)]


def test_the_words_of_a_drift(tmp_path):
    text = str(explain(scripted_run(tmp_path / "run.keel", norms_of(levels(12.0, lowest=3)))))
    assert "The gradients grew slowly, without a jump from about step 31, first in a." in text
    assert f"The norm grew by a factor of {12 ** (1 / 209):.3g} a step, to 12 at step 240." in text
