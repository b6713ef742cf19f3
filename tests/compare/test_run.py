"""One run: what it notes, and what counts as diverged."""

import itertools
import math

import pytest
import torch
from torch import nn

from gradkeel.compare import Task, TaskError, Trial, load_task, run_trial
from gradkeel.compare.run import divergence, tail_median

INF, NAN = math.inf, math.nan


class Quadratic(Task):
    """``scale * w^2`` from w = 1: SGD multiplies w by ``1 - 2 * scale * lr``."""

    name = "quadratic"

    def __init__(self, start=1.0, gradient_hook=None):
        self.start, self.gradient_hook = start, gradient_hook

    def model(self):
        model = nn.Linear(1, 1)
        with torch.no_grad():
            model.weight.fill_(self.start)
            model.bias.zero_()
        model.bias.requires_grad_(False)
        if self.gradient_hook is not None:
            model.weight.register_hook(self.gradient_hook)
        return model

    def batches(self, seed):
        return torch.ones(1, 1, 1)

    def loss(self, model, batch):
        return model(batch).square().mean()


def test_a_run_that_trains():
    run = run_trial(Quadratic(), Trial("none", 0.25, 0), 5)
    # w halves at every step; losses[i] is taken after i updates, and the gradient is 2w.
    assert run.losses == [0.25**i for i in range(5)]
    assert run.norms == [2 * 0.5**i for i in range(5)]
    assert (run.policy, run.lr, run.seed, run.optimizer) == ("none", 0.25, 0, "SGD")
    assert (run.diverged, run.diverged_at, run.onset) == (False, None, None)
    assert (run.clip_rate, run.skipped) == (0.0, 0)
    assert run.seconds_per_step > 0
    assert run.final_loss == run.losses[2]
    assert run.score == run.final_loss
    assert (run.initial_validation_loss, run.validation_loss) == (None, None)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_frozen_weights_may_be_quantized(dtype):
    class Adapted(Quadratic):
        def model(self):
            model = super().model()
            model.codes = nn.Parameter(torch.ones(2).to(dtype), requires_grad=False)
            return model

    assert run_trial(Adapted(), Trial("none", 0.25, 0), 5).losses == [0.25**i for i in range(5)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_of_many_numbers_is_refused(accumulate):
    class Unreduced(Quadratic):
        def loss(self, model, batch):
            return model(batch.expand(3, 1)).square()

    with pytest.raises(TaskError, match=r"loss\(\) gave a tensor of shape \(3, 1\)"):
        run_trial(Unreduced(), Trial("none", 0.25, 0), 5, accumulate=accumulate)


def test_an_optimizer_that_needs_a_closure_is_refused():
    class Searching(Quadratic):
        def optimizer(self, model, lr):
            return torch.optim.LBFGS(model.parameters(), lr=lr)

    with pytest.raises(TaskError, match=r"LBFGS\.step\(\) needs a closure"):
        run_trial(Searching(), Trial("none", 0.25, 0), 5)


def test_clipping_is_counted_and_norms_are_those_before_it():
    run = run_trial(Quadratic(), Trial("norm:1.0", 0.25, 0), 5)
    # The gradient is 2, then 1.5, then 1, which is at the bound, and so on.
    assert run.norms[:3] == [2.0, 1.5, 1.0]
    assert run.clip_rate == 2 / 5


def test_onset_is_the_first_update_larger_than_its_weights():
    # 1 - 2 lr = -1.5: w goes 1, -1.5, 2.25, each update 2.5 times the weight before it.
    run = run_trial(Quadratic(), Trial("none", 1.25, 0), 5)
    assert (run.onset.step, run.onset.parameter, run.onset.ratio) == (1, "weight", 2.5)
    assert run.diverged
    # The loss is above where it began after the very first step, and stays there.
    assert run.diverged_at == 1


def test_onset_ignores_weights_of_zero():
    task = Quadratic(start=0.0)
    task.loss = lambda model, batch: (model(batch) - 1).square().mean()
    # Step 1 leads from 0 to 0.5, which no ratio can judge; step 2 adds half of that.
    assert run_trial(task, Trial("none", 0.25, 0), 3).onset is None


def test_a_run_stops_at_a_loss_that_is_not_finite():
    run = run_trial(Quadratic(), Trial("none", 1e20, 0), 50)
    assert run.diverged
    assert not math.isfinite(run.losses[-1])
    assert math.isnan(run.norms[-1])
    assert len(run.losses) == len(run.norms) == run.diverged_at + 1 < 50
    assert math.isnan(run.final_loss)
    assert run.score == INF


def test_without_clipping_a_non_finite_gradient_is_kept_and_spoils_the_weights():
    run = run_trial(Quadratic(gradient_hook=lambda g: g * NAN), Trial("none", 0.1, 0), 5)
    assert (run.diverged, run.diverged_at, run.skipped) == (True, 1, 0)
    assert len(run.losses) == 2


def test_with_a_policy_non_finite_gradients_are_skipped_until_there_are_too_many():
    run = run_trial(Quadratic(gradient_hook=lambda g: g * NAN), Trial("norm:1.0", 0.1, 0), 50)
    # Ten may be skipped in a row; before the first of them no step was made.
    assert (run.diverged, run.diverged_at, run.skipped) == (True, 0, 10)
    assert set(run.losses) == {1.0}


def test_a_single_skip_is_no_divergence():
    seen = []

    def once(gradient):
        seen.append(gradient)
        return gradient * (INF if len(seen) == 2 else 1)

    run = run_trial(Quadratic(gradient_hook=once), Trial("norm:9", 0.1, 0), 5)
    assert (run.diverged, run.skipped) == (False, 1)
    assert run.losses[2] == run.losses[1]


def test_validation_loss_ranks_and_is_taken_before_and_after():
    task = Quadratic()
    task.validation_loss = lambda model: 10 * float(model.weight.detach())
    run = run_trial(task, Trial("none", 0.25, 0), 2)
    assert (run.initial_validation_loss, run.validation_loss, run.score) == (10.0, 2.5, 2.5)
    task.validation_loss = lambda model: NAN
    assert run_trial(task, Trial("none", 0.25, 0), 2).score == INF


def test_the_loss_reaches_policies_that_look_at_it():
    # Twenty losses of a run that does well, then one that jumps: skip-step leaves that step out.
    class Jump(Quadratic):
        def batches(self, seed):
            return [torch.full((1, 1), 1.0 + 0.01 * (i % 3)) for i in range(20)] + [torch.full((1, 1), 30.0)]

    run = run_trial(Jump(), Trial("skip-step:sigma=6,window=32,warmup=10", 1e-4, 0), 21)
    assert run.skipped == 1


@pytest.mark.parametrize("policy", ["none", "global-norm:0.2"])
@pytest.mark.parametrize("name", ["simple-mlp", "simple-mlp-adam"])
def test_accumulated_batches_train_like_one_of_their_size(name, policy):
    task, whole = load_task(name), load_task(name)
    whole.batch_size = 64
    lr = task.learning_rates[0]
    accumulated = run_trial(task, Trial(policy, lr, 0), 10, accumulate=4)
    at_once = run_trial(whole, Trial(policy, lr, 0), 10)
    # Each step is on the same 64 samples; float32 sums in another order differ by about 1e-7 a step.
    assert accumulated.losses == pytest.approx(at_once.losses, rel=1e-5)
    assert accumulated.norms == pytest.approx(at_once.norms, rel=1e-4)
    assert accumulated.clip_rate == at_once.clip_rate


def test_accumulated_batches_weigh_what_they_hold():
    task = load_task("tiny-transformer")
    task.batch_size = 2
    run = run_trial(task, Trial("none", 1e-3, 0), 1, accumulate=3)
    torch.manual_seed(0)
    model, batches = task.model(), task.batches(0)
    pairs = [(task.loss(model, batch).item(), task.weight(batch)) for batch in itertools.islice(batches, 3)]
    assert len({weight for _, weight in pairs}) > 1
    expected = sum(loss * weight for loss, weight in pairs) / sum(weight for _, weight in pairs)
    assert run.losses == pytest.approx([expected], rel=1e-6)


def test_an_accumulated_loss_that_is_not_finite_ends_the_run():
    run = run_trial(Quadratic(), Trial("none", 1e20, 0), 50, accumulate=2)
    assert run.diverged
    assert len(run.losses) == run.diverged_at + 1 < 50


@pytest.mark.parametrize(
    ("losses", "bad_step", "expected"),
    [
        ([4, 3, 2], None, (False, None)),
        ([4, 9, 3], None, (False, None)),
        ([4, 4, 4], None, (False, None)),
        ([4, 3, 5, 6, 9], None, (True, 2)),
        ([4, 9, 16], None, (True, 1)),
        ([4, 9, INF], None, (True, 2)),
        ([NAN], None, (True, 0)),
        ([4, 3, 2], 2, (True, 2)),
        ([4, 3, NAN], 1, (True, 1)),
        ([], None, (False, None)),
        ([], 3, (True, 3)),
    ],
)
def test_divergence(losses, bad_step, expected):
    assert divergence(losses, bad_step) == expected


def test_final_loss_is_the_median_of_the_last_ten():
    assert tail_median([100.0] * 5 + list(range(10))) == 4.5
    assert tail_median([3.0]) == 3.0
    assert math.isnan(tail_median([1.0, 2.0, INF]))
    assert math.isnan(tail_median([]))
