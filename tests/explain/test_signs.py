"""What a run shows again and again, and takes no harm from, is how it goes: agents' losses jump with their targets."""

import math

import pytest
import torch
from torch import nn

from gradkeel.explain import explain
from gradkeel.record.sampling import Sampling
from scripted import scripted_run, trained

STEPS = 1200
OFTEN = (101, 164, 231, 347, 402, 511, 596, 664, 777, 853, 934, 1063)  # at no equal distances


def noise(seed, size):
    return size * torch.randn(STEPS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steady():
    return torch.exp(noise(0, 0.1))


def falling(over=400):
    return 0.3 + 1.7 * torch.exp(-torch.arange(STEPS) / over) + noise(1, 0.02)


def explained(path, steps=OFTEN, *, height=8.0, also=(), since=STEPS + 1, **script):
    """Of a run whose loss falls, and whose norm and loss jump at these steps, and, by ``also``, at others.

    From the step ``since`` on the norm is 300 times as high, and so is the loss.
    """
    norms, losses = steady(), falling()
    for step, times in (*((step, height) for step in steps), *also):
        norms[step - 1] *= times
        losses[step - 1] += times / 4
    norms[since - 1 :] *= 300
    losses[since - 1 :] *= 300
    return explain(scripted_run(path, norms, losses=losses, **script))


def test_what_comes_again_and_again_is_how_the_run_goes(tmp_path):
    explanation = explained(tmp_path / "run.keel")
    found = explanation.diagnosis
    assert (found.verdict, found.onset, found.where, found.confidence) == ("healthy", None, (), 0.5)
    assert (
        "From step 101 to step 1063 the gradient norm or the loss left its past 12 times" in found.reasons[-1]
    )
    assert [event.step for event in explanation.events] == [*OFTEN]  # nothing of it is hidden


def test_a_loss_that_jumps_alone_is_no_other_matter(tmp_path):
    losses = falling()
    losses[torch.tensor(OFTEN) - 1] += 3
    found = explain(scripted_run(tmp_path / "run.keel", steady(), losses=losses)).diagnosis
    assert (found.verdict, found.confidence) == ("healthy", 0.5)


LATE = (971, 1003, 1028, 1049, 1078, 1100, 1124, 1151, 1173)  # where it may have come to grief
OVERWRITTEN = torch.full((STEPS, 1), 1e-3).index_fill(0, torch.tensor([100]), 0.2)


@pytest.mark.parametrize(
    ("steps", "told", "onset"),
    [
        (OFTEN[:7], {}, 101),  # too few to know
        (LATE, {"height": 40.0}, 971),
        (OFTEN, {"also": [(721, 60.0)]}, 721),  # by far the highest
        (OFTEN, {"updates": OVERWRITTEN}, 101),  # training did it
    ],
    ids=["few", "late", "higher", "large steps"],
)
def test_what_is_out_of_the_ordinary_is_told(tmp_path, steps, told, onset):
    found = explained(tmp_path / "run.keel", steps, **told).diagnosis
    assert (found.verdict, found.onset) == ("spike_recovered", onset)


@pytest.mark.parametrize(("added", "verdict"), [(0.0, "healthy"), (0.9, "spike_unrecovered")])
def test_a_loss_that_is_worse_for_them_is_told(tmp_path, added, verdict):
    norms, losses = steady(), falling(30)
    for step in OFTEN:
        norms[step - 1] *= 8
        losses[step - 1] += 2
        losses[step - 1 :] += added / len(OFTEN)
    assert explain(scripted_run(tmp_path / "run.keel", norms, losses=losses)).verdict == verdict


def test_norms_that_are_not_finite_are_never_usual(tmp_path):
    norms, losses = steady(), falling()
    for step in OFTEN:
        norms[step - 1 : step + 3] *= torch.tensor([50.0, math.inf, math.inf, math.inf])
        losses[step - 1] += 2
    run = scripted_run(tmp_path / "run.keel", norms, losses=losses, nonfinite="skip", max_consecutive_skips=9)
    found = explain(run).diagnosis
    assert (found.verdict, found.onset) == ("spike_recovered", 101)


def test_a_jump_that_the_record_ends_with_is_told(tmp_path):
    norms, losses = steady(), falling()
    norms[torch.tensor(OFTEN) - 1] *= 8
    losses[torch.tensor(OFTEN) - 1] += 2
    losses[1197:] += 2
    found = explain(scripted_run(tmp_path / "run.keel", norms, losses=losses)).diagnosis
    assert (found.verdict, found.onset) == ("spike_recovered", 1198)


@pytest.mark.parametrize("batch", [4, 16])
def test_noise_of_small_batches_is_no_loss_that_moves_by_itself(tmp_path, batch):
    """Targets that are shuffled from some step on: real training, whose loss is that of a few samples."""
    torch.manual_seed(1)
    true, model = nn.Linear(16, 2), nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def loss(step):
        inputs = torch.randn(batch, 16)
        targets = true(inputs).argmax(1)
        targets = torch.where(torch.rand(batch) < 0.1, 1 - targets, targets)
        if step >= 1200:
            targets = targets[torch.randperm(batch)]
        return nn.functional.cross_entropy(model(inputs), targets)

    run = trained(tmp_path / "run.keel", model, optimizer, map(loss, range(1, 2001)))
    found = explain(run).diagnosis
    assert found.verdict in {"spike_unrecovered", "diverged"}
    assert 1150 < found.onset < 1250


def test_spikes_whose_updates_nobody_measured_are_told(tmp_path, monkeypatch):
    """On an accelerator the host does not wait for the norm, so that no spike has its update measured."""
    following = Sampling.next
    monkeypatch.setattr(Sampling, "next", lambda own, step, total, rate: following(own, step, None, rate))
    assert explained(tmp_path / "run.keel").verdict == "spike_recovered"


def test_an_explosion_after_more_events_than_are_looked_for_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("gradkeel.explain.events.MOST_EVENTS", 10)
    norms, losses = steady(), falling()
    for step in OFTEN:
        norms[step - 1] *= 8
        losses[step - 1] += 2
    norms[1120:] *= 300
    assert explain(scripted_run(tmp_path / "run.keel", norms, losses=losses)).verdict != "healthy"


def test_one_that_lasts_is_told(tmp_path):
    found = explained(tmp_path / "run.keel", since=1121).diagnosis
    assert (found.verdict, found.onset) == ("diverged", 1121)


def test_weights_that_change_by_themselves_do_not_recur(tmp_path):
    weights = torch.ones(STEPS, 1)
    weights[595:] = 7.0
    found = explained(tmp_path / "run.keel", weights=weights).diagnosis
    assert (found.verdict, found.cause) == ("spike_recovered", "weights_changed")


# Of the loss, by stretches of an agent's games.
LEVELS = (5.0, 3.0, 6.3, 5.1, 4.7, 2.6, 5.9, 4.0, 3.4, 2.4, 6.8, 6.7)


@pytest.mark.parametrize(("levels", "verdict"), [(LEVELS, "healthy"), ((*[2.4] * 10, 6.8, 6.7), "diverged")])
def test_a_loss_whose_level_jumps_again_and_again_moves_by_itself(tmp_path, levels, verdict):
    losses = torch.tensor(levels).repeat_interleave(STEPS // 12) + noise(2, 0.2)
    norms = steady() * torch.linspace(1, 3, STEPS)
    losses[:3] = 5.0
    found = explain(scripted_run(tmp_path / "run.keel", norms, losses=losses)).diagnosis
    assert found.verdict == verdict
    if verdict == "healthy":
        assert found.confidence == 0.5
        assert "it had jumped up like that before" in found.reasons[-1]


def test_many_events_are_not_listed_one_by_one(tmp_path):
    explanation = explained(tmp_path / "run.keel")
    assert str(explanation).count("\n  - The gradients spiked at step") == 10
    assert "\n  - And 1 more.\n" in str(explanation)


@pytest.mark.parametrize("losses", [None, falling()])
def test_where_no_loss_jumps_with_them_they_are_told(tmp_path, losses):
    norms = steady()
    norms[torch.tensor(OFTEN) - 1] *= 8
    found = explain(scripted_run(tmp_path / "run.keel", norms, losses=losses)).diagnosis
    assert (found.verdict, found.onset) == ("spike_recovered", 101)
