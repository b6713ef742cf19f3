"""A loss that rises at once by more than an update can do, and is learned away: what is asked has changed."""

import re

import pytest
import torch

from gradkeel.explain import explain
from gradkeel.explain.course import Course
from gradkeel.explain.renewals import find_renewals
from gradkeel.record import Reader
from scripted import scripted_run

STEPS, EVERY = 1200, 200
AGAIN = [*range(EVERY + 1, STEPS, EVERY)]


def noise(seed, size):
    return size * torch.randn(STEPS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(step, height, over=30.0):
    """[k] a loss that rises at a step, and is learned away."""
    since = torch.arange(1, STEPS + 1, dtype=torch.float64) - step
    return torch.where(since >= 0, height * torch.exp(-since / over), 0.0)


def agent(heights, growth=0.0):
    """[k] the loss and [k] the norm of one whose target is renewed; errors grow with the value that is expected."""
    jumps = sum(learned(step, height) for step, height in zip([1, *AGAIN], heights, strict=False))
    losses = jumps + 0.02 + growth * torch.arange(STEPS) / STEPS
    return losses * torch.exp(noise(0, 0.1)), 0.1 * (1 + 5 * jumps) * torch.exp(noise(1, 0.1))


def judged(path, losses, norms, **script):
    run = scripted_run(path, norms, losses=losses, **script)
    with Reader(run) as reader:
        return explain(run).diagnosis, find_renewals(Course(reader))


def test_a_loss_that_grows_with_the_value_that_is_expected_is_no_divergence(tmp_path):
    losses, norms = agent([0.5, 0.5, 0.6, 0.8, 1.0, 1.2], growth=1.5)
    found, renewals = judged(tmp_path / "run.keel", losses, norms)
    assert (found.verdict, found.onset, found.confidence) == ("healthy", None, 0.5)
    assert len({*renewals} & {*AGAIN}) >= 3
    assert (
        f"{len(renewals)} times, from step 201 to step {renewals[-1]}, the loss rose at once"
        in found.reasons[0]
    )


def test_a_single_one_that_is_learned_away_is_no_spike(tmp_path):
    found, renewals = judged(tmp_path / "run.keel", *agent([0.5, 0.0, 0.0, 0.5]))
    assert renewals == [601]
    assert (found.verdict, found.confidence) == ("healthy", 0.5)
    assert found.reasons[0].startswith("At step 601 the loss rose at once")


def test_other_data_that_is_not_learned_is_told(tmp_path):
    losses, norms = agent([0.5])
    losses[600:] += 0.3
    found, renewals = judged(tmp_path / "run.keel", losses, norms)
    assert renewals == []
    assert (found.verdict, found.onset) == ("spike_unrecovered", 601)


def test_a_single_bad_batch_is_told(tmp_path):
    losses, norms = agent([0.5])
    losses[600] += 0.5
    norms[600] *= 20
    found, renewals = judged(tmp_path / "run.keel", losses, norms)
    assert renewals == []
    assert (found.verdict, found.onset) == ("spike_recovered", 601)


@pytest.mark.parametrize(
    "script", [{"updates": 0.035}, {"updates": torch.nan}], ids=["by the update", "not known"]
)
def test_what_an_update_can_have_done_is_told(tmp_path, script):
    losses, norms = agent([0.5, 0.0, 0.0, 0.5])
    found, renewals = judged(tmp_path / "run.keel", losses, 100 * norms, **script)
    assert renewals == []
    assert (found.verdict, found.onset) == ("spike_recovered", 601)


def test_gradients_that_grow_with_the_loss_have_diverged(tmp_path):
    losses, norms = agent([0.5, 0.5, 0.6, 0.8, 1.0, 1.2])
    losses[1020:] *= 300
    norms[1020:] *= 300
    found, renewals = judged(tmp_path / "run.keel", losses, norms)
    assert len(renewals) >= 3
    assert found.verdict == "diverged"


def test_noise_is_none(tmp_path):
    """Of skewed noise, as a loss of few samples has it."""
    losses = torch.exp(noise(2, 0.8))
    _, renewals = judged(tmp_path / "run.keel", losses, torch.exp(noise(1, 0.1)))
    assert len(renewals) < 3


def test_of_a_jump_that_the_record_ends_with_little_is_known(tmp_path):
    losses, norms = agent([0.5])
    losses[-1:] += 0.5
    norms[-1:] *= 50
    found, _ = judged(tmp_path / "run.keel", losses, norms)
    assert (found.verdict, found.onset, found.confidence) == ("spike_recovered", STEPS, 0.5)
    assert "The record ends with it" in found.reasons[-1]


def test_a_single_one_may_be_the_work_of_an_update_that_was_not_measured(tmp_path):
    """As where something wrote to the weights, or on an accelerator, which samples no more for an alarm."""
    losses, norms = agent([0.5])
    losses += learned(626, 0.5)
    norms += 2.5 * learned(626, 0.1)
    found, renewals = judged(tmp_path / "run.keel", losses, norms)
    assert renewals == []
    assert (found.verdict, found.onset) == ("spike_recovered", 626)


def test_a_blow_up_at_the_end_of_a_record_without_losses_has_diverged(tmp_path):
    norms = torch.cat([torch.exp(noise(1, 0.1))[:200], torch.tensor([10.0, 1e3, 1e5, 1e7, 1e9])])
    with Reader(scripted_run(tmp_path / "run.keel", norms)) as reader:
        assert explain(reader).diagnosis.verdict == "diverged"


def test_what_recurs_is_counted_whole_whether_or_not_it_is_new(tmp_path):
    heights = [0.5] * 14
    jumps = sum(
        learned(step, height, over=8.0) for step, height in zip(range(1, STEPS, 90), heights, strict=True)
    )
    losses, norms = (
        (jumps + 0.02) * torch.exp(noise(0, 0.1)),
        0.1 * (1 + 20 * jumps) * torch.exp(noise(1, 0.1)),
    )
    found, renewals = judged(tmp_path / "run.keel", losses, norms)
    assert len(renewals) >= 3
    assert (found.verdict, found.confidence) == ("healthy", 0.5)
    told = re.search(r"left its past (\d+) times", " ".join(found.reasons))
    assert int(told[1]) >= 8
