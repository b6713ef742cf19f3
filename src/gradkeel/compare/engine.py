"""The engine of ``gradkeel compare``: every policy, learning rate and seed, in worker processes."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from gradkeel.compare.command import as_finished, in_subprocesses, on_ctrl_c
from gradkeel.compare.plan import Comparison, Plan, check_counts, run_in_worker
from gradkeel.compare.ray_pool import in_ray
from gradkeel.compare.run import Run
from gradkeel.compare.task import TaskError


def compare(
    plan: Plan,
    *,
    jobs: int | None = None,
    on_run: Callable[[Comparison], None] | None = None,
    records: Path = Path("gradkeel-compare", "runs"),
    ray: str | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Comparison:
    """Run a plan; Ctrl-C ends it early and keeps the runs that have finished.

    Runs of a task with the same seed start from the same weights and see the same batches, whatever the policy; of a
    command's it is looked at, see ``contest``. Each worker process computes on one thread, so that results do not
    depend on how many there are.

    Args:
        plan: made by ``make_plan``.
        jobs: how many runs at a time; None takes one a core, here or of the Ray cluster, and one for a command. A task
            with 1, and without Ray, runs in this process.
        on_run: called in this process after each run, with all that have finished.
        records: folder for records, where the plan asks for them, and for what a command's runs record and print.
        ray: None runs on this machine. Otherwise the address of a Ray cluster: ``host:port``, ``ray://host:port``,
            ``auto``, ``local``; empty for the one that ``ray.init()`` finds, or starts for as long as this takes.
        say: is told, while a command runs, what should be known at once.

    Raises:
        TaskError: ``jobs`` is not above zero, the cluster cannot be reached, or is to run a command.
        MissingExtraError: Ray is asked for, and is not installed.
    """
    done: dict[int, Run] = {}
    interrupted = False
    with contextlib.closing(_runs(plan, jobs, records, ray, say)) as finished:
        try:
            for i, run in finished:
                done[i] = run
                if on_run is not None:
                    on_run(_collect(plan, done))
        except KeyboardInterrupt:
            interrupted = True
    return _collect(plan, done, interrupted=interrupted)


def _runs(
    plan: Plan, jobs: int | None, records: Path, ray: str | None, say: Callable[[str], None]
) -> Generator[tuple[int, Run]]:
    """Index and result of each trial as it finishes, from whoever is to make them."""
    check_counts(jobs=jobs)
    if plan.is_command and ray is not None:
        raise TaskError(
            "--ray: a command of your own, its files and its record are on this machine; leave --ray out, or make it a "
            "task: mypkg.mymodule:make_task"
        )
    if plan.record:
        records.mkdir(parents=True, exist_ok=True)
    if ray is not None:
        return in_ray(plan, jobs, records, ray)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(len(plan.trials), jobs or (1 if plan.is_command else cores))
    if plan.is_command:
        return in_subprocesses(plan, jobs, records, say)
    return _in_this_process(plan, records) if jobs == 1 else _in_workers(plan, jobs, records)


def _collect(plan: Plan, done: dict[int, Run], *, interrupted: bool = False) -> Comparison:
    return Comparison(plan, tuple(done[i] for i in sorted(done)), interrupted)


def _in_this_process(plan: Plan, records: Path) -> Generator[tuple[int, Run]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task = plan.load()
    try:
        for i, trial in enumerate(plan.trials):
            yield i, plan.run(task, trial, records)
    finally:
        torch.set_num_threads(threads)


def _in_workers(plan: Plan, jobs: int, records: Path) -> Generator[tuple[int, Run]]:
    spawn = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=spawn)
    complete = False
    try:
        # A terminal sends SIGINT to workers as well; they inherit that it is ignored, even while they import torch.
        with on_ctrl_c(signal.SIG_IGN):
            futures = {
                pool.submit(run_in_worker, plan, trial, records): i for i, trial in enumerate(plan.trials)
            }
        yield from as_finished(futures)
        complete = True
    finally:
        pool.shutdown(wait=complete, cancel_futures=True)
        if not complete:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
