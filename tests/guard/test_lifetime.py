"""What a guard keeps alive: nothing that the training script has let go of."""

import gc
import weakref

import pytest
import torch
from torch import nn

import gradkeel as gk


def guarded(**arguments):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return model, optimizer, gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model, **arguments)


@pytest.mark.parametrize("detach", [False, True])
def test_model_optimizer_and_guard_die_together(detach):
    model, optimizer, guard = guarded()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    if detach:
        guard.detach()
    kept = [weakref.ref(thing) for thing in (guard, optimizer, *model.parameters())]
    del model, optimizer, guard
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def test_variables_of_the_loop_die_when_it_lets_go_of_them():
    model, optimizer, guard = guarded()
    for scale in (1.0, float("nan"), 1.0):  # the first step, a skipped one, and the one after it
        batch = torch.full((1, 2), scale)
        model(batch).sum().backward()
        kept = weakref.ref(batch)
        if scale != scale:
            with pytest.warns(gk.SkippedStepWarning):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        del batch
        gc.collect()
        assert kept() is None, f"step {guard.step}"


def hooks_of(parameter):
    return len(parameter._post_accumulate_grad_hooks or ())


def test_hooks_of_guards_that_are_gone_are_gone():
    """1,000 of them made a backward nine times as long."""
    model = nn.Linear(2, 1)
    for _ in range(1000):
        gk.attach(torch.optim.SGD(model.parameters(), lr=0.1), "global-norm:1.0", model=model)
    gc.collect()
    assert [hooks_of(parameter) for parameter in model.parameters()] == [0, 0]
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=0.1), "global-norm:1.0", model=model)
    assert sum(map(hooks_of, model.parameters())) == 1
    guard.detach()
    assert sum(map(hooks_of, model.parameters())) == 0


def test_a_thousand_guards_of_one_optimizer_are_one():
    model, optimizer, guard = guarded()
    for _ in range(1000):
        guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    assert sum(map(hooks_of, model.parameters())) == 1
    guard.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not {"_gradkeel_guard", "__getstate__", "_step_supports_amp_scaling"} & set(vars(optimizer))


def test_an_accumulator_that_could_not_be_made_leaves_nothing_behind(monkeypatch):
    model, optimizer, guard = guarded()

    def refuse():
        raise gk.RankError("another rank has other parameters")

    monkeypatch.setattr(guard, "connect", refuse)
    with pytest.raises(gk.RankError):
        gk.Accumulator(guard, 2)
    monkeypatch.undo()
    assert guard.window is None
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert guard.report.stepped
