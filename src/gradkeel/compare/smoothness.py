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
    """One training run with its smoothness measured on the way."""

    task: str
    policy: str
    lr: float
    seed: int
    optimizer: str
    losses: tuple[float, ...]  # of each batch; fewer than asked for where the loss became non-finite
    measurements: tuple[LocalSmoothness, ...]  # each on the batch that the step was made with
    fit: SmoothnessFit


def probed_run(
    task: Task, *, policy: str, lr: float, seed: int = 0, steps: int, every: int = 2, points: int = 4
) -> ProbedRun:
    """Train as ``gradkeel compare`` does, measuring local smoothness along one step in ``every``."""
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
    found = Line(say("FOUND"), fit.reason)
    if not fit.related:
        none = say("none follows from these measurements; see gradkeel explain for the norms' own advice")
        return [found, Line(say("BOUND"), none)]
    fitted = say(
        "L0 = {fit.L0:.3g} ({fit.L0_interval[0]:.3g} to {fit.L0_interval[1]:.3g}), L1 = {fit.L1:.3g} "
        "({fit.L1_interval[0]:.3g} to {fit.L1_interval[1]:.3g}); no measurement exceeds L0 = {fit.envelope[0]:.3g}, "
        "L1 = {fit.envelope[1]:.3g}",
        fit=fit,
    )
    safe = fit.safe_bound(run.lr)
    if safe is None:
        advice = say(
            "none makes lr {lr:g} safe: it is above 1 / L0 = {limit:.3g}; take a lower learning rate",
            lr=run.lr,
            limit=1 / fit.envelope[0],
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
    return [found, Line(say("FIT"), fitted), Line(say("BOUND"), advice), Line(say("STEP"), step)]


def document(run: ProbedRun) -> dict[str, Any]:
    """The run as plain numbers, lists and dicts; a number that is not finite is None."""
    bounds = {"safe_bound": run.fit.safe_bound(run.lr), "max_step": run.fit.max_step}
    return plain(asdict(run) | bounds)


def smoothness_page(run: ProbedRun) -> str:
    """The page of a run, as HTML."""
    subtitle = say(
        "{run.policy} at lr {run.lr:g}, seed {run.seed}: {steps}, {measurements}",
        run=run,
        steps=count(len(run.losses), "{n:,} step", "{n:,} steps"),
        measurements=count(len(run.measurements), "{n} measurement", "{n} measurements"),
    )
    text = say(
        "Each point is one step: how fast the gradient changed along it, against the gradient's norm where it began, "
        "both on the batch that the step was made with. The line is the fit, the dotted one its smallest multiple "
        "that no point exceeds."
    )
    figure = smoothness_figure(run.measurements, run.fit)
    sections = [Section(say("Smoothness and gradient norm"), text, figure=figure)]
    return page(f"gradkeel smoothness {run.task}", subtitle, words(run), sections)
