"""What a comparison is to run, and what has come of it."""

import functools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gradkeel.compare.run import Run, Trial, run_trial
from gradkeel.compare.sweep import Sweep, parse_sweep
from gradkeel.compare.task import Task, TaskError, load_task
from gradkeel.policies import parse


@dataclass(frozen=True)
class Plan:
    """What a comparison is to run.

    Attributes:
        target: the task, as ``load_task`` takes it, or the user's own command.
        policies: spec strings.
        learning_rates: each is tried with each policy; none for a command, which has its own.
        seeds: each is run with each policy and learning rate.
        steps: optimizer steps in a run; None for a command.
        batch_size: None leaves the task's own.
        target_loss: the table counts the steps to it; None takes one from the data.
        sweep: the bounds that some of the policies came from.
        accumulate: how many batches make one step.
        arguments: what stands between ``gradkeel compare`` and the policies, to run the same thing again.
        record: whether each run is recorded; those of a command always are.
        is_command: whether ``target`` is a command of the user's own.
    """

    target: str
    policies: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int | None
    batch_size: int | None = None
    target_loss: float | None = None
    sweep: Sweep | None = None
    accumulate: int = 1
    arguments: tuple[str, ...] = ()
    record: bool = False
    is_command: bool = False

    @property
    def trials(self) -> list[Trial]:
        """All runs, seed by seed, so that a table of the first ones has every policy and learning rate in it."""
        rates: Sequence[float | None] = self.learning_rates or (None,)
        return [Trial(policy, lr, seed) for seed in self.seeds for lr in rates for policy in self.policies]

    def load(self) -> Task:
        """The task, with the plan's batch size."""
        task = load_task(self.target)
        if self.batch_size is not None:
            task.batch_size = self.batch_size
        return task

    def run(self, task: Task, trial: Trial, records: Path) -> Run:
        """Make one run of the task that ``load`` gave, and record it in the folder ``records`` if that is asked for."""
        folder = records if self.record else None
        return run_trial(task, trial, self.steps or task.steps, accumulate=self.accumulate, records=folder)


def run_in_worker(plan: Plan, trial: Trial, records: Path) -> Run:
    """Make one run in a process that makes one after the other, each on one thread, and loads their task once."""
    return plan.run(_loaded(plan), trial, records)


@functools.lru_cache(maxsize=1)
def _loaded(plan: Plan) -> Task:
    torch.set_num_threads(1)
    return plan.load()


@dataclass(frozen=True)
class Comparison:
    """The runs of a plan that have finished, in the plan's order.

    Attributes:
        plan: what was to be run.
        runs: what has finished.
        interrupted: whether it was stopped before all had.
    """

    plan: Plan
    runs: tuple[Run, ...]
    interrupted: bool = False


def make_plan(
    target: str,
    *,
    policies: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulate: int | None = None,
    sweep: str | None = None,
    record: bool = False,
) -> Plan:
    """A plan with the task's own defaults for whatever is None.

    A sweep takes the place of the task's policies, with ``none`` beside it, and of its learning rates the highest
    one, where clipping matters most.

    Raises:
        TaskError: the task cannot be loaded, or a number that must be above zero is not.
        PolicySpecError: a policy cannot be read.
    """
    task = load_task(target)
    check_counts(seeds=seeds, steps=steps, batch_size=batch_size, accumulate=accumulate)
    for lr in learning_rates or ():
        if not 0 < lr < float("inf"):
            raise TaskError(f"lr={lr}: a learning rate must be a finite number above 0")
    swept = None if sweep is None else parse_sweep(sweep)
    rates = learning_rates or (task.learning_rates if swept is None else (max(task.learning_rates),))
    arguments = [target]
    for option, value in (("--batch-size", batch_size), ("--accumulate", accumulate), ("--steps", steps)):
        arguments += [] if value is None else [option, str(value)]
    return Plan(
        target=target,
        policies=_policies(policies, task.policies, swept),
        learning_rates=tuple(dict.fromkeys(rates)),
        seeds=tuple(range(task.seeds if seeds is None else seeds)),
        steps=task.steps if steps is None else steps,
        batch_size=batch_size,
        target_loss=task.target_loss,
        sweep=swept,
        accumulate=accumulate or 1,
        arguments=tuple(arguments),
        record=record,
    )


def make_command_plan(
    command: str, *, policies: Sequence[str] | None = None, seeds: int | None = None, sweep: str | None = None
) -> Plan:
    """A plan that runs the user's own command, once a policy and seed: ``none`` and ``global-norm:1.0`` by default.

    Raises:
        TaskError: there is no command, or ``seeds`` is not above zero.
        PolicySpecError: a policy cannot be read.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise TaskError(f"--run {command!r} cannot be read as a command: {error}") from None
    if not words:
        raise TaskError("--run '': give the command that trains, as in --run 'python train.py'")
    check_counts(seeds=seeds)
    swept = None if sweep is None else parse_sweep(sweep)
    return Plan(
        target=command,
        policies=_policies(policies, ("none", "global-norm:1.0"), swept),
        learning_rates=(),
        seeds=tuple(range(seeds or 1)),
        steps=None,
        sweep=swept,
        arguments=("--run", command),
        is_command=True,
    )


def _policies(given: Sequence[str] | None, default: Sequence[str], sweep: Sweep | None) -> tuple[str, ...]:
    """Each policy once, as the user wrote it."""
    bounds = () if sweep is None else sweep.policies
    labels = {parse(policy).spec: policy for policy in bounds}
    specs: dict[str, str] = {}
    for policy in (*(given or (("none",) if sweep else default)), *bounds):
        spec = parse(policy).spec
        specs.setdefault(spec, labels.get(spec, policy.strip()))
    return tuple(specs.values())


def check_counts(**counts: int | None) -> None:
    """Raise where a number that is to be above zero is not."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise TaskError(f"{name}={value}: it must be 1 or more")
