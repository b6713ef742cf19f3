"""What is of another kind is named by gradkeel, wherever a user hands something over: the argument, and the rule."""

import re

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel import smoothness
from gradkeel.record import Reader


def sgd():
    return torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)


GIVEN = {
    "None": lambda: None,
    "a number": lambda: 3,
    "a word": lambda: "x",
    "a list": lambda: [1, 2],
    "an optimizer": sgd,
    "a model": lambda: nn.Linear(2, 1),
    "a tensor": lambda: torch.ones(2),
    "an object": object,
}


def guarded(policy="zclip"):
    return gk.attach(sgd(), policy)


def accumulator(**options):
    return gk.Accumulator(guarded(), steps=2, **options)


def inside(act):
    """What acts inside of a micro-batch's context."""

    def run(value):
        micro = next(iter(accumulator()([1, 2])))
        with micro:
            act(micro, value)

    return run


def load_guard(**parts):
    guard = guarded()
    guard.load_state_dict({**guard.state_dict(), **parts})


def load_window(**parts):
    one = accumulator()
    one.load_state_dict({**one.state_dict(), **parts})


def parameters():
    return [nn.Parameter(torch.ones(2))]


# Where a value goes, by what the error must begin with; and which values are right there.
PLACES = [
    (r"attach\(model=...\): model must be", lambda v: gk.attach(sgd(), None, model=v), "None, a model"),
    (r"attach\(shard_over=...\): shard_over must be", lambda v: gk.attach(sgd(), None, shard_over=v), "None"),
    (r"attach\(.*policy", lambda v: gk.attach(sgd(), v), "None, a word"),
    (r"guard.load_state_dict\(state=...\): state must be", lambda v: guarded().load_state_dict(v), ""),
    (r"guard.load_state_dict\(state=...\): 'states'", lambda v: load_guard(states=v), ""),
    (r"guard.load_state_dict\(state=...\): 'main'", lambda v: load_guard(states={"main": v}), ""),
    (r"guard.load_state_dict\(state=...\): 'seen'", lambda v: load_guard(states={"main": {"seen": v}}), "a tensor"),
    (r"guard.load_state_dict\(state=...\): 'step'", lambda v: load_guard(step=v), "a number"),
    (r"guard.load_state_dict\(state=...\): 'policies'", lambda v: load_guard(policies=v), ""),
    (r"Accumulator\(guard=...\): guard must be", lambda v: gk.Accumulator(v, steps=2), ""),
    (r"Accumulator\(steps=.*steps must be", lambda v: gk.Accumulator(guarded(), steps=v), "a number"),
    (r"Accumulator\(model=...\): model must be", lambda v: accumulator(model=v), "None, a model"),
    (r"Accumulator\(per=.*must be different names", lambda v: accumulator(per=v), ""),
    (r"Accumulator\(divides=...\): divides must be", lambda v: accumulator(divides=v), "None, a number"),
    (r"Accumulator\(accumulate_dtype=...\): ", lambda v: accumulator(accumulate_dtype=v), "None"),
    (r"accumulate\(loader=...\): loader must be", lambda v: next(accumulator()(v)), "a word, a list, a tensor"),
    (r"accumulate.load_state_dict\(state=...\): state must be", lambda v: accumulator().load_state_dict(v), ""),
    (r"accumulate.load_state_dict\(state=...\): 'gradients'", lambda v: load_window(gradients=v), ""),
    (r"accumulate.load_state_dict\(state=...\): 'count'", lambda v: load_window(count=v), "a number"),
    (r"micro.backward\(loss=...\): loss must be", inside(lambda micro, v: micro.backward(v)), ""),
    (r"micro.backward\(scaler=...\): scaler must be",
     inside(lambda micro, v: micro.backward(torch.ones((), requires_grad=True), scaler=v)), "None"),
    (r"clip_grad_norm_\(parameters=...\): parameters must be", lambda v: gk.clip_grad_norm_(v, 1.0), "a tensor"),
    (r"clip_grad_norm_\(norm_type=...\): norm_type must be",
     lambda v: gk.clip_grad_norm_(parameters(), 1.0, norm_type=v), "a number"),
    (r"clip_grad_value_\(parameters=...\): parameters must be", lambda v: gk.clip_grad_value_(v, 1.0), "a tensor"),
    (r"get_total_norm\(tensors=...\): tensors must be", gk.get_total_norm, "a tensor"),
    (r"clip_grads_with_norm_\(total_norm=...\): total_norm must be",
     lambda v: gk.clip_grads_with_norm_(parameters(), 1.0, v), "a number"),
    (r"gradients\(model=...\): model must be", gk.gradients, "a model"),
    (r"plot\(run=...\): run must be", gk.plot, "a word"),
    (r"explain\(run=...\): run must be", gk.explain.explain, "a word"),
    (r"advise\(reader=...\): reader must be", gk.explain.advise, ""),
    (r"replay\(reader=...\): reader must be", lambda v: gk.explain.replay(v, "zclip"), ""),
    (r"Reader\(path=...\): path must be", Reader, "a word"),
    (r"Recorder\(sinks=...\): sinks must be", lambda v: gk.Recorder(None, sinks=v), ""),
    (r"Recorder\(flush_seconds=...\): flush_seconds must be",
     lambda v: gk.Recorder("run.keel", flush_seconds=v), "a number"),
    (r"Autopsy\(guard=...\): guard must be", lambda v: gk.Autopsy(v, loss=print), ""),
    (r"Autopsy\(loss=...\): loss must be", lambda v: gk.Autopsy(guarded(), loss=v), "a model"),
    (r"SmoothnessProbe\(optimizer=...\): optimizer must be",
     lambda v: smoothness.SmoothnessProbe(v, print), "an optimizer"),
    (r"parse\(spec=...\): spec must be", gk.policies.parse, "a word"),
    (r"Schedule\(function=...\): function must", gk.policies.Schedule, "a model"),
    (r"ClipByGlobalNorm\(.*eps must be", lambda v: gk.ClipByGlobalNorm(1.0, eps=v), "a number"),
    (r"AdaptiveGradientClip\(.*ratio must be", gk.AdaptiveGradientClip, "a number"),
]  # fmt: skip
REFUSED = [
    pytest.param(words, place, value, id=f"{re.split(r'[^A-Za-z_.]', words)[0]}-{i}-{value}")
    for i, (words, place, right) in enumerate(PLACES)
    for value in GIVEN
    if value not in right.split(", ")
]


@pytest.mark.parametrize(("words", "place", "value"), REFUSED)
def test_what_is_of_another_kind_is_named(words, place, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^{words}"):
        place(GIVEN[value]())
    assert list(tmp_path.iterdir()) == []


def test_a_state_without_a_part_is_refused():
    guard = guarded()
    state = guard.state_dict()
    del state["states"]
    with pytest.raises(gk.CheckpointError, match=r"'states' in it must be .*, not missing"):
        guard.load_state_dict(state)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(8,), (0,), (1, 2)])
def test_a_loss_of_several_numbers_is_refused_and_counts_nothing(reduction, shape):
    weight = nn.Parameter(torch.ones(()))
    guard = gk.attach(torch.optim.SGD([weight], lr=1.0), None)
    accumulate = gk.Accumulator(guard, steps=1, reduction=reduction)
    with accumulate.micro() as micro:
        losses = weight * torch.ones(shape)
        words = rf"not one of shape {re.escape(str(list(shape)))} .* call loss.{reduction}\(\) first"
        with pytest.raises(ValueError, match=words):
            micro.backward(losses, weight=4)
        micro.backward(weight * 3.0, weight=2)
    guard.optimizer.step()
    assert guard.report.norm == (1.5 if reduction == "sum" else 3.0)


def test_one_number_may_have_dimensions():
    weight = nn.Parameter(torch.ones(()))
    guard = gk.attach(torch.optim.SGD([weight], lr=1.0), None)
    with gk.Accumulator(guard, steps=1).micro() as micro:
        micro.backward((weight * 3.0).reshape(1, 1))
    guard.optimizer.step()
    assert guard.report.norm == 3.0
    gk.clip_grads_with_norm_([weight, nn.Parameter(torch.ones(2))], 1.5, torch.tensor([3.0]))
    assert weight.grad.item() == pytest.approx(1.5, rel=1e-6)


def test_denominators_may_be_the_keys_of_a_mapping():
    assert accumulator(per={"token": 1, "sequence": 2}.keys()).per == ("token", "sequence")
