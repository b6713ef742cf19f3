"""Which mutations are made: those of mutmut that say something about the tests, and two that it lacks.

What is left out, and why, is said in `LEFT_OUT`, which goes into the report.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation import mutators
from mutmut.mutation.file_mutation import deep_replace

LEFT_OUT = (
    "Not mutated, for it is words or says nothing that a program does: docstrings, annotations, decorators, "
    "`__repr__` and `__str__`, f-strings, the arguments of `raise`, of warnings and of logging, `assert`, and what "
    "only a type checker reads.",
    "Not used of mutmut, for any test that runs the line fails, so that they would count coverage: `x = None`, "
    "`f(None)`, a lost positional argument, a lambda that returns None, changed strings.",
    "Not used, for nothing can differ, or not on a CPU: `strict=`, `repr=`, `stacklevel=`, `device=`, `non_blocking=`, "
    "types in `isinstance`, unions of types.",
    "Added to those of mutmut: a condition is negated, a call that stands alone is removed.",
)

SILENT_KEYWORDS = {"strict", "repr", "stacklevel", "device", "non_blocking"}
SILENT_FUNCTIONS = {"__repr__", "__str__"}
SILENT_CALLS = {
    "warn",
    "debug",
    "info",
    "warning",
    "error",
    "exception",
    "isinstance",
    "issubclass",
    "cast",
    "TypeVar",
}
CONDITIONS = (cst.If, cst.While, cst.CompIf)


@dataclass(frozen=True)
class Mutation:
    """One change: the node that is replaced, by what, and the line where the node begins."""

    line: int
    operator: str
    old: cst.CSTNode
    new: cst.CSTNode


def keyword_removed(node: cst.Call) -> Iterator[cst.Call]:
    """The calls that lack one keyword argument: its default takes its place."""
    for call in mutators.operator_arg_removal(node):
        lost = [one for one in node.args if not any(one is kept for kept in call.args)]
        if len(call.args) == len(node.args) or lost[0].keyword is None:
            continue
        if lost[0].keyword.value not in SILENT_KEYWORDS:
            yield call


def condition_negated(node: Any) -> Iterator[cst.CSTNode]:
    """The opposite of a condition that mutmut has no operator for: a name, an attribute, a call."""
    if m.matches(node.test, m.Name() | m.Attribute() | m.Call() | m.Subscript() | m.NamedExpr()):
        bare = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), bare))


def call_removed(node: cst.Expr) -> Iterator[cst.Pass]:
    """Nothing where a call stood alone."""
    if m.matches(node.value, m.Call() | m.Await()):
        yield cst.Pass()


OPERATORS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (cst.BaseNumber, mutators.operator_number),
    (cst.Name, mutators.operator_name),
    (cst.AugAssign, mutators.operator_augmented_assignment),
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),
    (cst.Call, mutators.operator_symmetric_string_methods_swap),
    (cst.Call, mutators.operator_unsymmetrical_string_methods_swap),
    (cst.CSTNode, mutators.operator_keywords),
    (cst.CSTNode, mutators.operator_swap_op),
    (cst.Match, mutators.operator_match),
    (cst.IfExp, mutators.operator_if_exp),
    (cst.Call, keyword_removed),
    (CONDITIONS, condition_negated),
    (cst.Expr, call_removed),
)


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Mutation] = []
        self._functions = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _is_silent(node):
            return False
        if not (self._functions == 0 and m.matches(node, m.BinaryOperation(operator=m.BitOr()))):
            self._collect(node)
        if isinstance(node, cst.FunctionDef):
            self._functions += 1
        # Types and words stand in a call's arguments: the call itself may go, they stay as they are.
        return not (isinstance(node, cst.Call) and _name(node.func) in SILENT_CALLS)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef) and not _is_silent(original_node):
            self._functions -= 1

    def _collect(self, node: cst.CSTNode) -> None:
        place = self.get_metadata(PositionProvider, node, None)
        if place is None:
            return
        for kind, operator in OPERATORS:
            if isinstance(node, kind) and not (
                operator is keyword_removed and _name(node.func) in SILENT_CALLS
            ):
                name = operator.__name__.removeprefix("operator_")
                self.found += [Mutation(place.start.line, name, node, new) for new in operator(node)]


def _is_silent(node: cst.CSTNode) -> bool:
    kinds = (cst.Annotation, cst.Decorator, cst.FormattedString, cst.Raise, cst.Assert, cst.TypeAlias)
    if isinstance(node, kinds):
        return True
    if isinstance(node, cst.FunctionDef):
        return node.name.value in SILENT_FUNCTIONS
    if isinstance(node, cst.Arg) and node.keyword is not None:
        return node.keyword.value in SILENT_KEYWORDS
    return isinstance(node, cst.If) and _name(node.test) == "TYPE_CHECKING"


def _name(node: cst.CSTNode) -> str:
    if isinstance(node, cst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, cst.Name) else ""


def mutations(source: str) -> tuple[cst.Module, list[Mutation]]:
    """All mutations of a file, in the order of its lines."""
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    visitor = _Visitor()
    wrapper.visit(visitor)
    return wrapper.module, sorted(visitor.found, key=lambda one: one.line)


def mutated(module: cst.Module, mutation: Mutation) -> str:
    """The file's text after one mutation."""
    changed = deep_replace(module, mutation.old, mutation.new)
    assert isinstance(changed, cst.Module)
    return changed.code
