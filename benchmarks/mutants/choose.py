"""Which tests judge a mutant: those that run its line, the fastest, up to a budget of seconds."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from benchmarks.mutants.cover import Map
from benchmarks.mutants.find import Mutant

FIRST = 8.0  # seconds of tests that go first: most mutants fall here, and few test files need be imported
FAVOUR = (
    4.0  # a test of the mutant's own folder may take so many times longer than another and is chosen first
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
CACHES = {"cache", "lru_cache", "cached_property"}


@dataclass(frozen=True)
class Plan:
    """The tests in two rounds, in the order to run, and whether the budget left some out."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    is_whole: bool

    @property
    def tests(self) -> tuple[str, ...]:
        """Both rounds."""
        return self.first + self.second


def tests_of(found: Map, mutant: Mutant, source: str) -> set[str]:
    """The tests that run the mutant's line, or, where it has none of its own, another line of its statement.

    A line that runs at import, or once for all tests, does so for whichever test came first. Instead those tests are
    taken that run something in its function, else in its class, else in its module; for a module that holds nothing to
    call, all tests.
    """
    lines = found.lines.get(mutant.path, {})
    module = ast.parse(source)
    within = _around(module, mutant.line)
    late = _late(module)
    if mutant.line in late:
        head = _head(within[-1]) if within and not isinstance(within[-1], DEFINITIONS) else ()
        return set(lines.get(mutant.line, ())) or {test for line in head for test in lines.get(line, ())}
    for scope in [*(one for one in reversed(within) if isinstance(one, DEFINITIONS)), module]:
        some = {test for line in late.intersection(_lines(scope)) for test in lines.get(line, ())}
        if some:
            return some
    return set(found.seconds)


def _around(module: ast.Module, line: int) -> list[ast.stmt]:
    """The statements that hold a line, from the outermost inwards."""
    result: list[ast.stmt] = []
    holder: ast.AST = module
    while inner := next((node for node in _statements(holder) if line in _lines(node)), None):
        result.append(inner)
        holder = inner
    return result


def _late(module: ast.Module) -> set[int]:
    """The lines that run when a function is called, at each call."""
    functions = [node for node in ast.walk(module) if isinstance(node, FUNCTIONS)]
    cached = [node for node in functions if _is_cached(node)]
    late = {line for node in functions for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1)}
    return late.difference(*map(_lines, cached))


def _lines(node: ast.AST) -> range:
    if isinstance(node, ast.Module):
        return range(1, max((_lines(child).stop for child in node.body), default=1))
    assert isinstance(node, ast.stmt)
    decorators = getattr(node, "decorator_list", [])
    return range(min([node.lineno, *(one.lineno for one in decorators)]), (node.end_lineno or 0) + 1)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        elif not isinstance(child, ast.expr):
            yield from _statements(child)


def _head(node: ast.stmt) -> range:
    """The lines of a statement without those of its body."""
    return range(node.lineno, min((child.lineno for child in _statements(node)), default=_lines(node).stop))


def _is_cached(node: ast.stmt) -> bool:
    words = {
        word
        for one in getattr(node, "decorator_list", [])
        for word in ast.unparse(one).split("(")[0].split(".")
    }
    return bool(words & CACHES)


def file_of(test: str) -> str:
    """The file of a test's id."""
    return test.partition("::")[0]


def is_home(test_file: str, path: str) -> bool:
    """Whether a test file stands where a reader looks for the tests of a module: tests mirrors src."""
    here, module = PurePosixPath(test_file), PurePosixPath(path)
    folder = module.parts[2:-1]
    return here.parts[1:-1][: len(folder)] == folder if folder else here.stem == f"test_{module.stem}"


def plan(tests: Iterable[str], path: str, found: Map, budget: float) -> Plan:
    """Take the fastest tests up to the budget; first run those of the mutant's own folder, and then of few files."""
    own = {test: is_home(file_of(test), path) for test in tests}

    def price(test: str) -> tuple[float, str]:
        return found.seconds[test] / (FAVOUR if own[test] else 1.0), test

    chosen: dict[str, list[str]] = defaultdict(list)
    spent = 0.0
    for test in sorted(own, key=price):
        file = file_of(test)
        cost = found.seconds[test] + (0.0 if file in chosen else found.imports.get(file, 0.0))
        if not chosen or spent + cost <= budget:
            chosen[file].append(test)
            spent += cost
    first, second = _rounds(chosen, path, found)
    return Plan(first, second, sum(map(len, chosen.values())) == len(own))


def _rounds(
    chosen: Mapping[str, Sequence[str]], path: str, found: Map
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    rounds: tuple[list[str], list[str]] = ([], [])
    spent = 0.0
    mean = {file: sum(found.seconds[one] for one in some) / len(some) for file, some in chosen.items()}
    for file in sorted(chosen, key=lambda one: (not is_home(one, path), mean[one], one)):
        spent += found.imports.get(file, 0.0)
        for test in sorted(chosen[file], key=lambda one: (found.seconds[one], one)):
            spent += found.seconds[test]
            rounds[bool(rounds[0]) and spent > FIRST].append(test)
    return tuple(rounds[0]), tuple(rounds[1])
