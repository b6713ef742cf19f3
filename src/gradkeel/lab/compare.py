"""The engine of ``gradkeel compare``: every policy, learning rate and seed, in worker processes."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

import torch

from gradkeel.lab.run import Run, Trial, run_trial
from gradkeel.lab.sweep import Sweep, parse_sweep
from gradkeel.lab.task import Task, TaskError, load_task
from gradkeel.policies import parse


@dataclass(frozen=True)
class Plan:
    """What a comparison is to run.

    Attributes:
        target: the task, as ``load_task`` takes it.
        policies: spec strings.
        learning_rates: each is tried with each policy.
        seeds: each is run with each policy and learning rate.
        steps: optimizer steps in a run.
        batch_size: None leaves the task's own.
        target_loss: the table counts the steps to it; None takes one from the data.
        sweep: the bounds that some of the policies came from.
        arguments: what stands between ``gradkeel compare`` and the policies, to run the same thing again.
    """

    target: str
    policies: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    batch_size: int | None = None
    target_loss: float | None = None
    sweep: Sweep | None = None
    arguments: tuple[str, ...] = ()

    @property
    def trials(self) -> list[Trial]:
        """All runs, seed by seed, so that a table of the first ones has every policy and learning rate in it."""
        return [
            Trial(policy, lr, seed)
            for seed in self.seeds
            for lr in self.learning_rates
            for policy in self.policies
        ]


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
    sweep: str | None = None,
) -> Plan:
    """A plan with the task's own defaults for whatever is None.

    A sweep takes the place of the task's policies, with ``none`` beside it, and of its learning rates the highest
    one, where clipping matters most.

    Raises:
        TaskError: the task cannot be loaded, or a number that must be above zero is not.
        PolicySpecError: a policy cannot be read.
    """
    task = load_task(target)
    for name, value in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise TaskError(f"{name}={value}: it must be 1 or more")
    for lr in learning_rates or ():
        if not 0 < lr < float("inf"):
            raise TaskError(f"lr={lr}: a learning rate must be a finite number above 0")
    swept = None if sweep is None else parse_sweep(sweep)
    bounds = () if swept is None else swept.policies
    labels = {parse(policy).spec: policy for policy in bounds}
    specs: dict[str, str] = {}
    for policy in (*(policies or (("none",) if swept else task.policies)), *bounds):
        spec = parse(policy).spec
        specs.setdefault(spec, labels.get(spec, policy.strip()))
    rates = learning_rates or (task.learning_rates if swept is None else (max(task.learning_rates),))
    arguments = [target]
    arguments += [] if batch_size is None else ["--batch-size", str(batch_size)]
    arguments += [] if steps is None else ["--steps", str(steps)]
    return Plan(
        target=target,
        policies=tuple(specs.values()),
        learning_rates=tuple(dict.fromkeys(rates)),
        seeds=tuple(range(task.seeds if seeds is None else seeds)),
        steps=task.steps if steps is None else steps,
        batch_size=batch_size,
        target_loss=task.target_loss,
        sweep=swept,
        arguments=tuple(arguments),
    )


def compare(
    plan: Plan, *, jobs: int | None = None, on_run: Callable[[Comparison], None] | None = None
) -> Comparison:
    """Run a plan; Ctrl-C ends it early and keeps the runs that have finished.

    Runs with the same seed start from the same weights and see the same batches, whatever the policy. Each worker
    process computes on one thread, so that results do not depend on how many there are.

    Args:
        plan: made by ``make_plan``.
        jobs: worker processes; None takes one a core. 1 runs in this process.
        on_run: called in this process after each run, with all that have finished.
    """
    trials = plan.trials
    jobs = min(len(trials), jobs or _cores())
    done: dict[int, Run] = {}
    interrupted = False
    finished = _in_this_process(plan, trials) if jobs == 1 else _in_workers(plan, trials, jobs)
    with contextlib.closing(finished):
        try:
            for i, run in finished:
                done[i] = run
                if on_run is not None:
                    on_run(_collect(plan, done))
        except KeyboardInterrupt:
            interrupted = True
    return _collect(plan, done, interrupted=interrupted)


def _collect(plan: Plan, done: dict[int, Run], *, interrupted: bool = False) -> Comparison:
    return Comparison(plan, tuple(done[i] for i in sorted(done)), interrupted)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_this_process(plan: Plan, trials: Sequence[Trial]) -> Generator[tuple[int, Run]]:
    threads = torch.get_num_threads()
    task = _prepare(plan)
    try:
        for i, trial in enumerate(trials):
            yield i, run_trial(task, trial, plan.steps)
    finally:
        torch.set_num_threads(threads)


def _in_workers(plan: Plan, trials: Sequence[Trial], jobs: int) -> Generator[tuple[int, Run]]:
    spawn = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start_worker, initargs=(plan,))
    complete = False
    try:
        with _ctrl_c_left_to_parent():
            futures: dict[Future[Run], int] = {pool.submit(_work, trial): i for i, trial in enumerate(trials)}
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                yield futures[future], future.result()
        complete = True
    finally:
        pool.shutdown(wait=complete, cancel_futures=True)
        if not complete:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()


@contextlib.contextmanager
def _ctrl_c_left_to_parent() -> Iterator[None]:
    # A terminal sends SIGINT to workers as well; they inherit that it is ignored, even while they import torch.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


_worker: tuple[Task, Plan] | None = None


def _start_worker(plan: Plan) -> None:
    global _worker  # noqa: PLW0603 - a worker process has one task, loaded once
    _worker = _prepare(plan), plan


def _prepare(plan: Plan) -> Task:
    torch.set_num_threads(1)
    task = load_task(plan.target)
    if plan.batch_size is not None:
        task.batch_size = plan.batch_size
    return task


def _work(trial: Trial) -> Run:
    assert _worker is not None
    task, plan = _worker
    return run_trial(task, trial, plan.steps)
