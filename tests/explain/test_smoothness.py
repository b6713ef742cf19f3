"""Local smoothness along a step, and that measuring it leaves no trace."""

import copy
import doctest
import importlib
import math
import random

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradkeel as gk
from gradkeel.smoothness import LocalSmoothness, SmoothnessProbe, local_smoothness


class Everything(nn.Module):
    """Dropout, running statistics, a buffer that counts calls, tied and unused parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1
        hidden = nn.functional.dropout(self.norm(self.first(x)), 0.5)
        old_style = float(numpy.random.random_sample())  # noqa: NPY002 - what users' data code draws from
        return self.second(hidden) * torch.rand(4) * random.random() * old_style * self.calls


def everything():
    model = Everything()
    inputs = torch.randn(8, 4)
    return model, lambda: model(inputs).pow(2).mean()


def moved(model, by=0.05):
    return [torch.full_like(p, by) for p in model.parameters() if p.requires_grad]


def snapshot(model):
    return (
        [p.detach().clone() for p in model.parameters()],
        {name: b.clone() for name, b in model.named_buffers()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        [str(part) for part in numpy.random.get_state()],  # noqa: NPY002 - the same
    )


def assert_same(before, after):
    for old, new in zip(before[0], after[0], strict=True):
        assert torch.equal(old, new)
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    for old, new in zip(before[2], after[2], strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)
    assert torch.equal(before[3], after[3])
    assert before[4:] == after[4:]


@pytest.mark.parametrize("module", ["smoothness.probe", "smoothness.fit"])
def test_examples_run(module):
    result = doctest.testmod(importlib.import_module(f"gradkeel.explain.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 8))
def test_a_quadratic_has_the_smoothness_of_its_matrix(seed, size, points):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    matrix = root @ root.T
    x = torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
    step = torch.randn(size, dtype=torch.float64, generator=generator)
    result = local_smoothness(lambda: 0.5 * x @ matrix @ x, [x], [step], points=points)
    known = float((matrix @ step).norm() / step.norm())
    # Float64, condition numbers of a random start: R4's criterion.
    assert result.smoothness == pytest.approx(known, rel=1e-6)
    assert len(result.ratios) == points
    assert result.norm == pytest.approx(float((matrix @ x.detach()).norm()), rel=1e-12)
    assert result.length == pytest.approx(float(step.norm()), rel=1e-12)
    assert result.resolved


def test_the_largest_ratio_on_the_step_counts():
    # |g| = |x| has its kink at 0, in the middle of the step: half of the ratios see it.
    x = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    result = local_smoothness(lambda: x.abs().sum(), [x], [torch.tensor([2.0])], points=4)
    assert result.ratios == pytest.approx((0, 0.5 * 2, 2 / 1.5, 1.0))  # sign(0) = 0
    assert result.smoothness == pytest.approx(2 / 1.5)


def test_nothing_is_left_changed():
    model, loss = everything()
    loss().backward()
    references = [p.grad for p in model.parameters()]
    buffers = dict(model.named_buffers())
    before = snapshot(model)
    local_smoothness(loss, model, moved(model))
    assert_same(before, snapshot(model))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), references, strict=True))
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())


@pytest.mark.parametrize("call", [1, 2, 5, 6])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_changed_when_interrupted(call, error):
    model, loss = everything()
    loss().backward()
    step = moved(model)
    before, calls = snapshot(model), []

    def interrupted():
        value = loss()
        calls.append(value)
        if len(calls) == call:
            raise error("now")
        return value

    with pytest.raises(error, match="now"):
        local_smoothness(interrupted, model, step)
    assert len(calls) == call
    assert_same(before, snapshot(model))


class LinearInItsWeight(nn.Module):
    """Its gradient does not change along a step, unless the masks, random numbers or counts do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self):
        self.calls += 1
        kept = nn.functional.dropout(self.weight, 0.5)
        old_style = float(numpy.random.random_sample())  # noqa: NPY002 - what users' data code draws from
        return (kept * torch.rand(4) * random.random() * old_style * self.calls).sum()


def test_every_point_sees_the_same_randomness_and_buffers():
    model = LinearInItsWeight()
    assert local_smoothness(model, model, [torch.ones(4)]).smoothness == 0


def test_a_graph_that_waits_for_its_backward_stays_valid():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    inputs = torch.randn(5, 3)
    twin = copy.deepcopy(model)
    waiting = model(inputs).pow(2).sum()
    local_smoothness(lambda: model(inputs).pow(2).sum(), model, moved(model))
    waiting.backward()
    twin(inputs).pow(2).sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_sparse_gradients_are_measured():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, generator=generator)
    rows = torch.tensor([0, 2, 2, 5])

    def measure(sparse):
        layer = nn.Embedding.from_pretrained(table.clone(), freeze=False, sparse=sparse)
        return local_smoothness(lambda: layer(rows).pow(4).sum(), layer, [torch.full((6, 3), 0.1)])

    # The same float32 sums in another order.
    assert measure(sparse=True).smoothness == pytest.approx(measure(sparse=False).smoothness, rel=1e-5)


def test_rounding_noise_is_told_from_smoothness():
    weight = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    tiny = local_smoothness(lambda: (weight * 1.7).sum() ** 2, [weight], [torch.full((100,), 0.01)])
    assert not tiny.resolved
    wide = nn.Parameter(torch.ones(100))
    assert local_smoothness(lambda: (wide * 1.7).sum() ** 2, [wide], [torch.full((100,), 0.01)]).resolved


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float64, 2.0**-52), (torch.float32, 2.0**-23)])
@pytest.mark.parametrize("points", [1, 4])
def test_what_rounding_may_give_on_the_first_part_of_a_step(points, dtype, epsilon):
    # f(x, y) = 3 x^2 / 2 + 4 y at x = 1: the gradient is (3, 4), of norm 5; the step along x is 1/8 long.
    x, y = (torch.ones(1, dtype=dtype, requires_grad=True) for _ in range(2))
    step = [torch.tensor([0.125]), torch.zeros(1)]
    result = local_smoothness(lambda: torch.sum(1.5 * x * x + 4 * y), [x, y], step, points=points)
    assert result.resolution == epsilon * 5 * points / 0.125
    assert result.ratios == (3.0,) * points


@pytest.mark.parametrize(
    ("smoothness", "resolved"), [(1.0, True), (0.99, False), (math.inf, False), (math.nan, False)]
)
def test_ten_times_what_rounding_may_give_is_resolved(smoothness, resolved):
    measured = LocalSmoothness(smoothness, 1.0, 1.0, 1.0, (smoothness,), resolution=0.1)
    assert measured.resolved == resolved


def test_a_gradient_that_leaves_the_finite_numbers_is_not_resolved():
    x = torch.tensor([0.5], requires_grad=True)
    result = local_smoothness(lambda: x.log().sum(), [x], [torch.tensor([-0.5])])
    assert math.isnan(result.smoothness)
    assert not result.resolved


def test_a_loss_that_draws_new_batches_is_refused():
    model = nn.Linear(3, 1)
    generator = torch.Generator().manual_seed(0)

    def fresh():
        return model(torch.randn(4, 3, generator=generator)).pow(2).sum()

    with pytest.raises(ValueError, match="one fixed batch"):
        local_smoothness(fresh, model, moved(model))
    assert local_smoothness(fresh, model, moved(model), repeatable=False).smoothness > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": lambda model: moved(model)[:1]}, "step must have one tensor for each .*: 2, not 1"),
        (
            {"step": lambda model: [p.mT if p.dim() == 2 else p for p in moved(model)]},
            r"step\[0\] has shape \[3, 1\]",
        ),
        ({"step": lambda model: moved(model, by=0.0)}, "step has no length"),
        ({"points": 0}, r"points=0\): points must be an integer of at least 1"),
        ({"loss": lambda model: model(torch.ones(2, 3))}, r"shape \[2, 1\]; it must return the scalar loss"),
        ({"loss": lambda model: 1.0}, "loss.. returned float"),
        ({"loss": lambda model: torch.tensor(1.0)}, "does not depend on the parameters"),
        (
            {"model": lambda model: model.requires_grad_(False)},
            "no parameter of the model requires a gradient",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    model = nn.Linear(3, 1)
    step = change.get("step", moved)(model)
    loss = change.get("loss", lambda model: model(torch.ones(2, 3)).sum())
    if "model" in change:
        change["model"](model)
    with pytest.raises(ValueError, match=message):
        local_smoothness(lambda: loss(model), model, step, points=change.get("points", 4))


def trained(probe_every=None, optimizer_type=torch.optim.SGD, policy=None, steps=6, **options):
    """Weights after a few steps with dropout, and the probe."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    optimizer = optimizer_type(model.parameters(), **options)
    guard = gk.attach(optimizer, policy, model=model)
    inputs, targets = torch.randn(16, 4), torch.randn(16, 1)

    def loss():
        return nn.functional.mse_loss(model(inputs), targets)

    probe = None if probe_every is None else SmoothnessProbe(optimizer, loss, model=model, every=probe_every)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        if optimizer_type is torch.optim.LBFGS:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    guard.detach()
    return list(model.state_dict().values()), probe


@pytest.mark.parametrize(
    ("optimizer_type", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 0.01}),
        (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
    ],
)
def test_training_is_bit_by_bit_the_same_with_a_probe(optimizer_type, options):
    plain, _ = trained(None, optimizer_type, **options)
    watched, probe = trained(2, optimizer_type, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert [m.step for m in probe.measurements] == [1, 3, 5]
    assert all(m.smoothness > 0 for m in probe.measurements)


def test_the_step_that_is_measured_is_the_clipped_one():
    _, probe = trained(1, policy=gk.ClipByGlobalNorm(0.01), lr=0.1)
    for measured in probe.measurements:
        # lr * bound, to float32's rounding of weights of size 1 in a step of 1e-3.
        assert measured.length == pytest.approx(1e-3, rel=1e-3)


def test_a_skipped_step_is_not_measured():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    probe = SmoothnessProbe(optimizer, lambda: weight.pow(2).sum())
    weight.grad = torch.tensor([1.0, math.nan, 1.0])
    with pytest.warns(gk.GradkeelWarning, match="skip"):
        optimizer.step()
    assert probe.measurements == ()
    weight.grad = torch.ones(3)
    optimizer.step()
    assert [m.step for m in probe.measurements] == [2]


def test_a_detached_probe_measures_no_more():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    probe = SmoothnessProbe(optimizer, lambda: weight.pow(2).sum())
    weight.grad = torch.ones(3)
    optimizer.step()
    probe.detach()
    optimizer.step()
    assert len(probe.measurements) == 1
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks


@pytest.mark.parametrize(
    ("optimizer_type", "options"),
    [(torch.optim.AdamW, {"lr": 0.01}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})],
)
def test_no_constants_are_fitted_to_steps_that_do_not_follow_the_gradient(optimizer_type, options):
    _, probe = trained(1, optimizer_type, steps=30, **options)
    fit = probe.fit()
    assert not fit.related
    assert math.isnan(fit.L1)
    assert "not plain SGD" in fit.reason
    assert fit.safe_bound(0.1) is None
    assert math.isfinite(fit.correlation)


@pytest.mark.parametrize("argument", ["every", "points"])
def test_a_probe_refuses_intervals_below_one(argument):
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"{argument}=0"):
        SmoothnessProbe(torch.optim.SGD([weight], lr=0.1), weight.sum, **{argument: 0})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_randomness_of_the_accelerator_is_restored():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).cuda()
    inputs = torch.randn(16, 4, device="cuda")
    before = torch.cuda.get_rng_state()
    local_smoothness(lambda: model(inputs).pow(2).mean(), model, moved(model))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    model(inputs)
    assert not torch.equal(torch.cuda.get_rng_state(), before)
