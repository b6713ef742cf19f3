"""What the built-in tasks show; few steps here, the whole of it in `make test-full`."""

import math
import statistics

import pytest
import torch

from gradkeel.compare import compare, load_task, make_plan, summarize
from gradkeel.compare.findings import findings
from gradkeel.compare.text import VOCABULARY, text, windows

ALL, WEIGHTS, BIASES = "norm:1.0", "norm:1.0,exclude=*.bias", "norm:1.0,exclude=*.weight"


@pytest.fixture(scope="module")
def exploding():
    """Twelve seeds of the four modes, by policy."""
    result = compare(make_plan("exploding-linear", seeds=12), jobs=1)
    return {policy: [r for r in result.runs if r.policy == policy] for policy in result.plan.policies}


def test_exploding_linear_has_the_tutorials_four_modes(exploding):
    assert list(exploding) == ["none", ALL, WEIGHTS, BIASES]


@pytest.mark.parametrize("policy", ["none", BIASES])
def test_unclipped_and_with_biases_alone_the_loss_is_not_finite_within_four_steps(exploding, policy):
    for run in exploding[policy]:
        assert run.diverged
        assert run.diverged_at <= 4
        assert not math.isfinite(run.losses[-1])
        assert run.onset.step <= 2


def test_with_weights_alone_it_takes_some_steps_more(exploding):
    # Seen over 30 seeds: steps 12 to 18.
    assert all(run.diverged and 8 <= run.diverged_at <= 24 for run in exploding[WEIGHTS])


def test_clipped_in_every_parameter_it_trains(exploding):
    finals = [statistics.median(run.losses[-10:]) for run in exploding[ALL]]
    assert not any(run.diverged for run in exploding[ALL])
    assert sum(final < 2 for final in finals) >= 0.9 * len(finals)
    assert statistics.median(finals) == pytest.approx(0.8, abs=0.4)


def test_exploding_linear_draws_without_replacement():
    task = load_task("exploding-linear")
    batches = task.batches(0)
    epoch = torch.cat([next(batches) for _ in range(62)])
    assert epoch.shape == (992, 1)
    assert len(epoch.unique()) == 992


def test_the_text_is_real_and_split():
    train, validation = text().train, text().validation
    assert len(train) > 300_000
    assert len(validation) == pytest.approx(len(train) / 9, rel=0.01)
    assert int(train.max()) < VOCABULARY
    # Hardly any character lies outside ASCII.
    assert (train == 0).float().mean() < 0.01


def test_windows_are_inputs_and_targets_one_further():
    assert windows(torch.arange(10), torch.tensor([0, 4]), 3).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_char_lstm_learns_clipped_where_it_diverges_unclipped():
    # Forty of the 200 steps: unclipped, the loss is already thrown out and stays so.
    plan = make_plan(
        "char-lstm", policies=["none", "global-norm:0.25"], learning_rates=[32], seeds=2, steps=40
    )
    runs = compare(plan, jobs=1).runs
    assert all(run.diverged == (run.policy == "none") for run in runs)
    assert all(run.final_loss < 3.7 < 4 < run.losses[0] for run in runs if not run.diverged)


@pytest.mark.full
def test_char_lstm_best_clipped_is_below_best_unclipped_in_every_seed():
    result = compare(make_plan("char-lstm"))
    rows = summarize(result.runs, result.plan.target_loss)
    best = {row.policy: [r for r in result.runs if (r.policy, r.lr) == (row.policy, row.lr)] for row in rows}
    for clipped, unclipped in zip(best["global-norm:0.25"], best["none"], strict=True):
        assert clipped.seed == unclipped.seed
        assert clipped.final_loss < unclipped.final_loss
        assert clipped.validation_loss < unclipped.validation_loss
    highest = [r for r in result.runs if r.lr == 32]
    assert all(r.diverged for r in highest if r.policy == "none")
    assert not any(r.diverged for r in highest if r.policy == "global-norm:0.25")
    assert "diverged in 5 of 5 seeds" in findings(result).found


def test_simple_mlp_sees_every_sample_once_an_epoch():
    task = load_task("simple-mlp")
    batches = task.batches(3)
    inputs = torch.cat([next(batches)[0] for _ in range(4)])
    assert inputs.shape == (64, 10)
    assert len(inputs.unique(dim=0)) == 64
    assert isinstance(task.optimizer(task.model(), 0.1), torch.optim.SGD)
    assert isinstance(load_task("simple-mlp-adam").optimizer(task.model(), 0.1), torch.optim.Adam)


def test_tiny_transformer_is_causal_and_ignores_what_stands_behind_an_end():
    task = load_task("tiny-transformer")
    torch.manual_seed(0)
    model = task.model()
    batch = next(task.batches(0))
    lengths = (batch[:, 1:] >= 0).sum(1)
    assert len(lengths.unique()) > 1
    assert task.weight(batch) == lengths.sum()
    with torch.no_grad():
        loss = task.loss(model, batch)
        longer = torch.cat([batch, torch.full((len(batch), 3), -100)], dim=1)[:, :65]
        # Padding changes the order of sums alone.
        torch.testing.assert_close(task.loss(model, longer), loss, rtol=1e-5, atol=0)
        one = int(lengths.argmin())
        alone = batch[one : one + 1, : int(lengths[one]) + 1]
        logits = model(batch[:, :-1].clamp(min=0))[one, : int(lengths[one])]
        torch.testing.assert_close(model(alone[:, :-1])[0], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["char-lstm", "exploding-linear", "simple-mlp", "tiny-transformer"])
def test_the_same_seed_gives_the_same_batches(name):
    task = load_task(name)
    first, again, other = (next(iter(task.batches(seed))) for seed in (1, 1, 2))
    pairs = (
        [(first, again, other)]
        if isinstance(first, torch.Tensor)
        else [*zip(first, again, other, strict=True)]
    )
    for a, b, c in pairs:
        assert torch.equal(a, b)
        assert a.shape != c.shape or not torch.equal(a, c)
