"""Train a task with the smoothness probe attached, for ``gradkeel smoothness`` and the experiments."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from gradkeel.compare.run import prepare
from gradkeel.compare.task import Task, endless, loss_of
from gradkeel.compare.words import bound_of
from gradkeel.explain.smoothness.figures import smoothness_figure
from gradkeel.explain.smoothness.fit import SmoothnessFit
from gradkeel.explain.smoothness.probe import LocalSmoothness, SmoothnessProbe
from gradkeel.language import count, say
from gradkeel.page.page import Line, Section, page
from gradkeel.policies import parse
from gradkeel.record.notes import plain


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
    model, optimizer, guard = prepare(task, policy, lr, seed)
    batch: Any = None
    probe = SmoothnessProbe(
        optimizer, lambda: loss_of(task, model, batch), model=model, every=every, points=points
    )
    losses: list[float] = []
    for _, batch in zip(range(steps), endless(task, seed), strict=False):
        loss = loss_of(task, model, batch)
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
        policy=parse(policy).spec,
        lr=lr,
        seed=seed,
        optimizer=type(optimizer).__name__,
        losses=tuple(losses),
        measurements=probe.measurements,
        fit=probe.fit(),
    )


def default_policy(task: Task) -> str:
    """The first of the task's policies that bounds the global norm, else the first that clips, else none."""
    clipping = [policy for policy in task.policies if parse(policy).policy is not None]
    return next(
        (policy for policy in clipping if policy.startswith("global-norm")), (clipping or ["none"])[0]
    )


def words(run: ProbedRun) -> list[Line]:
    """What was found, the constants, and which bound follows, as labelled lines."""
    fit, bound = run.fit, bound_of(run.policy)
    lines = [Line(say("FOUND"), fit.reason)]
    if not fit.related:
        return [
            *lines,
            Line(
                say("BOUND"),
                say("none follows from these measurements; see gradkeel explain for the norms' own advice"),
            ),
        ]
    l0, l1 = fit.envelope
    fitted = say(
        "L0 = {L0:.3g} ({L0_low:.3g} to {L0_high:.3g}), L1 = {L1:.3g} ({L1_low:.3g} to {L1_high:.3g}); no measurement "
        "exceeds L0 = {l0:.3g}, L1 = {l1:.3g}",
        L0=fit.L0,
        L0_low=fit.L0_interval[0],
        L0_high=fit.L0_interval[1],
        L1=fit.L1,
        L1_low=fit.L1_interval[0],
        L1_high=fit.L1_interval[1],
        l0=l0,
        l1=l1,
    )
    safe = fit.safe_bound(run.lr)
    if safe is None:
        advice = say(
            "none makes lr {lr:g} safe: it is above 1 / L0 = {limit:.3g}; take a lower learning rate",
            lr=run.lr,
            limit=1 / l0,
        )
    else:
        advice = say(
            "{bound:.3g} or less at lr {lr:g}: no step then increases the loss of its own batch, by the largest "
            "smoothness measured; conservative, training often goes well above it",
            bound=safe,
            lr=run.lr,
        )
    step = say(
        "lr * bound below {limit:.3g} at any learning rate: when you halve lr, double the bound{used}",
        limit=fit.max_step,
        used="" if bound is None else say("; this run had lr * bound = {n:.3g}", n=run.lr * bound),
    )
    return [*lines, Line(say("FIT"), fitted), Line(say("BOUND"), advice), Line(say("STEP"), step)]


def document(run: ProbedRun) -> dict[str, Any]:
    """The run as plain numbers, lists and dicts; a number that is not finite is None."""
    fit = run.fit
    result: dict[str, Any] = plain(
        {**asdict(run), "safe_bound": fit.safe_bound(run.lr), "max_step": fit.max_step}
    )
    return result


def smoothness_page(run: ProbedRun) -> str:
    """The page of a run, as HTML.

    Raises:
        MissingExtraError: without plotly.
    """
    subtitle = say(
        "{policy} at lr {lr:g}, seed {seed}: {steps}, {measurements}",
        policy=run.policy,
        lr=run.lr,
        seed=run.seed,
        steps=count(len(run.losses), "{n} step", "{n} steps"),
        measurements=count(len(run.measurements), "{n} measurement", "{n} measurements"),
    )
    text = say(
        "Each point is one step: how fast the gradient changed along it, against the gradient's norm where it began, "
        "both on the batch that the step was made with. The line is the fit, the dotted one its smallest multiple "
        "that no point exceeds."
    )
    figure = smoothness_figure(run.measurements, run.fit)
    return page(
        f"gradkeel smoothness {run.task}",
        subtitle,
        words(run),
        [Section(say("Smoothness and gradient norm"), text, figure=figure)],
    )
