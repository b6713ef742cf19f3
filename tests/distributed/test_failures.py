"""What goes wrong on one rank only, and where other ranks must hear of it instead of waiting."""

import pytest
import torch
from tests.distributed.test_agreement import Window, outcome, sgd
from tests.distributed.test_windows import hybrid, make_model

import gradkeel as gk
from gradkeel import policies as gp


def replicas(rank):
    """HSDP, two replicas of two shards each: a loss that is too large on the last rank, then an error there."""
    model = hybrid(make_model(), rank, 4)
    guard = gk.attach(sgd(model.parameters()), gp.SkipStep(warmup=3, window=8), model=model)
    stepped = []
    for step in range(6):
        guard.optimizer.zero_grad()
        model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        guard.log(loss=1.0 + 0.01 * step + 1000.0 * (step == 5 and rank == 3))
        guard.optimizer.step()
        stepped.append(guard.report.stepped)
    loss = float(guard.report.scalars["loss"])
    guard.window = Window(is_bad=rank == 3)
    return stepped, loss, outcome(guard.optimizer.step)


def test_replicas_decide_together(ranks):
    for rank, (stepped, loss, (kind, _)) in enumerate(ranks(4, replicas)):
        assert stepped == [True] * 5 + [False]
        assert loss == pytest.approx(1.05 + 250.0)
        assert kind == ("WindowError" if rank == 3 else "RankError")
