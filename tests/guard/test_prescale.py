"""With torch.amp.GradScaler: true norms, agreement on skips, and nothing left behind."""

import math
import types

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.guard import prescale
from gradkeel.guard.prescale import put_back, take_loss_scale
from optimizers import CASES, contents, is_same

SCALE = 65536.0
SCALABLE = [case for case in CASES if not case.closure]  # GradScaler takes no closures


def scaler_of(scale=SCALE, **arguments):
    return torch.amp.GradScaler("cpu", init_scale=scale, **arguments)


def train(case, steps, policy, *, scale, unscale, bad_steps=(), nonfinite="skip"):
    """Training under a loss scale; at the bad steps the loss is multiplied by inf."""
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    guard = gk.attach(optimizer, policy, model=model, nonfinite=nonfinite)
    scaler = scaler_of(scale) if scale else scaler_of(enabled=False)
    reports = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(step)
        scaler.scale(value * math.inf if step in bad_steps else value).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        reports.append(guard.report)
    return model, optimizer, reports, scaler


@pytest.fixture(params=SCALABLE, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.mark.parametrize("unscale", [False, True])
def test_the_clip_sees_true_gradients(case, unscale):
    model, _, reports, _ = train(case, 3, "global-norm:0.5", scale=SCALE, unscale=unscale)
    plain, _, wanted, _ = train(case, 3, "global-norm:0.5", scale=None, unscale=False)
    for got, want in zip(reports, wanted, strict=True):
        # a power of two scales without rounding; the optimizers divide by it in another order: seen 3e-8
        assert got.norm == pytest.approx(want.norm, rel=1e-6)
        assert got.clipped_norm == pytest.approx(0.5, rel=1e-9)
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_scaler_and_guard_agree_on_a_skip_that_changes_no_bit(case, bad_step, unscale):
    model, optimizer, _, _ = train(case, bad_step, "global-norm:0.5", scale=SCALE, unscale=unscale)
    before = contents(model, optimizer)
    model, optimizer, reports, scaler = train(
        case, bad_step + 1, "global-norm:0.5", scale=SCALE, unscale=unscale, bad_steps=[bad_step]
    )
    assert is_same(contents(model, optimizer), before)
    assert not reports[-1].stepped
    assert reports[-1].reason.startswith(f"step {bad_step + 1}: the loss scale overflowed")
    assert scaler.get_scale() == SCALE / 2


def test_an_overflow_is_normal_whatever_was_asked_for(case):
    for nonfinite in ("skip", "raise", "keep"):
        _, _, reports, _ = train(
            case, 14, "none", scale=SCALE, unscale=False, bad_steps=range(12), nonfinite=nonfinite
        )
        assert [report.stepped for report in reports] == [False] * 12 + [True] * 2


@pytest.mark.parametrize("unscale", [False, True])
def test_excluded_gradients_are_unscaled_but_not_clipped(unscale):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, "global-norm:0.1,exclude=bias", model=model)
    scaler = scaler_of()
    before = model.bias.detach().clone()
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert guard.report.norms["bias"] == 1.0
    assert (before - model.bias).item() == pytest.approx(1.0, rel=1e-6)
    assert model.weight.grad.norm().item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_without_gradients_under_a_scaler(fused):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=fused)
    guard = gk.attach(optimizer, gk.ClipByNorm(1.0))
    scaler = scaler_of()
    scaler.scale(torch.ones((), requires_grad=True) * 1.0)  # makes the scaler's tensors, as any loss does
    scaler.step(optimizer)
    assert guard.report.reason == "no parameter has a gradient"
    assert parameter.tolist() == [1.0, 1.0]


def test_half_precision_gradients_are_unscaled():
    """Stock GradScaler refuses float16 gradients with optimizers that are not fused; here they are just numbers."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    scaler = scaler_of(1024.0)
    scaler.scale((parameter * torch.tensor([3.0, 4.0])).sum()).backward()
    scaler.step(optimizer)
    assert guard.report.norm == pytest.approx(5.0, rel=1e-9)
    # two roundings of float16 (4.9e-4): of the gradient and of the parameter
    assert parameter.tolist() == pytest.approx([0.4, 0.2], abs=1e-3)


def test_detach_gives_the_scaler_its_old_way_back():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    gk.attach(optimizer, gk.ClipByNorm(1.0)).detach()
    scaler = scaler_of()
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)  # Adam asserts that no scale reaches it
    assert parameter.grad.tolist() == [1.0, 1.0]


# -- a step that raises -----------------------------------------------------------------------------------------


def raise_once(optimizer):
    """Lets the optimizer's next step fail after the guard has done its work."""

    def refuse(optimizer, args, kwargs):
        handle.remove()
        raise OSError("no")

    handle = optimizer.register_step_pre_hook(refuse)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled_first", [False, True])
def test_a_step_that_raises_leaves_nothing_behind(fused, unscale, scaled_first):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=fused)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    scaler = scaler_of()

    def backward(scaled):
        parameter.grad = None
        loss = (parameter * torch.tensor([30.0, 40.0])).sum()
        (scaler.scale(loss) if scaled else loss).backward()

    raise_once(optimizer)
    backward(scaled_first)
    with pytest.raises(OSError, match="no"):
        scaler.step(optimizer) if scaled_first else optimizer.step()
    for _ in range(2):
        backward(scaled=True)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert guard.report.norm == pytest.approx(50.0, rel=1e-6)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    assert parameter.tolist() == pytest.approx([-1.2, -1.6], rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_raises_before_a_plain_step(fused):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=fused)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    raise_once(optimizer)
    parameter.grad = torch.tensor([30.0, 40.0])
    with pytest.raises(OSError, match="no"):
        optimizer.step()
    parameter.grad = torch.tensor([30.0, 40.0])
    optimizer.step()
    assert guard.report.norm == pytest.approx(50.0)
    assert parameter.tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)


# -- the attributes themselves ----------------------------------------------------------------------------------


def test_the_attributes_go_in_and_out():
    optimizer = types.SimpleNamespace(grad_scale=torch.tensor(4.0), found_inf=torch.tensor(0.0))
    taken = take_loss_scale(optimizer, {})
    assert vars(optimizer) == {}
    assert (taken.present, taken.scale.item(), taken.found_inf.item()) == (True, 4.0, 0.0)
    put_back(optimizer, taken)
    assert (optimizer.grad_scale.item(), optimizer.found_inf.item()) == (4.0, 0.0)


def test_an_explicit_unscale_leaves_no_scale():
    optimizer = types.SimpleNamespace(grad_scale=None, found_inf=torch.tensor(1.0))
    taken = take_loss_scale(optimizer, {})
    assert (taken.present, taken.scale, taken.found_inf.item()) == (True, None, 1.0)


def test_what_gradkeel_left_itself_is_no_scalers():
    scale, verdict = torch.tensor(8.0), torch.tensor(1.0)
    own = {"grad_scale": scale, "found_inf": verdict}
    optimizer = types.SimpleNamespace(grad_scale=scale, found_inf=verdict)
    assert not take_loss_scale(optimizer, own).present
    assert vars(optimizer) == {}
    # the scaler multiplies into what it finds, and sets its own verdict
    optimizer = types.SimpleNamespace(grad_scale=4.0 * scale, found_inf=torch.tensor(0.0))
    taken = take_loss_scale(optimizer, own)
    assert (taken.present, taken.scale.item(), taken.found_inf.item()) == (True, 4.0, 0.0)
    # after an explicit unscale_ it passes on what it finds
    optimizer = types.SimpleNamespace(grad_scale=scale, found_inf=torch.tensor(0.0))
    taken = take_loss_scale(optimizer, own)
    assert (taken.present, taken.scale, taken.found_inf.item()) == (True, None, 0.0)


@pytest.mark.parametrize("window", [1.0, 0.25, torch.tensor(0.25)])
def test_prescale_is_window_over_scale(window):
    taken = prescale.LossScale(True, torch.tensor(4.0), None)
    factor = prescale.prescale(taken, window, torch.device("cpu"))
    assert float(factor) == float(window) / 4.0
    assert prescale.prescale(prescale.LossScale(), window, torch.device("cpu")) is window
