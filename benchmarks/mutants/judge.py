"""What became of a mutant: each in a copy of the tree of its own, by the tests of its plan."""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.mutants import tree as trees
from benchmarks.mutants.choose import Plan, file_of
from benchmarks.mutants.cover import Map
from benchmarks.mutants.find import Mutant
from benchmarks.mutants.plugin import PLAN, RESULT

# Tests are timed under coverage, so a sound one is faster than the map says, unless the machine is busy.
ONE_TEST = (20.0, 5.0)  # seconds that a test may take: these, and so many times what it took
ROUND = (60.0, 3.0)  # likewise all of a round, for what a test's own limit cannot end
PATIENCE = 4.0  # times these limits, where a test has run out of them once


@dataclass(frozen=True)
class Verdict:
    """One of killed, timed out, survived; and by which test, or why not."""

    mutant: Mutant
    outcome: str
    by: str = ""
    seconds: float = 0.0
    tests: int = 0


class Judge:
    """Judges mutants, as many at a time as it has copies of the tree."""

    def __init__(self, found: Map, processes: trees.Processes, copies: Sequence[Path], folder: Path) -> None:
        self._map, self._processes, self._folder = found, processes, folder
        self._copies: SimpleQueue[Path] = SimpleQueue()
        for copy in copies:
            self._copies.put(copy)
        self._count = len(copies)
        self._stamp = int(time.time())
        self._lock = threading.Lock()

    def all(self, cases: Sequence[tuple[Mutant, Plan]], said: Callable[[Verdict], None]) -> list[Verdict]:
        """The verdicts in the order of the mutants; each is said as soon as it is known."""

        def one(case: tuple[Mutant, Plan]) -> Verdict:
            verdict = self.judged(*case)
            with self._lock:
                said(verdict)
            return verdict

        with ThreadPoolExecutor(self._count) as pool:
            futures = [pool.submit(one, case) for case in cases]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._processes.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def judged(self, mutant: Mutant, plan: Plan) -> Verdict:
        """Plant the fault, run the tests, take it out again."""
        begin = time.monotonic()
        if not plan.tests:
            return Verdict(mutant, "survived", "no test runs this line")
        copy = self._copies.get()
        try:
            with self._planted(mutant, copy):
                outcome, by = self._judged(copy, plan)
        finally:
            self._copies.put(copy)
        if outcome == "survived" and not plan.is_whole:
            by = "slower tests left out"
        return Verdict(mutant, outcome, by, time.monotonic() - begin, len(plan.tests))

    def _judged(self, copy: Path, plan: Plan) -> tuple[str, str]:
        outcome, by = self._round(copy, plan.first, 1.0)
        if outcome == "survived" and plan.second:
            outcome, by = self._round(copy, plan.second, 1.0)
            if outcome == "killed" and by in plan.second:
                # Tests of other folders, and slow ones: one that a busy machine has failed passes alone.
                again, _ = self._round(copy, (by,), PATIENCE)
                return ("unclear" if again == "survived" else again), by
        if outcome == "timed out":
            return self._round(copy, plan.tests, PATIENCE)
        return outcome, by

    @contextmanager
    def _planted(self, mutant: Mutant, copy: Path) -> Iterator[None]:
        path = copy / mutant.path
        sound = path.read_bytes()
        try:
            self._write(path, mutant.source.encode())
            yield
        finally:
            self._write(path, sound)

    def _write(self, path: Path, content: bytes) -> None:
        # Python takes a compiled module for good if size and whole seconds agree: no two versions may have the same.
        with self._lock:
            self._stamp += 2
            stamp = self._stamp
        path.write_bytes(content)
        os.utime(path, (stamp, stamp))

    def _round(self, copy: Path, tests: Sequence[str], patience: float) -> tuple[str, str]:
        status, found = self._pytest(copy, tests, patience, "-x")
        if status is None:
            return "timed out", "all tests together"
        if found["failed"]:
            return ("timed out" if found["is_timeout"] else "killed"), found["failed"][0]
        if status == 0 and found["is_over"]:
            return "survived", ""
        if status == -signal.SIGKILL:
            return "unclear", "the system ended pytest"
        return "killed", f"pytest's end with status {status}"

    def failing(self, tests: Sequence[str]) -> list[str]:
        """Those of the tests that fail in a copy without a fault: what they say of mutants is worth nothing."""
        copy = self._copies.get()
        status, found = self._pytest(copy, tests, PATIENCE)
        self._copies.put(copy)
        return found["failed"] if found["is_over"] and status in (0, 1) else list(tests)

    def _pytest(
        self, copy: Path, tests: Sequence[str], patience: float, *arguments: str
    ) -> tuple[int | None, dict[str, Any]]:
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            plan, result, temporary = folder / "plan", folder / "result", folder / "tmp"
            seconds = {test: self._map.seconds[test] for test in tests}
            limits = {test: patience * (ONE_TEST[0] + ONE_TEST[1] * one) for test, one in seconds.items()}
            plan.write_text(json.dumps(limits), encoding="utf-8")
            result.write_text(
                json.dumps({"failed": [], "is_timeout": False, "is_over": False}), encoding="utf-8"
            )
            temporary.mkdir()
            files = list(dict.fromkeys(map(file_of, tests)))
            expected = sum(seconds.values()) + sum(self._map.imports.get(file, 0.0) for file in files)
            status = self._processes.run(
                trees.pytest_command("-p", "no:xdist", *arguments, *files),
                cwd=copy,
                env=trees.environment(
                    copy, **{PLAN: str(plan), RESULT: str(result), "TMPDIR": str(temporary)}
                ),
                output=folder / "output",
                seconds=patience * (ROUND[0] + ROUND[1] * expected),
            )
            return status, json.loads(result.read_text(encoding="utf-8"))
