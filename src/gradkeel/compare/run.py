"""One training run of a task under one policy, learning rate and seed, and what came of it."""

import hashlib
import inspect
import itertools
import math
import re
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gradkeel as gk
from gradkeel.compare.task import Task, TaskError, endless, loss_of
from gradkeel.errors import SkippedStepWarning, TooManySkipsError
from gradkeel.explain import explain
from gradkeel.explain.signs import Signals
from gradkeel.explain.verdict import judge
from gradkeel.policies import parse

TAIL = 10  # a final loss is the median of so many last ones: single batches are noisy


@dataclass(frozen=True)
class Trial:
    """What to run; ``policy`` is a spec string, and ``lr`` None leaves the learning rate to the script that is run."""

    policy: str
    lr: float | None
    seed: int

    @property
    def record_name(self) -> str:
        """Name of the file that the run is recorded in; no other policy, learning rate or seed has the same."""
        name = self.policy.replace(":", "_")
        # What file systems do not take, or take for something else, is told apart by a hash.
        if "_" in self.policy or len(name) > 100 or not re.fullmatch(r"[a-z0-9.=_-]+", name):
            digest = hashlib.sha256(self.policy.encode()).hexdigest()[:12]
            name = f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', self.policy)[:100]}-{digest}"
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        if self.lr is not None and float(f"{self.lr:g}") != self.lr:
            rate = f"-lr{self.lr!r}"
        return f"{name}{rate}-{self.seed}.keel"


def set_aside(path: Path) -> None:
    """Give a record of an earlier comparison another name: none is ever lost."""
    if path.exists():
        others = (path.with_name(f"{path.stem}.before{i}{path.suffix}") for i in itertools.count(1))
        free = next(other for other in others if not other.exists())
        for suffix in ("", "-wal"):  # where the run was killed, its last steps are beside it
            old = path.with_name(path.name + suffix)
            if old.exists():
                old.rename(free.with_name(free.name + suffix))


@dataclass(frozen=True)
class Onset:
    """The first update that was larger than the weights it changed, ``‖dw‖ / ‖w‖ > 1``, where ``‖w‖ > 0``.

    Attributes:
        step: its number, from 1.
        parameter: the name of the tensor with the largest ratio in that step.
        ratio: ``‖dw‖ / ‖w‖``; NaN or inf where the update is not finite.
    """

    step: int
    parameter: str
    ratio: float


@dataclass(frozen=True)
class Run:
    """The result of one run.

    Attributes:
        policy, lr, seed: what was run; ``lr`` is None where a script of the user's own did not log it.
        losses: training loss of each batch; ``losses[i]`` is taken after ``i`` updates.
        norms: norm of the true gradient of each batch, before clipping; NaN where the loss was not finite.
        initial_validation_loss, validation_loss: before and after training, or None.
        diverged: a loss or a parameter was not finite, or the final loss is above the first one.
        diverged_at: number of the step that did it (0 for a loss that was not finite to begin with): the first with a
            non-finite loss or parameter after it, or else the first after which the loss stays above the first loss.
        onset: the first update larger than its weights, whether or not the run diverged.
        clip_rate: share of the steps at which a gradient was made smaller.
        skipped: steps left out because their gradient was not finite.
        seconds_per_step: median time of forward, backward and guarded step.
        optimizer: name of its class; empty where it is not known.
        verdict: what `gradkeel.explain` calls the run; empty where it is not known.
        is_one_of_several: the script attached several guards, and all this is of the last one.
    """

    policy: str
    lr: float | None
    seed: int
    losses: Sequence[float]
    norms: Sequence[float]
    initial_validation_loss: float | None
    validation_loss: float | None
    diverged: bool
    diverged_at: int | None
    onset: Onset | None
    clip_rate: float
    skipped: int
    seconds_per_step: float
    optimizer: str = ""
    verdict: str = ""
    is_one_of_several: bool = False

    @property
    def final_loss(self) -> float:
        """Median of the last ten losses; NaN where the last one is not finite, or there is none."""
        return tail_median(self.losses)

    @property
    def score(self) -> float:
        """What runs are ranked by, lower is better: the validation loss, else the final one.

        inf if the run diverged; NaN if it did not, and no loss is known.
        """
        if self.diverged or (self.validation_loss is not None and not math.isfinite(self.validation_loss)):
            return math.inf
        return self.final_loss if self.validation_loss is None else self.validation_loss


def tail_median(losses: Sequence[float]) -> float:
    """Median of the last ten losses; NaN where the last one is not finite, or there is none."""
    return statistics.median(losses[-TAIL:]) if losses and math.isfinite(losses[-1]) else math.nan


def divergence(losses: Sequence[float], bad_step: int | None) -> tuple[bool, int | None]:
    """Whether a run diverged, and at which step.

    ``bad_step`` is the first after which a parameter was not finite, or the run could not go on; None: there is none.
    """
    non_finite = [i for i, loss in enumerate(losses) if not math.isfinite(loss)][:1]
    bad = non_finite if bad_step is None else [*non_finite, bad_step]
    if bad:
        return True, min(bad)
    if not losses or tail_median(losses) <= losses[0]:
        return False, None
    below = max(i for i, loss in enumerate(losses) if loss <= losses[0])
    return True, min(below + 1, len(losses) - 1)


def prepare(
    task: Task, policy: str, lr: float, seed: int, record: Path | None = None
) -> tuple[nn.Module, torch.optim.Optimizer, gk.Guard]:
    """Model and optimizer as all runs of this seed begin with them, and their guard.

    ``none`` runs with non-finite gradients kept, every policy with its steps skipped, which is the guard's default.

    Raises:
        TaskError: the optimizer cannot step without a closure.
    """
    spec = parse(policy)
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.optimizer(model, lr)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TaskError(
            f"task {task.name!r}: {type(optimizer).__name__}.step() needs a closure, and compare steps without one; "
            "make another optimizer"
        )
    guard = gk.attach(
        optimizer,
        spec.policy,
        model=model,
        exclude=spec.exclude or None,
        nonfinite="keep" if spec.policy is None else "skip",
        record=record,
    )
    return model, optimizer, guard


def run_trial(
    task: Task, trial: Trial, steps: int, *, accumulate: int = 1, records: Path | None = None
) -> Run:
    """Train ``task``, as ``prepare`` makes it, for ``steps`` steps, or until its loss is not finite.

    With ``accumulate`` above 1 each step is made on so many batches, accumulated exactly by ``task.weight``; losses
    and norms are then the window's. With ``records`` the run is recorded in that folder, and an earlier record set
    aside.
    """
    assert trial.lr is not None
    record = None if records is None else records / trial.record_name
    if record is not None:
        set_aside(record)
    model, optimizer, guard = prepare(task, trial.policy, trial.lr, trial.seed, record)
    loop = _Loop(task, model, optimizer, guard, accumulate)
    batches = endless(task, trial.seed)
    try:
        before = task.validation_loss(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SkippedStepWarning)  # they are counted
            for _ in range(steps):
                if not loop.step([next(batches) for _ in range(accumulate)]):
                    break
    finally:
        guard.detach()
    diverged, diverged_at = divergence(loop.losses, loop.bad_step)
    return Run(
        policy=trial.policy,
        lr=trial.lr,
        seed=trial.seed,
        losses=loop.losses,
        norms=loop.norms,
        initial_validation_loss=before,
        validation_loss=task.validation_loss(model),
        diverged=diverged,
        diverged_at=diverged_at,
        onset=loop.onset,
        clip_rate=loop.clipped / max(1, len(loop.seconds)),
        skipped=loop.skipped,
        seconds_per_step=statistics.median(loop.seconds) if loop.seconds else 0.0,
        optimizer=type(optimizer).__name__,
        verdict=_verdict(loop, record),
    )


def _verdict(loop: "_Loop", record: Path | None) -> str:
    """What explain calls the run: from its record, or from what was seen of it."""
    if record is not None and record.exists():
        return str(explain(record).verdict)
    losses, norms = (
        torch.tensor(values, dtype=torch.float64, device="cpu") for values in (loop.losses, loop.norms)
    )
    onset = loop.onset
    return str(
        judge(
            Signals(
                steps=torch.arange(1, len(losses) + 1, device="cpu"),
                losses=losses,
                totals=norms,
                coefficients=torch.ones_like(norms),
                rates=torch.full_like(norms, math.nan),
                nonfinite=~torch.isfinite(norms),
                skips={},
                larger=[] if onset is None else [(onset.parameter, onset.step, onset.ratio)],
                shares=[] if onset is None else [(onset.step, onset.ratio)],
            )
        ).verdict
    )


class _Loop:
    """The training loop of a run, and what it sees; the bookkeeping is outside the time that is measured."""

    def __init__(
        self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, guard: gk.Guard, accumulate: int
    ) -> None:
        self.task, self.model, self.optimizer, self.guard = task, model, optimizer, guard
        # Frozen ones may be integers, as a quantized base under adapters.
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._accumulate = gk.Accumulator(guard, accumulate, reduction="mean") if accumulate > 1 else None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self.clipped = self.skipped = self._skipped_in_a_row = 0
        self.onset: Onset | None = None
        self.bad_step: int | None = None

    def step(self, batches: Sequence[object]) -> bool:
        """Make one step on these batches; False when there is nothing more to learn from this run."""
        old = None if self.onset else [p.detach().clone() for p in self._trained.values()]
        start = time.perf_counter()
        self.losses.append(self._backward(batches))
        self.norms.append(math.nan)
        if not math.isfinite(self.losses[-1]):
            return False
        try:
            self.optimizer.step()
        except TooManySkipsError:
            self.bad_step = len(self.losses) - self._skipped_in_a_row - 1
            return False
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self._note(old)
        return True

    def _backward(self, batches: Sequence[object]) -> float:
        """The loss of these batches; the gradients are left where the guard finds them."""
        if self._accumulate is None:
            loss = loss_of(self.task, self.model, batches[0])
            if math.isfinite(value := loss.item()):
                loss.backward()
                self.guard.log(loss=loss)
            return value
        for micro in self._accumulate(batches):
            with micro:
                loss = loss_of(self.task, self.model, micro.batch)
                micro.backward(loss, weight=self.task.weight(micro.batch))
        window = self._accumulate.loss
        assert window is not None
        return window.item()

    def _note(self, old: list[torch.Tensor] | None) -> None:
        report = self.guard.report
        self.norms[-1] = report.norm
        self.clipped += report.clipped
        self.skipped += not report.stepped
        self._skipped_in_a_row = 0 if report.stepped else self._skipped_in_a_row + 1
        if old is not None:
            self.onset = _onset(self._trained, old, len(self.losses))
        if self.bad_step is None and not all(bool(p.isfinite().all()) for p in self._trained.values()):
            self.bad_step = len(self.losses)


def _onset(trained: Mapping[str, Tensor], old: Sequence[Tensor], step: int) -> Onset | None:
    ratios = {}
    for (name, parameter), before in zip(trained.items(), old, strict=True):
        size = torch.linalg.vector_norm(before).item()
        if size > 0:
            ratios[name] = torch.linalg.vector_norm(parameter.detach() - before).item() / size
    above = {name: ratio for name, ratio in ratios.items() if not ratio <= 1}  # NaN is above, too
    if not above:
        return None
    name = max(above, key=lambda key: math.inf if math.isnan(above[key]) else above[key])
    return Onset(step, name, above[name])
