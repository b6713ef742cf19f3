"""GradScaler is not an excuse: an overflow is what it says it is, and a guard that only measures changes nothing."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD

import gradkeel as gk
from gradkeel.guard import SkipReason
from gradkeel.guard.skips import SkipWatch
from optimizers import is_same

SKIPPED = pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")


class Counting(SGD):
    """Counts its steps in its group, and decays by the count, as many optimizers from outside torch do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                parameter.data.mul_(1.0 - 0.01 * group["k"])
        return super().step(closure)


def train(kind, *, attach=None, unscale=False, steps=8, overflows=(0, 1, 4), network=None):
    torch.manual_seed(0)
    model = network or nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    optimizer = kind(model.parameters(), lr=0.1)
    guard = attach and attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients = []
    for step in range(steps):
        data = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
        loss = model(data).square().mean()
        scaler.scale(loss * (math.inf if step in overflows else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        gradients.append([p.grad is None for p in model.parameters()])
        optimizer.zero_grad()
    return guard, scaler, (dict(model.state_dict()), [g.get("k") for g in optimizer.param_groups], gradients)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", [Counting, SGD])
def test_a_guard_that_only_measures_changes_nothing_that_torch_would_not(kind, unscale):
    guard, scaler, contents = train(
        kind, unscale=unscale, attach=lambda o, model: gk.attach(o, None, model=model)
    )
    _, plain, wanted = train(kind, unscale=unscale)
    assert is_same(contents, wanted)
    assert scaler.state_dict() == plain.state_dict()
    assert guard.step == 8


# -- NaN for ever -------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, data):
        return (data * self.weight * math.nan).sum()


def broken(unscale, **arguments):
    reports = []

    def attach(optimizer, model):
        guard = gk.attach(optimizer, None, model=model, **arguments)
        guard.recorders.append(
            type("Notes", (), {"record": lambda _, r: reports.append(r), "close": lambda _: None})()
        )
        return guard

    def run(steps):
        return train(SGD, attach=attach, unscale=unscale, steps=steps, network=Broken())

    return run, reports


@pytest.mark.parametrize("unscale", [False, True])
def test_nan_for_ever_is_counted_warned_of_and_raised(unscale):
    run, reports = broken(unscale, max_consecutive_skips=4)
    with (
        pytest.warns(
            gk.SkippedStepWarning, match=r"'weight' is not finite \(NaN\).*overflowed 11 times in a row"
        ),
        pytest.raises(gk.TooManySkipsError, match="more steps in a row than max_consecutive_skips=4"),
    ):
        run(300)
    # From 1024 to 1 it may be the scale; below 1 it is not.
    reasons = [report.why for report in reports]
    assert reasons == [SkipReason.LOSS_SCALE] * 11 + [SkipReason.NONFINITE] * 4


def test_one_overflow_is_not_called_several():
    watch = SkipWatch(3)
    watch.overflowed()
    assert "overflowed once, is not to blame" in watch.explained("step 2")


@pytest.mark.parametrize("unscale", [False, True])
def test_nan_for_ever_raises_where_asked(unscale):
    run, reports = broken(unscale, nonfinite="raise")
    with pytest.raises(gk.NonFiniteGradientError, match=r"step 12: the gradient of 'weight'"):
        run(300)
    assert len(reports) == 11


def test_nan_for_ever_is_kept_where_asked():
    run, reports = broken(unscale=False, nonfinite="keep")
    run(14)
    assert [report.stepped for report in reports] == [False] * 11 + [True] * 3


@SKIPPED
def test_a_scale_that_never_falls_is_no_excuse_either():
    """Nobody calls ``update``, or the scale is constant."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = SGD([parameter], lr=0.1)
    gk.attach(optimizer, None, max_consecutive_skips=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=0.999999)

    def steps():
        for _ in range(50):
            scaler.scale(parameter.sum() * math.nan).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    with pytest.raises(gk.TooManySkipsError):
        steps()


# -- NaN that the scaler did not see ------------------------------------------------------------------------------


def unseen(nonfinite):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = SGD([parameter], lr=0.1)
    guard = gk.attach(optimizer, None, nonfinite=nonfinite)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    parameter.grad.data[0] = math.nan  # as a step of the user's own between unscale_ and step leaves it
    scaler.step(optimizer)
    return guard, parameter


def test_what_the_scaler_did_not_find_is_no_overflow():
    with pytest.warns(gk.SkippedStepWarning, match=r"'0' is not finite \(NaN\)"):
        guard, parameter = unseen("skip")
    assert guard.report.why is SkipReason.NONFINITE
    assert parameter.tolist() == [1.0, 1.0]
    with pytest.raises(gk.NonFiniteGradientError):
        unseen("raise")
    guard, parameter = unseen("keep")
    assert guard.report.stepped
    assert parameter.isnan().tolist() == [True, False]


# -- a step that is called again ----------------------------------------------------------------------------------


class Failing(SGD):
    failures = 1

    def step(self, closure=None):
        if self.failures:
            self.failures -= 1
            raise OSError("for once")
        return super().step(closure)


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("policy", [None, gk.ClipByGlobalNorm(1.0), gk.policies.SmoothClip(1.0)])
def test_a_retried_step_is_unscaled_and_clipped_once(policy, unscale, failures):
    wanted, got = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    for parameter, kind in ((wanted, SGD), (got, Failing)):
        optimizer = kind([parameter], lr=1.0)
        optimizer.failures = failures
        guard = gk.attach(optimizer, policy)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(2):
            scaler.scale(parameter.sum() * 3.0).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if kind is Failing and step == 0:
                for _ in range(failures):
                    with pytest.raises(OSError, match="for once"):
                        scaler.step(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert guard.report.norm == 3.0
            optimizer.zero_grad()
        assert guard.step == 2
    assert got.item() == wanted.item()


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("factor", [3.0, math.nan])
def test_a_step_that_is_retried_after_another_hook_raised_is_unscaled_once(factor):
    failures = [True]

    def fails(*_):
        if failures:
            failures.pop()
            raise OSError("for once")

    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=1.0, weight_decay=0.1)
    guard = gk.attach(optimizer, None)
    optimizer.register_step_pre_hook(fails)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(parameter.sum() * factor).backward()
    with pytest.raises(OSError, match="for once"):
        scaler.step(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert parameter.item() == (0.0 if math.isnan(factor) else -3.0)
    # Nobody has raised in a step that follows, even if it is on the same gradients.
    if factor == 3.0:
        optimizer.step()
        optimizer.step()
        assert guard.step == 3
        assert guard.report.norm == 3.0


def test_a_window_is_divided_once_where_its_step_is_retried():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = Failing([parameter], lr=1.0)
    accumulate = gk.Accumulator(gk.attach(optimizer, None), steps=2)
    for micro in accumulate([1.0, 3.0]):
        with micro:
            micro.backward(parameter.sum() * micro.batch, weight=1)
    with pytest.raises(OSError, match="for once"):
        optimizer.step()
    optimizer.step()
    assert parameter.item() == -2.0


def test_new_gradients_after_a_step_that_raised_are_new():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = Failing([parameter], lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    for factor in (3.0, 5.0):
        optimizer.zero_grad()
        (parameter.sum() * factor).backward()
        if factor == 3.0:
            with pytest.raises(OSError, match="for once"):
                optimizer.step()
    optimizer.step()
    assert guard.report.norm == 5.0


# -- steps without gradients --------------------------------------------------------------------------------------


def steps_without(count, model, optimizer):
    for _ in range(count):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("given", [True, False])
def test_steps_of_parameters_that_were_replaced_are_warned_of(given):
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model if given else None)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    words = "the model's parameters are others by now" if given else "backward\\(\\) reaches none of them"
    with pytest.warns(gk.SkippedStepWarning, match=f"3 steps in a row .*{words}") as warned:
        steps_without(8, model, optimizer)
    assert len(warned) == 1
    assert guard.report.why is SkipReason.NO_GRADIENT


def test_steps_of_frozen_parameters_are_warned_of():
    model = nn.Linear(2, 1).requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    optimizer.step()
    optimizer.step()
    with pytest.warns(gk.SkippedStepWarning, match=r"frozen \(requires_grad=False\)"):
        optimizer.step()


def test_a_step_without_gradients_now_and_then_is_none_of_these():
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(12):
            optimizer.zero_grad()
            if step % 3 == 0:
                model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
