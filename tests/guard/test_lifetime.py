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
