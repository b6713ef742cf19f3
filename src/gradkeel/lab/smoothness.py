"""Train a task with the smoothness probe attached, for ``gradkeel smoothness`` and the experiments."""

from dataclasses import dataclass
from typing import Any

import torch

import gradkeel as gk
from gradkeel.explain.smoothness import LocalSmoothness, SmoothnessProbe
from gradkeel.explain.smoothness_fit import SmoothnessFit
from gradkeel.lab.task import Task, endless
from gradkeel.policies import parse


@dataclass(frozen=True)
class ProbedRun:
    """One training run with its smoothness measured on the way.

    Attributes:
        task: the task's name.
        policy: spec string.
        lr: learning rate.
        seed: seed of weights and batches.
        optimizer: name of the optimizer's class.
        losses: training loss of each batch; shorter than asked for where the loss became non-finite.
        measurements: local smoothness along every so many steps, each on the batch that the step was made with.
        fit: (L0, L1) fitted to them, or why not.
    """

    task: str
    policy: str
    lr: float
    seed: int
    optimizer: str
    losses: tuple[float, ...]
    measurements: tuple[LocalSmoothness, ...]
    fit: SmoothnessFit


def probed_run(
    task: Task, *, policy: str, lr: float, seed: int = 0, steps: int, every: int = 2, points: int = 4
) -> ProbedRun:
    """Train for ``steps`` steps, measuring local smoothness along one step in ``every``.

    Args:
        task: what to train.
        policy: spec string; non-finite gradients are kept under ``none``, and skipped otherwise.
        lr: learning rate.
        seed: for ``task.model()`` and ``task.batches()``, as in ``gradkeel compare``.
        steps: optimizer steps.
        every: measure one step in so many.
        points: gradients on each step measured, besides the one at its start.
    """
    spec = parse(policy)
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.optimizer(model, lr)
    nonfinite = "keep" if spec.policy is None else "skip"
    guard = gk.attach(optimizer, spec.policy, model=model, exclude=spec.exclude or None, nonfinite=nonfinite)
    batch: Any = None
    probe = SmoothnessProbe(optimizer, lambda: task.loss(model, batch), model=model, every=every, points=points)
    losses: list[float] = []
    for _, batch in zip(range(steps), endless(task, seed), strict=False):
        loss = task.loss(model, batch)
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guard.detach()
    probe.detach()
    return ProbedRun(
        task=task.name,
        policy=spec.spec,
        lr=lr,
        seed=seed,
        optimizer=type(optimizer).__name__,
        losses=tuple(losses),
        measurements=probe.measurements,
        fit=probe.fit(),
    )
