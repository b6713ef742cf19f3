"""The map: which tests run which line, and how long each takes; drawn once for a tree, kept under build/."""

import gzip
import hashlib
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.mutants import tree as trees
from benchmarks.mutants.contexts import CURRENT, LOG, TEST, context_of

FOLDER = Path("build/mutants")
KEPT = 3  # maps of other trees and tests
PART_OF_THE_KEY = ("src", "tests", "benchmarks", "examples", "pyproject.toml")


class MapError(RuntimeError):
    """The map cannot be drawn, read or kept."""


@dataclass
class Map:
    """Seconds of each test that passed, seconds that its file takes to import, and the tests of each line."""

    seconds: dict[str, float] = field(default_factory=dict)
    imports: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def key_of(tree: Path, tests: Sequence[str] = ()) -> str:
    """Changes with everything that decides what the tests run; no paths of tests stand for the whole suite."""
    digest = hashlib.sha256(f"{sys.version} {list(tests)}".encode())
    for path in trees.files(tree):
        if path.parts[0] in PART_OF_THE_KEY and path.parts[:2] != ("benchmarks", "mutants"):
            digest.update(f"{path}\0".encode() + (tree / path).read_bytes())
    return digest.hexdigest()[:16]


def load(folder: Path, key: str) -> Map | None:
    """The map that a key stands for, if it has been drawn."""
    path = folder / f"map-{key}.json.gz"
    if not path.exists():
        return None
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = json.load(file)
        tests = found["tests"]
        lines = {
            name: {int(line): [tests[i] for i in some] for line, some in of.items()}
            for name, of in found["lines"].items()
        }
        seconds = dict(zip(tests, found["seconds"], strict=True))
        return Map(seconds, found["imports"], lines, found["failed"])
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise MapError(f"{path} cannot be read ({error}); remove it, and it is drawn anew") from None


def save(found: Map, folder: Path, key: str) -> Path:
    """Keep the map; old ones go."""
    place = {test: i for i, test in enumerate(found.seconds)}
    lines = {
        name: {line: [place[test] for test in some] for line, some in of.items()}
        for name, of in found.lines.items()
    }
    content = {
        "tests": list(found.seconds),
        "seconds": [round(seconds, 4) for seconds in found.seconds.values()],
        "imports": found.imports,
        "lines": lines,
        "failed": found.failed,
    }
    path = folder / f"map-{key}.json.gz"
    writable(folder)
    for old in sorted(folder.glob("map-*.json.gz"), key=lambda one: one.stat().st_mtime)[:-KEPT]:
        old.unlink()
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        json.dump(content, file)
    return path


def writable(folder: Path) -> None:
    """Raise, before minutes are spent, where the map could not be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MapError(f"the map of tests cannot be kept in {folder}: {error}") from None


RC = """
[run]
core = ctrace
data_file = {folder}/coverage
parallel = true
relative_files = true
source_pkgs = gradkeel
concurrency = multiprocessing, thread
sigterm = true
context = ${{{test}-}}
plugins = benchmarks.mutants.contexts
disable_warnings = no-data-collected, module-not-imported, module-not-measured, couldnt-parse, dynamic-conflict
"""


def draw(copy: Path, processes: trees.Processes, workers: int, tests: Sequence[str] = ()) -> Map:
    """Run the suite, or some paths of it, under coverage in a copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="gradkeel-map-") as name:
        folder = Path(name)
        rc = folder / "coveragerc"
        rc.write_text(RC.format(folder=folder, test=TEST), encoding="utf-8")
        (folder / "log").mkdir()
        env = trees.environment(copy, COVERAGE_PROCESS_START=str(rc), **{LOG: str(folder / "log")})
        env.pop(CURRENT, None)
        distributed = ("-n", str(workers), "--dist", "worksteal") if workers > 1 else ("-p", "no:xdist")
        command = trees.pytest_command(*distributed, *tests)
        output = folder / "output"
        status = processes.run(command, cwd=copy, env=env, output=output)
        found = _read(folder, copy)
        if status not in (0, 1) or not found.seconds:
            words = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise MapError(f"the tests did not run (pytest's status {status}): {' | '.join(words[-3:])}")
        return found


def _read(folder: Path, copy: Path) -> Map:
    found = Map()
    names: dict[str, str] = {}
    for path in sorted((folder / "log").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "file" in entry:
                found.imports[entry["file"]] = round(entry["seconds"], 3)
            elif entry["outcome"] == "passed":
                found.seconds[entry["test"]] = entry["seconds"]
                names[context_of(entry["test"])] = entry["test"]
            elif entry["outcome"] == "failed":
                found.failed.append(entry["test"])
    _read_lines(folder, copy, names, found)
    return found


def _read_lines(folder: Path, copy: Path, names: dict[str, str], found: Map) -> None:
    from coverage import CoverageData

    touched: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(folder.glob("coverage.*")):
        data = CoverageData(basename=str(path))
        data.read()
        for measured in data.measured_files():
            name = os.path.relpath(copy / measured, copy)
            for line, contexts in data.contexts_by_lineno(measured).items():
                # A process that stays has begun in one test and works for another: the last part is the one.
                of_line = (names.get(context.rpartition("|")[2]) for context in contexts)
                touched[name][line].update(test for test in of_line if test)
    order = {test: i for i, test in enumerate(found.seconds)}
    for name in sorted(touched):
        found.lines[name] = {
            line: sorted(some, key=order.__getitem__) for line, some in touched[name].items()
        }
