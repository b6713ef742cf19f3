"""Autopsies on several ranks: all run the step again together, and all name the same rank, batch and sample."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradkeel as gk
from gradkeel.errors import GradkeelWarning
from gradkeel.explain import explain

STEPS, AT = 14, 11


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)
        self.is_broken = False

    def forward(self, x):
        h = self.drop(self.first(x).tanh())
        if self.is_broken:
            h = (h - h.amax()).log()
        return self.last(h)


def bits(values):
    return [None if value is None else torch.as_tensor(value).numpy().tobytes() for value in values]


def case(rank, wrap, fault, window, path, has_autopsy):
    """Train; what autopsies said, and everything that the steps left, bit by bit."""
    torch.manual_seed(10 + rank)
    network = Network()
    model = {
        "ddp": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
        "fsdp2": fully_shard,
    }[wrap](network)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = gk.attach(optimizer, "global-norm:1.0", model=model, record=path or None)
    accumulate = gk.Accumulator(guard, steps=window, model=model, reduction="mean") if window else None

    def loss(batch):
        if fault == "refuses" and len(batch[0]) < 8 and rank == 1:
            raise ValueError("only whole batches")
        return ((model(batch[0]) - batch[1]) ** 2 * batch[2]).mean()

    autopsy = gk.Autopsy(guard, loss=loss) if has_autopsy else None
    left = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, STEPS + 1):
            batches = []
            for micro in range(window or 1):
                x, weights = torch.randn(8, 4), torch.ones(8, 1)
                if step == AT and rank == 1 and micro == (window or 1) - 1 and fault in ("sample", "refuses"):
                    weights[5] = 1e5
                batches.append((x, x.sum(dim=1, keepdim=True), weights))
            network.is_broken = fault == "op" and step == AT and rank == 1
            for micro in accumulate(batches) if window else [None]:
                batch = batches[0] if micro is None else micro.batch
                if micro is not None:
                    micro.__enter__()
                if autopsy is not None:
                    autopsy(batch)
                value = loss(batch) if autopsy is None else autopsy.loss()
                if micro is None:
                    value.backward()
                else:
                    micro.backward(value, weight=8)
                    micro.__exit__(None, None, None)
            optimizer.step()
            local = [getattr(t, "to_local", lambda t=t: t)() for t in model.parameters()]
            grads = [p.grad for p in model.parameters()]
            left.append(bits(t.detach() for t in local))
            left.append(bits(None if g is None else getattr(g, "to_local", lambda g=g: g)() for g in grads))
            left.append(bits([torch.get_rng_state()]))
            optimizer.zero_grad()
    guard.detach()
    told = None if autopsy is None else autopsy.last
    return told, left, len([w for w in caught if w.category is GradkeelWarning])


@pytest.mark.parametrize(
    ("wrap", "window", "fault"),
    [
        ("ddp", 0, "sample"),
        ("ddp", 2, "sample"),
        ("ddp", 0, "op"),
        ("ddp", 0, "refuses"),
        ("fsdp2", 0, "sample"),
    ],
)
def test_all_ranks_name_the_same(ranks, tmp_path, wrap, window, fault):
    path = str(tmp_path / "run.keel")
    (first, left, warned), (second, other, silent) = ranks(2, case, wrap, fault, window, path, True)
    assert repr(first) == repr(second)  # NaN is no number that equals itself
    assert first.step == AT
    (written,) = explain(path).autopsies
    assert repr(written) == repr(first)
    assert (warned, silent) == (1, 0) or fault == "op"  # a skipped step is warned of as well
    if fault == "op":
        assert (first.cause, first.op) == ("numerics", "log")
    elif fault == "refuses":
        assert (first.cause, first.rank, first.sample) == ("batch", 1, None)
        assert "(failed: rank 1)" in first.experiments[-1].change
    else:
        assert (first.cause, first.rank, first.sample) == ("sample", 1, 5)
        assert first.micro == (window - 1 if window else None)
        assert math.isclose(first.experiments[0].norm, first.norm, rel_tol=1e-5)  # sums in another order
    (_, plain, _), (_, plain_other, _) = ranks(2, case, wrap, fault, window, "", False)
    assert left == plain
    assert other == plain_other
