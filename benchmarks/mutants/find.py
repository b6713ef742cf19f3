"""Where the core is, and the sample of its mutants: lines are drawn first, then one mutant of each line.

One mutant a line, as at Google (Petrović, Ivanković: State of Mutation Testing at Google, 2018): the mutants of one
line tell much the same, and a line with many operators would weigh more than one with few.
"""

import ast
import difflib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

PACKAGE = "src/gradkeel"
# Names of folders and files, wherever they stand: not the core, or nothing that a CPU runs.
OUTSIDE = (
    "cli", "compare", "page", "bench", "doctor.py", "trackers.py", "*triton*", "__init__.py", "__main__.py",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One faulty file: its path in the tree, the first line that differs, and its text."""

    path: str
    line: int
    operator: str
    diff: str
    source: str

    @property
    def folder(self) -> str:
        """The folder that it counts for; the package's own modules count together."""
        return "/".join(self.path.split("/")[2:-1]) or "."


def core(tree: Path) -> list[str]:
    """The paths of the core's modules, from the tree's root down."""
    paths = (path.relative_to(tree) for path in (tree / PACKAGE).rglob("*.py"))
    return sorted(path.as_posix() for path in paths if not is_outside(path.parts[2:]))


def is_outside(parts: Iterable[str]) -> bool:
    """Whether a folder or the file itself is not of the core."""
    return any(fnmatch(part, pattern) for part in parts for pattern in OUTSIDE)


def selected(paths: Iterable[str], pattern: str | None) -> list[str]:
    """The paths in which a regular expression is found, or all."""
    return [path for path in paths if pattern is None or re.search(pattern, path)]


def drawn(places: Mapping[tuple[str, int], Sequence[Any]], seed: int) -> Iterable[tuple[str, Any]]:
    """Path and mutation, one for each line, in the seed's order: a larger sample begins like a smaller one."""
    chance = random.Random(seed)
    order = sorted(places)
    chance.shuffle(order)
    for place in order:
        yield place[0], chance.choice(places[place])


def first_difference(old: str, new: str) -> tuple[int, str]:
    """The first line that differs, and the difference on one line."""
    before, after = old.splitlines(), new.splitlines()
    groups = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    changed = [group for group in groups if group[0] != "equal"]
    first, last = changed[0], changed[-1]
    lines = before[first[1] : last[2]], after[first[3] : last[4]]
    words = [" ".join(line.strip() for line in some) for some in lines]
    return first[1] + 1, " => ".join(words)


def sample(tree: Path, paths: Sequence[str], seed: int, size: int) -> tuple[list[Mutant], int]:
    """The mutants that a seed draws, and how many lines there are to draw from."""
    from benchmarks.mutants.operators import mutated, mutations

    texts = {path: (tree / path).read_text(encoding="utf-8") for path in paths}
    modules, places = {}, {}
    for path, text in texts.items():
        modules[path], found = mutations(text)
        for mutation in found:
            places.setdefault((path, mutation.line), []).append(mutation)
    result: list[Mutant] = []
    for path, mutation in drawn(places, seed):
        if len(result) == size:
            break
        new = mutated(modules[path], mutation)
        if _is_different(texts[path], new):
            line, diff = first_difference(texts[path], new)
            result.append(Mutant(path, line, mutation.operator, diff, new))
    return result, len(places)


def _is_different(old: str, new: str, parse: Callable[[str], ast.Module] = ast.parse) -> bool:
    """Whether a mutant is another program, and one at all."""
    try:
        return ast.dump(parse(old)) != ast.dump(parse(new))
    except SyntaxError:
        return False
