"""Autopsies: planted causes are found by experiment, and nothing is left changed by the experiments."""

import contextlib
import copy
import math
import random
import warnings

import numpy
import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.errors import GradkeelWarning
from gradkeel.explain import explain

STEPS, AT = 20, 15


class Network(nn.Module):
    """A network with buffers and dropout, and an operation that can be made to fail."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 16), nn.BatchNorm1d(16)
        self.drop, self.middle, self.last = nn.Dropout(0.2), nn.Linear(16, 16), nn.Linear(16, 1)
        self.fault = None

    def forward(self, x):
        h = self.middle(self.drop(torch.relu(self.norm(self.first(x)))))
        if self.fault == "nan":
            h = (h - h.amax()).log().clamp(min=-1e9) * h.sign().log()
        if self.fault == "half":
            h = (h.half() * 30000 * 30000).float()
        return self.last(h)


def run(fault, *, record=None, with_autopsy=True, rates=(1e-3, 1e-3), **options):
    """Train with a fault at step ``AT``; returns everything that a step leaves, and the autopsy."""
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)  # noqa: NPY002  # the global state is what is looked at
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = gk.attach(optimizer, "global-norm:1.0", model=model, record=record)

    def loss(batch):
        return ((model(batch[0]) - batch[1]) ** 2 * batch[2]).mean()

    autopsy = gk.Autopsy(guard, loss=loss, **options) if with_autopsy else None
    states, flaky = [], fault == "transient"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, STEPS + 1):
            optimizer.param_groups[0]["lr"] = rates[step >= AT - 2]
            x = torch.randn(8, 4)
            weights = torch.ones(8, 1)
            if step == AT:
                weights[3 if fault == "sample" else slice(None)] *= 1e4 if fault in ("sample", "batch") else 1
                if fault == "state":
                    with torch.no_grad():
                        model.middle.weight.mul_(1e3)
            model.fault = fault if step == AT else None
            batch = (x, x.sum(dim=1, keepdim=True), weights)
            if autopsy is None:
                loss(batch).backward()
            else:
                with autopsy(batch):
                    autopsy.loss().backward()
            if flaky and step == AT:
                model.last.weight.grad.mul_(1e6)
            optimizer.step()
            states.append([p.detach().clone() for p in model.parameters()])
            states.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            states.append([b.clone() for b in model.buffers()])
            states.append([v.clone() for s in optimizer.state.values() for v in s.values()])
            drawn = torch.tensor([random.random(), numpy.random.rand()])  # noqa: NPY002  # as above
            states.append([torch.get_rng_state(), drawn])
            optimizer.zero_grad()
    guard.detach()
    return states, autopsy, [w for w in caught if w.category is GradkeelWarning]


@pytest.mark.parametrize("fault", ["sample", "batch", "nan", "half", "state", "transient"])
def test_the_cause_is_found(fault):
    _, autopsy, warned = run(fault)
    cause = {"nan": "numerics", "half": "numerics"}.get(fault, fault)
    assert autopsy.last.step == AT
    assert autopsy.last.cause == cause
    assert autopsy.last.sample == (3 if fault == "sample" else None)
    assert len(warned) == 1
    assert f"Step {AT}" in str(warned[0].message)
    assert autopsy.last.experiments[0].change == "the same again"
    if cause == "numerics":
        assert autopsy.last.op == {"nan": "log", "half": "mul"}[fault]


@pytest.mark.parametrize("fault", ["sample", "nan", "half", "state", None])
def test_nothing_is_left_changed(fault):
    twin, _, _ = run(fault, with_autopsy=False)
    states, autopsy, _ = run(fault)
    assert (autopsy.last is None) == (fault is None)
    for own, other in zip(states, twin, strict=True):
        for a, b in zip(own, other, strict=True):
            if a is None or b is None:
                assert a is b
            else:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("rates", "cause"), [((1e-4, 1e-3), "learning_rate"), ((1e-3, 1e-4), "state"), ((1e-3, 1e-3), "state")]
)
def test_only_a_rate_that_rose_is_to_blame(rates, cause):
    """A rate that fell was blamed as well."""
    _, autopsy, _ = run("state", rates=rates)
    assert autopsy.last.cause == cause


def test_a_bounded_number_of_passes():
    _, autopsy, _ = run("sample", max_reruns=4)
    assert len(autopsy.last.experiments) == 4


def test_it_is_in_the_record_and_explained(tmp_path):
    path = tmp_path / "run.keel"
    _, autopsy, _ = run("nan", record=path)
    explanation = explain(path)
    (told,) = explanation.autopsies
    assert (told.cause, told.op, told.step) == ("numerics", "log", AT)
    assert math.isnan(told.norm)
    assert [e.change for e in told.experiments] == [e.change for e in autopsy.last.experiments]
    assert str(autopsy.last) in str(explanation)
    assert explanation.to_json()["autopsies"][0]["cause"] == "numerics"


@pytest.mark.parametrize("options", [{"max_reruns": 0}, {"ratio": 1.0}, {"max_autopsies": 0}])
def test_options_out_of_range_are_refused(options):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=next(iter(options))):
        gk.Autopsy(gk.attach(optimizer, None), loss=lambda batch: batch, **options)


def test_loss_needs_a_batch():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="no batch"):
        gk.Autopsy(gk.attach(optimizer, None), loss=lambda batch: batch).loss()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("fault", ["sample", None])
def test_in_a_window_the_batch_is_found_first(fault, reduction):
    """All micro-batches are run again, weighed as they were; the window goes on as if nothing had been."""

    def train(*, with_autopsy):
        torch.manual_seed(0)
        model = Network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        guard = gk.attach(optimizer, "global-norm:1.0", model=model)
        accumulate = gk.Accumulator(guard, steps=3, reduction=reduction)

        def loss(batch):
            losses = (model(batch[0]) - batch[1]) ** 2 * batch[2]
            return losses.sum() if reduction == "sum" else losses.mean()

        autopsy = gk.Autopsy(guard, loss=loss) if with_autopsy else None
        batches = []
        for i in range(3 * STEPS):
            size = 4 + 2 * (i % 3)
            x, weights = torch.randn(size, 4), torch.ones(size, 1)
            if fault and i == 3 * AT - 2:
                weights[5] = 1e4
            batches.append((x, x.sum(dim=1, keepdim=True), weights))
        left = []
        for micro in accumulate(batches):
            with micro, contextlib.nullcontext() if autopsy is None else autopsy(micro.batch):
                value = loss(micro.batch) if autopsy is None else autopsy.loss()
                micro.backward(value, weight=len(micro.batch[0]))
            if micro.closes_window:
                optimizer.step()
                left += [p.detach().clone() for p in model.parameters()] + [
                    p.grad.clone() for p in model.parameters()
                ]
                left += [b.clone() for b in model.buffers()] + [torch.get_rng_state()]
                optimizer.zero_grad()
        return left, autopsy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradkeelWarning)
        (left, autopsy), (plain, _) = train(with_autopsy=True), train(with_autopsy=False)
    assert all(a.equal(b) for a, b in zip(left, plain, strict=True))
    told = autopsy.last
    if fault is None:
        assert told is None
        return
    assert (told.cause, told.step, told.micro, told.sample) == ("sample", AT, 1, 5)
    assert told.experiments[0].norm == pytest.approx(told.norm, rel=1e-5)  # sums in another order
    assert "Sample 5 of batch 1 does it" in str(told)


def test_loss_scaler_and_optimizer_are_left_as_they_were():
    """Under a loss scale the step is run again without it."""

    def train(*, with_autopsy):
        torch.manual_seed(0)
        model = Network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        guard = gk.attach(optimizer, "global-norm:1.0", model=model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)

        def loss(batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return ((model(batch[0]) - batch[1]) ** 2 * batch[2]).mean()

        autopsy = gk.Autopsy(guard, loss=loss) if with_autopsy else None
        states = []
        for step in range(1, STEPS + 1):
            x, weights = torch.randn(8, 4), torch.ones(8, 1)
            weights[3] = 1e5 if step == AT else 1
            batch = (x, x.sum(dim=1, keepdim=True), weights)
            with contextlib.nullcontext() if autopsy is None else autopsy(batch):
                scaler.scale(loss(batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            states.append((dict(scaler.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])))
            optimizer.zero_grad()
        return states, autopsy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradkeelWarning)
        (states, autopsy), (plain, _) = train(with_autopsy=True), train(with_autopsy=False)
    assert (autopsy.last.cause, autopsy.last.sample) == ("sample", 3)
    for (scale, own), (other_scale, other) in zip(states, plain, strict=True):
        assert scale == other_scale
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_a_loss_is_an_alarm_as_well(tmp_path):
    """Labels that say nothing any more: the gradient may be no larger, and the loss is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard = gk.attach(optimizer, "global-norm:1.0", model=model, record=tmp_path / "run.keel")
    autopsy = gk.Autopsy(guard, loss=lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradkeelWarning)
        for step in range(1, 201):
            x = torch.randn(32, 8)
            labels = x[:, :4].argmax(dim=1)
            with autopsy((x, labels if step < 150 else labels[torch.randperm(32)])):
                autopsy.loss().backward()
            guard.log(loss=autopsy.loss())
            optimizer.step()
            optimizer.zero_grad()
    guard.detach()
    assert (autopsy.last.cause, autopsy.last.step) == ("batch", 150)
    assert "the loss was" in str(autopsy.last)
    found = explain(tmp_path / "run.keel")
    assert (found.verdict, found.diagnosis.cause) == ("spike_unrecovered", "batch")
    assert [str(one) for one in found.autopsies] == [str(autopsy.last)]


def test_a_large_step_leaves_one_to_a_step_that_is_not_finite():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    autopsy = gk.Autopsy(
        gk.attach(optimizer, None, model=model), loss=lambda batch: (model(batch) ** 2).mean()
    )
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradkeelWarning)
        for scale in [1.0] * 12 + [100.0, 100.0, math.inf, math.inf]:
            with autopsy(torch.randn(8, 4) * scale):
                autopsy.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(None if autopsy.last is None else autopsy.last.step)
    assert seen == [None] * 12 + [13, 13, 15, 15]


def test_the_usual_loss_is_of_those_that_were_logged():
    """At every other step none was, and NaN has no place in an order."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = gk.attach(optimizer, None, model=model)
    autopsy = gk.Autopsy(guard, loss=lambda batch: (model(batch) ** 2).mean())
    batch = torch.ones(8, 4)
    for step in range(1, 22):
        with autopsy(batch):
            (model(batch) ** 2).mean().backward()
        if step % 2:
            guard.log(loss=math.inf if step == 21 else step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradkeelWarning)
            optimizer.step()
        optimizer.zero_grad()
    assert (autopsy.last.step, autopsy.last.loss, autopsy.last.usual_loss) == (21, math.inf, 10.0)
