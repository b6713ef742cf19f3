"""Every optimizer of torch.optim in each of its implementations, a small problem for it, and its contents."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn, optim


@dataclass(frozen=True)
class Case:
    """One optimizer: how it is made, and whether it needs a closure, sparse gradients or matrices only."""

    name: str
    make: Callable[[list], optim.Optimizer]
    closure: bool = False
    sparse: bool = False
    matrices: bool = False

    def problem(self):
        """A model with the same weights each time, and its loss at a step: large gradients, other data each step."""
        generator = torch.Generator().manual_seed(1)
        if self.sparse:
            model = nn.Embedding(6, 3, sparse=True)
        else:
            model = nn.Linear(4, 3, bias=not self.matrices)
        if self.closure:  # iterates: two runs in single precision that differ by one rounding drift far apart
            model = model.double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        dtype = next(model.parameters()).dtype

        def loss(step):
            data = torch.Generator().manual_seed(100 + step)
            if self.sparse:
                # with repetitions: the gradient is not coalesced
                rows = torch.randint(0, 6, (5,), generator=data)
                return 10.0 * model(rows).square().sum()
            inputs = 5.0 * torch.randn(8, 4, generator=data, dtype=dtype)
            return model(inputs).square().mean()

        return model, loss

    def step(self, optimizer, loss, after_backward=lambda: None):
        """One step as this optimizer needs it; ``after_backward`` is called on each fresh gradient."""

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            after_backward()
            return value

        if self.closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def _plain(name, kind, **arguments):
    return Case(name, lambda parameters: kind(parameters, **arguments))


ARGUMENTS = {
    optim.Adadelta: {"lr": 0.1, "weight_decay": 0.1},
    optim.Adafactor: {"lr": 0.1, "weight_decay": 0.1},
    optim.Adagrad: {"lr": 0.1, "weight_decay": 0.1},
    optim.Adam: {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True},
    optim.AdamW: {"lr": 0.1, "weight_decay": 0.1},
    optim.Adamax: {"lr": 0.1, "weight_decay": 0.1},
    optim.ASGD: {"lr": 0.1, "t0": 1.0, "weight_decay": 0.1},
    optim.NAdam: {"lr": 0.1, "weight_decay": 0.1},
    optim.RAdam: {"lr": 0.1, "weight_decay": 0.1},
    optim.RMSprop: {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "centered": True},
    optim.Rprop: {"lr": 0.1},
    optim.SGD: {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
}
FUSED = (optim.Adagrad, optim.Adam, optim.AdamW, optim.SGD)

CASES = [
    *(_plain(f"{kind.__name__}-loop", kind, foreach=False, **given) for kind, given in ARGUMENTS.items()),
    *(_plain(f"{kind.__name__}-foreach", kind, foreach=True, **given) for kind, given in ARGUMENTS.items()),
    *(_plain(f"{kind.__name__}-fused", kind, fused=True, **ARGUMENTS[kind]) for kind in FUSED),
    # torch has it from 2.9 on.
    *(
        [Case("Muon", lambda parameters: optim.Muon(parameters, lr=0.1), matrices=True)]
        if hasattr(optim, "Muon")
        else []
    ),
    Case("SparseAdam", lambda parameters: optim.SparseAdam(parameters, lr=0.1), sparse=True),
    Case("LBFGS", lambda parameters: optim.LBFGS(parameters, lr=0.1, max_iter=3), closure=True),
]
BY_NAME = {case.name: case for case in CASES}


def contents(model, optimizer):
    """A copy of all that a step may change: parameters, the optimizer's state and its groups' settings."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return copy.deepcopy((list(model.parameters()), list(optimizer.state.values()), settings))


def is_same(one, other):
    """Whether two nested contents are equal, bit by bit."""
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other
