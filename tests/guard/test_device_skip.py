"""Skipping on the device, without the host: its logic, run by the fused CPU kernels, which read the same attributes."""

import math
from types import SimpleNamespace

import pytest
import torch

import gradkeel as gk
from gradkeel.apply.fused import reads_grad_scale
from gradkeel.guard import guard as guard_module
from gradkeel.guard.skips import SkipWatch
from optimizers import BY_NAME, FUSED, contents, is_same

NAMES = [f"{kind.__name__}-fused" for kind in FUSED]


@pytest.fixture
def on_device(monkeypatch):
    """Steps may be skipped by the kernel, as on an accelerator; verdicts arrive at the next step."""
    asked = []

    def can_skip(optimizer, device, parameters):
        asked.append(reads_grad_scale(optimizer) and all(optimizer.state.get(p) for p in parameters))
        return asked[-1]

    def watch(self, report, stepped):
        self._arriving.append((report, stepped, SimpleNamespace(is_there=lambda: True)))

    monkeypatch.setattr(guard_module, "can_skip_on_device", can_skip)
    monkeypatch.setattr(SkipWatch, "watch", watch)
    return asked


def train(name, policy, steps, bad_steps=(), scale=None, **arguments):
    case = BY_NAME[name]
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    guard = gk.attach(optimizer, policy, model=model, **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    reports = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(step) * (math.nan if step in bad_steps else 1.0)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        reports.append(guard.report)
    return model, optimizer, guard, reports


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("policy", ["global-norm:0.5", "norm:0.5", "value:0.1", "zclip:warmup=2", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_the_device_does_what_the_host_would(name, policy, scale, request):
    model, optimizer, guard, reports = train(name, policy, 6, bad_steps=(3, 4), scale=scale)
    asked = request.getfixturevalue("on_device")
    other, fused, device_guard, told = train(name, policy, 6, bad_steps=(3, 4), scale=scale)
    # Not on the first step, where no state exists yet; Adagrad makes its own when it is built.
    assert asked == [name == "Adagrad-fused", True, True, True, True, True]
    assert is_same(contents(model, optimizer), contents(other, fused))
    assert is_same(guard.state_dict()["states"], device_guard.state_dict()["states"])
    assert isinstance(told[-1].stepped_or_pending, torch.Tensor)
    assert [report.stepped for report in told] == [report.stepped for report in reports]
    assert [report.norm for report in told] == pytest.approx([report.norm for report in reports], nan_ok=True)
    assert not {"grad_scale", "found_inf"} & vars(fused).keys()


def test_the_warning_comes_with_the_next_step_and_names_the_parameter(on_device):
    with pytest.warns(
        gk.errors.SkippedStepWarning, match=r"step 2: the gradient of 'weight' is not finite \(NaN\)"
    ):
        _, _, guard, reports = train("AdamW-fused", "none", 3, bad_steps=[1])
    assert reports[1].reason == "step 2: the gradient of 'weight' is not finite (NaN)"
    assert guard.report.reason is None


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_too_many_skips_raise_when_they_are_known(on_device):
    with pytest.raises(
        gk.TooManySkipsError, match=r"max_consecutive_skips=2(.|\n)*step 2(.|\n)*step 3(.|\n)*step 4"
    ):
        train("AdamW-fused", "none", 6, bad_steps=range(1, 6), max_consecutive_skips=2)


def test_an_overflow_of_the_loss_scale_is_neither_warned_of_nor_counted(on_device):
    _, _, _, reports = train(
        "AdamW-fused", "none", 8, bad_steps=range(1, 7), scale=1024.0, max_consecutive_skips=2
    )
    assert [report.stepped for report in reports] == [True, *[False] * 6, True]


def test_a_step_that_raises_leaves_no_verdict_behind(on_device):
    case = BY_NAME["AdamW-fused"]
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.5), model=model)
    loss(0).backward()
    optimizer.step()

    def fail(optimizer, args, kwargs):
        raise MemoryError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    handle.remove()
    assert hasattr(optimizer, "found_inf")
    norm = guard.report.norm
    optimizer.zero_grad()
    loss(0).backward()
    optimizer.step()
    assert guard.report.stepped
    assert guard.report.norm != norm  # another place, true gradients
    assert guard.report.clipped_norm == pytest.approx(0.5, rel=1e-9)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
