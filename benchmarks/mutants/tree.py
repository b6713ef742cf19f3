"""Copies of the tree, and pytest in them: in a process group of its own, which goes as a whole."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

MARK = "MUTANTS_MARK"  # in the environment of every process of a command


class TreeError(RuntimeError):
    """The files of the tree cannot be told."""


class StoppedError(Exception):
    """The user wants no more."""


def files(tree: Path) -> list[Path]:
    """What belongs to the tree, from its root down: tracked, or new and not ignored, and the native kernels."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    try:
        listed = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise TreeError(f"git must say which files belong to the tree, and did not: {error}") from None
    paths = {Path(name) for name in listed.split("\0") if name and (tree / name).is_file()}
    kernels = (path.relative_to(tree) for path in (tree / "src").rglob("*.so"))
    return sorted(paths.union(kernels))


def copy(tree: Path, to: Path) -> None:
    """A copy of all files, with their times, so that compiled modules stay good."""
    for path in files(tree):
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tree / path, to / path)


class Processes:
    """Starts commands and ends all of them, with what they have started, when asked."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._is_stopped = False

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        output: Path,
        seconds: float | None = None,
    ) -> int | None:
        """The exit status, or None where the time ran out."""
        mark = f"{MARK}={uuid.uuid4().hex}"
        marked = {**env, MARK: mark.partition("=")[2]}
        with output.open("wb") as sink:
            with self._lock:
                if self._is_stopped:
                    raise StoppedError
                process = subprocess.Popen(
                    command, cwd=cwd, env=marked, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
                    start_new_session=True,
                )  # fmt: skip
                self._running[mark] = process
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process, mark)  # after a good end as well: a test's own processes may have stayed
                with self._lock:
                    self._running.pop(mark)
        if self._is_stopped:
            raise StoppedError
        return status

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        with self._lock:
            self._is_stopped = True
            for mark, process in self._running.items():
                _end(process, mark)


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Processes in sessions of their own, as torchrun starts them, are known by the environment that they inherit.
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def environment(tree: Path, **more: str) -> dict[str, str]:
    """The environment of tests in a copy: its sources first, one thread, nothing of the user's."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("GRADKEEL_", "MUTANTS_"))
    }
    paths = [str(tree / "src"), str(tree), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | more


def pytest_command(*arguments: str) -> list[str]:
    """Pytest with this project's plugin, and no cache that one run hands to the next."""
    return [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
            "-p", "benchmarks.mutants.plugin", *arguments]  # fmt: skip
