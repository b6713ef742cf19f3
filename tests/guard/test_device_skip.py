"""Skipping on the device, without the host: run by the fused CPU kernels, which read the same attributes.

Played is only what a CPU cannot do: to be an accelerator, and to let a flag arrive some time after it was sent.
"""

import math
import pickle
import sys
import warnings

import pytest
import torch

import gradkeel as gk
from gradkeel.guard import pipeline as pipeline_module
from gradkeel.guard import skips as skips_module
from gradkeel.guard import step as step_module
from gradkeel.guard.report import SkipReason
from gradkeel.integrations.callback import Told
from gradkeel.norms import Decision
from gradkeel.record import Reader
from optimizers import BY_NAME, FUSED, contents, is_same

NAMES = [f"{kind.__name__}-fused" for kind in FUSED]


class Accelerator:
    """The CPU, taken for an accelerator."""

    type = "cuda"

    def __eq__(self, other):
        return other == torch.device("cpu")

    __hash__ = None


class Late:
    """Stands for the arrival of what the device sent: it is there once ``so_far`` allows it."""

    sent, so_far = 0, math.inf

    def __init__(self, device):
        Late.sent += 1
        self.place = Late.sent

    def is_there(self):
        return self.place <= Late.so_far

    def wait(self):
        """Who asks for a verdict that has not arrived waits for it."""


@pytest.fixture
def on_device(monkeypatch):
    """Steps may be skipped by the kernel, as on an accelerator; what each step's gradients allowed."""
    asked = []
    real = pipeline_module.can_skip_on_device

    def can_skip(optimizer, device, parameters):
        asked.append(real(optimizer, Accelerator(), parameters))
        return asked[-1]

    monkeypatch.setattr(pipeline_module, "can_skip_on_device", can_skip)
    monkeypatch.setattr(step_module, "known", torch.as_tensor)  # the host may not look
    monkeypatch.setattr(skips_module, "Arrival", Late)
    monkeypatch.setattr(Late, "sent", 0)
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
    assert [report.reason for report in told] == [report.reason for report in reports]
    assert [report.clipped for report in told] == [report.clipped for report in reports]
    assert [report.coefficient for report in told] == pytest.approx(
        [report.coefficient for report in reports]
    )
    assert [report.norm for report in told] == pytest.approx([report.norm for report in reports], nan_ok=True)
    assert not {"grad_scale", "found_inf"} & vars(fused).keys()


def test_the_warning_comes_with_the_next_step_and_says_where_it_began(on_device):
    with pytest.warns(
        gk.errors.SkippedStepWarning,
        match=r"step 2: all 2 gradients are not finite \(NaN\): it came with the loss",
    ):
        _, _, guard, reports = train("AdamW-fused", "none", 3, bad_steps=[1])
    assert reports[1].reason == "step 2: all 2 gradients are not finite (NaN): it came with the loss"
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


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("so_far", [0, math.inf])
def test_a_skipped_step_is_told_alike_whoever_skips_and_however_late_it_is_heard(
    so_far, request, tmp_path, monkeypatch
):
    found = []
    for name in ("host", "device"):
        if name == "device":
            request.getfixturevalue("on_device")
            monkeypatch.setattr(Late, "so_far", so_far)
        path = tmp_path / f"{name}.keel"
        _, _, guard, reports = train("AdamW-fused", "norm:0.1", 8, [*range(1, 4), 6], 64.0, record=path)
        guard.detach()
        with Reader(path) as run:
            numbers = [run.series(key).tolist() for key in ("coefficient", "verdict", "coefficients")]
            why = [(report.skip_reason, report.reason) for report in reports]
            found.append((numbers, why, run.skips(), run.series("clipped_total").nan_to_num().tolist()))
        copied = pickle.loads(pickle.dumps(reports[2]))
        assert copied.skip_reason is SkipReason.LOSS_SCALE
        assert (copied.selections[0].coefficient, copied.selections[0].clipped) == (1.0, False)
    assert found[0] == found[1]
    assert {why for why, _ in found[0][1]} == {None, SkipReason.LOSS_SCALE}


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_an_overflow_is_no_alarm(scale, on_device):
    """It would use the one autopsy up that steps which are not finite have."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True)
    autopsy = gk.Autopsy(gk.attach(optimizer, None), loss=lambda batch: (parameter * batch).sum())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.errors.GradkeelWarning)
        for factor in (1.0, math.inf):
            optimizer.zero_grad()
            with autopsy(torch.ones(2) * factor):
                scaler.scale(autopsy.loss()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert (autopsy.last is None) == (scale is not None)


def test_a_skip_that_the_policy_asks_for_is_neither_warned_of_nor_counted(on_device):
    class Wary(gk.ClipByGlobalNorm):
        def decide(self, norms, state):
            return Decision(skip=torch.tensor(norms.step > 2)), state

    _, _, guard, reports = train("AdamW-fused", Wary(1.0), 6, max_consecutive_skips=2)
    assert [report.skip_reason for report in reports] == [None] * 2 + [SkipReason.POLICY] * 4
    assert on_device[2:] == [True] * 4
    assert guard.state_dict()["consecutive_skips"] == 0


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_trainers_are_told_of_a_skipped_step_as_of_one_that_was_not_clipped(on_device):
    parameter = torch.nn.Parameter(torch.ones(2))
    guard = gk.attach(torch.optim.SGD([parameter], lr=0.1, fused=True), gk.ClipByGlobalNorm(1.0))
    told = Told(guard)
    for entry, wanted in ((3.0, (0.25, 1.0, 0)), (math.inf, (1.0, 0.5, 1)), (3.0, (0.25, 2 / 3, 1))):
        parameter.grad = torch.tensor([entry, math.sqrt(7)])
        guard.optimizer.step()
        assert told.look()
        numbers = told.numbers()
        found = [float(numbers[key]) for key in ("clip_coefficient", "clipped_share", "skipped_steps")]
        assert found == pytest.approx(wanted)


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


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_not_left_to_the_device(name, on_device):
    """A skip there would create state all the same; kernels that keep none, or made it before, need no host."""
    train(name, "none", 2)
    assert on_device == [name == "Adagrad-fused", True]


def test_sgd_without_momentum_keeps_no_state(on_device):
    parameter = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [parameter]}, {"params": [torch.nn.Parameter(torch.ones(1))], "momentum": 0.9}]
    for chosen, wanted in ((groups[:1], True), (groups, False)):
        guard = gk.attach(torch.optim.SGD(chosen, lr=1.0, fused=True), None)
        parameter.grad = torch.ones(2)
        guard.optimizer.step()
        assert on_device.pop() == wanted
        guard.detach()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, [False, True, True]),
        ({"fused": False}, [False, False, False]),
        ({"nonfinite": "raise"}, []),
        ({"nonfinite": "keep"}, []),
    ],
)
def test_only_fused_kernels_under_skip_are_trusted_with_it(change, wanted, on_device):
    fused, nonfinite = change.get("fused", True), change.get("nonfinite", "skip")
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    guard = gk.attach(torch.optim.Adam(parameters, lr=0.1, fused=fused), None, nonfinite=nonfinite)
    for _ in range(3):
        parameters[0].grad = torch.ones(2)
        guard.optimizer.step()
    assert on_device == wanted
    if wanted and wanted[-1]:  # the other parameter has no state yet, and its gradient comes now
        parameters[1].grad = torch.ones(2)
        guard.optimizer.step()
        guard.optimizer.step()
        assert on_device[-2:] == [False, True]


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_a_verdict_is_judged_when_it_arrives_and_not_before(on_device, monkeypatch):
    monkeypatch.setattr(Late, "so_far", 0)
    _, optimizer, guard, reports = train("AdamW-fused", "none", 5, bad_steps=[1, 2, 3])
    assert [report.stepped for report in reports] == [True, False, False, False, True]
    assert guard.state_dict()["consecutive_skips"] == 0
    counts = []
    for so_far in (0, 1, 3, 3, 4):  # of the verdicts of steps 2, 3, 4 (skips) and 5
        monkeypatch.setattr(Late, "so_far", so_far)
        optimizer.step()
        counts.append(guard.state_dict()["consecutive_skips"])
    assert counts == [0, 1, 3, 3, 0]


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_skips_that_arrive_together_are_counted_one_by_one(on_device, monkeypatch):
    monkeypatch.setattr(Late, "so_far", 0)
    _, optimizer, guard, _ = train("AdamW-fused", "none", 5, bad_steps=[1, 2, 3], max_consecutive_skips=2)
    monkeypatch.setattr(Late, "so_far", math.inf)
    with pytest.raises(gk.TooManySkipsError, match=r"step 2(.|\n)*step 3(.|\n)*step 4"):
        optimizer.step()
    assert guard.step == 5
    optimizer.step()  # has the whole allowance again
    assert (guard.step, guard.state_dict()["consecutive_skips"]) == (6, 0)


def test_a_good_step_between_ends_the_row(on_device):
    with pytest.warns(gk.errors.SkippedStepWarning, match="step 2"):
        _, _, guard, reports = train(
            "AdamW-fused", "none", 9, bad_steps=[1, 2, 4, 5, 7], max_consecutive_skips=2
        )
    assert [report.stepped for report in reports] == [step not in (1, 2, 4, 5, 7) for step in range(9)]
    assert guard.step == 9


def test_no_step_waits_for_the_verdict_of_the_one_before(on_device):
    """What is not there yet stays a tensor in the report, until somebody reads it."""
    _, _, _, reports = train("AdamW-fused", "global-norm:0.5", 3)
    assert [isinstance(report.stepped_or_pending, torch.Tensor) for report in reports] == [False, True, True]
    assert reports[2].stepped_tensor() is reports[2].stepped_or_pending
    assert (reports[2].stepped, reports[2].reason) == (True, None)


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("culprit", ["step", "hook"])
@pytest.mark.parametrize("policy", [None, "global-norm:0.5"])
def test_a_retried_step_is_skipped_all_the_same(policy, culprit, on_device, monkeypatch):
    failures = []

    def fails(*_):
        if failures:
            failures.pop()
            raise OSError("for once")

    kernels = sys.modules["torch.optim.adam"]  # torch.optim keeps no such attribute
    real = kernels.adam
    case = BY_NAME["Adam-fused"]
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    gk.attach(optimizer, policy, model=model)
    if culprit == "hook":
        optimizer.register_step_pre_hook(fails)
    else:
        monkeypatch.setattr(kernels, "adam", lambda *a, **kw: (fails(), real(*a, **kw)))
    for factor in (1.0, math.nan):
        optimizer.zero_grad()
        (loss(0) * factor).backward()
        before = contents(model, optimizer)
        failures.append(True)
        with pytest.raises(OSError, match="for once"):
            optimizer.step()
        optimizer.step()
    assert on_device[-1]
    assert is_same(contents(model, optimizer), before)
