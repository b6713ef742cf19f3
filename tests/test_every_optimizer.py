"""One battery over every optimizer of torch.optim: clipped as by hand, untouched when inactive, skipped bit by bit."""

import math

import pytest
import torch
from torch import optim

import gradkeel as gk
import reference
from optimizers import BY_NAME, CASES, FUSED, contents, is_same

BOUND = 0.5

pytestmark = pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def train(case, steps, *, attach=None, after_backward=lambda model, step: None):
    """Model, optimizer and guard after some steps; ``after_backward`` may spoil or clip each fresh gradient."""
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    guard = attach and attach(optimizer, model)
    for step in steps:
        case.step(optimizer, lambda step=step: loss(step), lambda step=step: after_backward(model, step))
    return model, optimizer, guard


def clipped(optimizer, model):
    return gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), model=model)


def clip_by_hand(model, step):
    parameters = [p for p in model.parameters() if p.grad is not None]
    for parameter, gradient in zip(
        parameters, reference.clip_by_global_norm([p.grad for p in parameters], BOUND), strict=True
    ):
        parameter.grad = gradient


def spoil(step_to_spoil):
    def after_backward(model, step):
        if step == step_to_spoil:
            gradient = next(model.parameters()).grad
            # Through .data, as backward itself would write it: the version counter does not move.
            (gradient._values() if gradient.is_sparse else gradient).data.view(-1)[0] = math.nan

    return after_backward


def test_every_optimizer_of_torch_has_its_line():
    known = {type(case.make(list(case.problem()[0].parameters()))) for case in CASES}
    public = {
        kind for kind in vars(optim).values() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)
    }
    assert known == public - {optim.Optimizer}


def test_clips_as_by_hand(case):
    model, _, guard = train(case, range(4), attach=clipped)
    by_hand, _, _ = train(case, range(4), after_backward=clip_by_hand)
    assert guard.report.clipped
    assert guard.report.stepped
    for got, wanted in zip(model.parameters(), by_hand.parameters(), strict=True):
        # fp32: some roundings of the gradient, magnified by moments in the first steps; seen 2e-7.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["global-norm:1e9", "norm:1e9", "value:1e9", "none"])
def test_leaves_training_alone_below_the_bound(case, policy):
    model, optimizer, _ = train(case, range(3), attach=lambda optimizer, model: gk.attach(optimizer, policy))
    alone, unguarded, _ = train(case, range(3))
    assert is_same(contents(model, optimizer), contents(alone, unguarded))


@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_skipped_step_changes_no_bit(case, bad_step):
    model, optimizer, _ = train(case, range(bad_step), attach=clipped)
    before = contents(model, optimizer)
    model, optimizer, guard = train(case, range(bad_step + 1), attach=clipped, after_backward=spoil(bad_step))
    assert is_same(contents(model, optimizer), before)
    assert not guard.report.stepped
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_goes_on_after_a_skip_as_if_it_had_not_been(case):
    model, optimizer, guard = train(case, [0, 1, 2, 3], attach=clipped, after_backward=spoil(1))
    without, other, _ = train(case, [0, 2, 3], attach=clipped)
    assert is_same(contents(model, optimizer), contents(without, other))
    assert guard.step == 4


def test_a_skipped_first_step_leaves_training_as_if_it_had_not_been(case):
    model, optimizer, _ = train(case, [0, 1, 2], attach=clipped, after_backward=spoil(0))
    without, other, _ = train(case, [1, 2], attach=clipped)
    assert is_same(contents(model, optimizer), contents(without, other))


def test_raise_changes_no_bit(case):
    model, optimizer, _ = train(case, range(2), attach=clipped)
    before = contents(model, optimizer)
    kept = []

    def raising(optimizer, model):
        kept.extend([model, optimizer])
        return gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), model=model, nonfinite="raise")

    with pytest.raises(
        gk.NonFiniteGradientError, match=r"step 3: the gradient of 'weight' is not finite \(NaN\)"
    ):
        train(case, range(3), attach=raising, after_backward=spoil(2))
    assert is_same(contents(*kept), before)


def test_keep_steps_on(case):
    model, _, guard = train(
        case,
        range(2),
        attach=lambda optimizer, model: gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), nonfinite="keep"),
        after_backward=spoil(1),
    )
    unguarded, _, _ = train(case, range(2), after_backward=spoil(1))
    assert guard.report.stepped
    assert math.isnan(guard.report.norm)
    assert [p.isnan().any() for p in model.parameters()] == [p.isnan().any() for p in unguarded.parameters()]


def test_a_closure_serves_every_optimizer(case):
    if case.closure:
        pytest.skip("is closures in every test")
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    guard = clipped(optimizer, model)
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            return value

        value = optimizer.step(closure)
    direct, other, direct_guard = train(case, range(3), attach=clipped)
    assert value.requires_grad
    assert is_same(contents(model, optimizer), contents(direct, other))
    assert guard.report.norm == direct_guard.report.norm


@pytest.mark.parametrize("kind", [kind.__name__ for kind in FUSED])
def test_fused_optimizers_take_the_coefficient_in_their_kernel(kind):
    case = BY_NAME[f"{kind}-fused"]
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    guard = clipped(optimizer, model)
    seen = []
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(
            (float(getattr(optimizer, "grad_scale", math.nan)), [p.grad._version for p in model.parameters()])
        )
    )
    loss(0).backward()
    versions = [p.grad._version for p in model.parameters()]
    optimizer.step()
    # grad_scale is float32: half a rounding of 6e-8.
    assert seen == [(pytest.approx(1.0 / guard.report.coefficient, rel=1e-7), versions)]
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.name.endswith("-fused")])
def test_no_other_optimizer_is_given_a_scale(name):
    case = BY_NAME[name]
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    clipped(optimizer, model)
    seen = []
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(hasattr(optimizer, "grad_scale"))
    )
    case.step(optimizer, lambda: loss(0))
    assert seen == [False]
