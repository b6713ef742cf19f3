"""A guarded run in which every number is prescribed: norms, weights, updates, losses and learning rates."""

import warnings

import torch
from torch import nn

import gradkeel as gk


class _Scripted(torch.optim.Optimizer):
    """Takes whatever update it was told to; each parameter has one entry, so that its norm is its size."""

    def __init__(self, named):
        super().__init__(named, {"lr": 0.1})
        self.updates = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(self.updates[parameter])


def _table(values, shape, default):
    if values is None:
        values = default
    return torch.as_tensor(values, dtype=torch.float64).expand(shape)


def scripted_run(
    path,
    norms,
    *,
    names=None,
    weights=None,
    updates=None,
    losses=None,
    rates=None,
    absent=(),
    policy=None,
    optimizer="SGD",
    nonfinite="keep",
    record=None,
    **options,
):
    """Record a run of these gradient norms, [k] or [k, n], under a real guard.

    Weights before each step and updates are [k, n] or anything that broadcasts; ``absent`` holds pairs of a step and a
    name that has no gradient there. The optimizer's class is called ``optimizer``.
    """
    norms = torch.as_tensor(norms, dtype=torch.float64)
    norms = norms.unsqueeze(1) if norms.dim() == 1 else norms
    names = names or tuple("abcdefghijklmnopqrst"[: norms.shape[1]])
    weights, updates = _table(weights, norms.shape, 1.0), _table(updates, norms.shape, 1e-3)
    parameters = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in names]
    made = type(optimizer, (_Scripted,), {})(list(zip(names, parameters, strict=True)))
    guard = gk.attach(made, policy, nonfinite=nonfinite, record=record or path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.SkippedStepWarning)
        for i in range(len(norms)):
            if rates is not None:
                made.param_groups[0]["lr"] = float(rates[i])
            for j, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
                parameter.data.fill_(float(weights[i, j]))
                made.updates[parameter] = float(updates[i, j])
                parameter.grad = None if (i + 1, name) in absent else norms[i, j].reshape(1).clone()
            if losses is not None:
                guard.log(loss=float(losses[i]))
            made.step()
    guard.detach()
    return path


def trained(path, model, optimizer, losses, policy=None):
    """Record real training: ``losses`` computes each step's as it is drawn."""
    guard = gk.attach(optimizer, policy, model=model, record=path)
    for loss in losses:
        loss.backward()
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    return path
