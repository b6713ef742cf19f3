"""The runs of a comparison on a Ray cluster: one task of one CPU and one thread a run, through Ray's own API."""

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from gradkeel.attaching import ignore_environment
from gradkeel.compare.command import on_ctrl_c
from gradkeel.compare.plan import Plan, run_in_worker
from gradkeel.compare.run import Run, Trial, set_aside
from gradkeel.compare.task import TaskError
from gradkeel.errors import import_extra

SUBMITTED = 1000  # runs at a time where nobody says how many: each wait looks through all of them
REACHED_WITHIN = 5.0  # seconds for a connection; Ray itself goes on trying for minutes


def in_ray(plan: Plan, jobs: int | None, records: Path, address: str) -> Generator[tuple[int, Run]]:
    """Index and result of each trial as it finishes.

    A run whose worker or machine dies is made again, as Ray does by default. What is begun here is ended here: runs
    that have not finished, and Ray, if it was started for them. Without ``jobs`` the cluster's CPUs are the number of
    runs at a time. Records, where the plan asks for them, are brought to a folder on this machine. This process must
    have made the plan, and thereby imported the task's modules.

    Raises:
        MissingExtraError: Ray is not installed.
        TaskError: there is no cluster at the address, or Ray gave a run up.
    """
    with _connected(address) as ray:
        work = ray.remote(num_cpus=1)(_work)
        trials = plan.trials
        left = iter(enumerate(trials))
        running: dict[Any, int] = {}
        while True:
            for i, trial in itertools.islice(left, (jobs or SUBMITTED) - len(running)):
                running[work.remote(plan, trial)] = i
            if not running:
                return
            (done,), _ = ray.wait(list(running))
            i = running.pop(done)
            yield i, _result(ray, done, records / trials[i].record_name)


def _result(ray: Any, done: Any, path: Path) -> Run:
    try:
        run, record = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise TaskError(f"Ray gave up on a run: {_words(error)}") from error
    if record is not None:
        set_aside(path)
        path.write_bytes(record)
    return run


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected until the end, which ends the runs that are left.

    They are not cancelled one by one: Ray 2.60 aborts this process if one finishes while ``ray.cancel`` is at work.
    """
    ray = import_extra("ray", "ray", "comparing on a Ray cluster")
    if ray.is_initialized():
        raise TaskError(
            "--ray: this program is connected to Ray already; call ray.shutdown() before it compares"
        )
    # Ray hides the GPUs from tasks that ask for none, and warns that it will not; in the local pool they are seen.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address in ("", "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    check(address)
    try:
        with _ctrl_c_noted() as pressed:
            _start(ray, address)
        if pressed:
            raise KeyboardInterrupt
        yield ray
    finally:
        with _ctrl_c_noted():
            ray.shutdown()


def _start(ray: Any, address: str) -> None:
    own = own_modules()
    try:
        ray.init(
            address=address or None,
            runtime_env={"py_modules": own} if own else None,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        option = f"--ray={address}" if address else "--ray"
        asked = ":" in address and "RAY_AUTH_MODE" not in os.environ
        token = "; a cluster that asks for a token needs RAY_AUTH_MODE=token" if asked else ""
        raise TaskError(f"{option}: Ray does not connect: {_words(error)}{token}") from error


@contextlib.contextmanager
def _ctrl_c_noted() -> Iterator[list[int]]:
    # Ray leaves processes behind if it is interrupted while they start or end. A second Ctrl-C interrupts all the same.
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    with on_ctrl_c(note):
        yield pressed


def _words(error: Exception) -> str:
    """What Ray says, without the traceback between its first line and the reason in the last."""
    lines = str(error).strip().splitlines()
    return " ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else type(error).__name__


def check(address: str) -> None:
    """Raise at once what Ray would take minutes for."""
    if address in ("", "auto", "local"):
        return
    try:
        where = urlsplit(address if "://" in address else f"//{address}")
        host, port = where.hostname, where.port or (10001 if where.scheme == "ray" else None)
    except ValueError:
        host = port = None
    if not host or not port:
        raise TaskError(f"--ray={address}: an address is host:port, ray://host:port, auto or local")
    try:
        socket.create_connection((host, port), REACHED_WITHIN).close()
    except OSError as error:
        raise TaskError(
            f"--ray={address}: nothing answers at {host}:{port} ({error.strerror or error})"
        ) from None


def own_modules() -> list[str]:
    """Modules of the current directory that have been imported, as the task has: other machines need them, too."""
    modules = [module for name, module in list(sys.modules.items()) if "." not in name]
    places: set[str] = set()
    for module in modules:
        if isinstance(module, ModuleType):
            names = vars(module)  # not getattr, at which some modules import others
            places.update(names.get("__path__") or [names.get("__file__") or ""])
    return sorted(place for place in places if Path(place).parent == Path.cwd())


def _work(plan: Plan, trial: Trial) -> tuple[Run, bytes | None]:
    """The run and its record, since this machine may not be the one that wants it."""
    ignore_environment()  # of the worker, which would take the place of the policy that is compared
    with tempfile.TemporaryDirectory() as folder:
        run = run_in_worker(plan, trial, Path(folder))
        return run, (Path(folder) / trial.record_name).read_bytes() if plan.record else None
