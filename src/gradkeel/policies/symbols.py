"""Formulas followed once, with symbols in place of numbers, and written down: as Python, and operation by operation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, TypeAlias

from gradkeel.norms import Lines

_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "mod": "%", "pow": "**", "and": "&", "or": "|",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
_CHANGES = {"neg": "-{0}", "abs": "abs({0})", "invert": "not {0} if type({0}) is bool else ~{0}"}
_LOGICAL = {"and", "or", "invert"}
_TRUTHS = _LOGICAL | {"lt", "le", "gt", "ge", "eq", "ne", "is_norm", "is_number"}
"""What lines do with truths alone, for of whole numbers these are of their bits; and what is a truth for certain."""
# How operations are written in Python: those that are functions' by what they mostly come to, all others by the call.
_TEXTS = {
    **{name: f"{{0}} {sign} {{1}}" for name, sign in _SIGNS.items()},
    **_CHANGES,
    "item": "{0}[{1}]",
    "where": "{1} if {0} else {2}",
    "maximum": "{0} if {0} >= {1} or {0} != {0} else {1}",
    "minimum": "{0} if {0} <= {1} or {0} != {0} else {1}",
    "is_norm": "0.0 < {0} < inf",
    "is_number": "-inf < {0} < inf",
    "divide": "{0} / {1} if {1} else {call}",
    "log": "log({0}) if {0} > 0 else {call}",
    "exp": "exp({0}) if {0} < 700 else {call}",
    "sqrt": "sqrt({0}) if {0} >= 0 else {call}",
}


@dataclass(frozen=True, slots=True)
class Formula:
    """What is written on a page, as functions of plain numbers and as lines."""

    # takes what all cells share, then a list of each thing that cells have of their own, and one of tuples of what is
    # remembered of each; returns a list of each result
    plain: Callable[..., tuple[list[Any], ...]]
    # takes the same first arguments; returns the numbers that the lines share
    shared: Callable[..., list[float]]
    lines: Lines | None  # the operations on a cell; None where one of them is on something else than numbers
    ring: int | None  # which of what is remembered is a ring, in the lines


class Page:
    """The lines of a formula under way: each gives what one operation comes to a name; none is written twice.

    ``shared`` are the names of the arguments that are for all cells.
    """

    def __init__(self, shared: Sequence[str]) -> None:
        self._names: dict[str, Any] = {
            "inf": math.inf, "nan": math.nan, "exp": math.exp, "log": math.log, "sqrt": math.sqrt,
        }  # fmt: skip
        self._shared = list(shared)  # arguments, and results of lines on nothing else
        self._arguments = tuple(shared)
        self._of_line: dict[str, Symbol] = {}
        self._operations: list[tuple[Symbol, str, tuple[Any, ...]]] = []

    def symbol(self, name: str) -> "Symbol":
        """Return one of the function's arguments."""
        return Symbol(self, name)

    def write(self, operation: str, *values: Any, call: str = "") -> "Symbol":
        """Write an operation down, and return what stands for its result."""
        line = _TEXTS.get(operation, "{call}").format(*map(self.text, values), call=call)
        if line not in self._of_line:
            symbol = self._of_line[line] = Symbol(self, f"v{len(self._of_line)}")
            self._operations.append((symbol, operation, values))
            if all(value.name in self._shared for value in values if isinstance(value, Symbol)):
                self._shared.append(symbol.name)
        return self._of_line[line]

    def text(self, value: Any) -> str:
        """Return a number, or a tuple of them, as it stands in a line; nothing else is written."""
        if isinstance(value, Symbol):
            return value.name
        if isinstance(value, tuple):
            return f"({''.join(f'{self.text(one)}, ' for one in value)})"
        if isinstance(value, bool):
            return str(value)
        if not isinstance(value, int | float):
            raise TypeError(f"a formula in plain numbers has no place for {type(value).__name__}")
        return f"({int(value) if isinstance(value, int) else float(value)!r})"

    def call(self, function: Callable[..., Any], *values: Any, operation: str = "call") -> "Symbol":
        """Write a function's call down, or the operation that it stands for."""
        name = next(
            (name for name, known in self._names.items() if known == function), f"f{len(self._names)}"
        )
        self._names[name] = function
        return self.write(operation, *values, call=f"{name}({', '.join(map(self.text, values))})")

    def formula(
        self, own: Sequence[str], kept: Sequence[str], found: Sequence[Any], after: Sequence[Any]
    ) -> Formula:
        """Return what these lines make of one cell after the other.

        ``own`` and ``kept`` are names of what each cell has of its own, and of what is remembered of it; ``found`` is
        what comes of it, and ``after`` what is to be remembered.
        """
        lists, cell, results = [f"of{i}" for i in range(len(own))], [*own], [*map(self.text, found)]
        if kept:
            lists.append("before")
            cell.append(f"({', '.join(kept)},)")
            results.append(self.text(tuple(after)))
        names = [f"found{i}" for i in range(len(results))]
        texts = {symbol.name: line for line, symbol in self._of_line.items()}
        shared = [name for name in texts if name in self._shared]
        lines, used, ring = self._lines(own, kept, found, after)
        arguments = ", ".join(self._arguments)
        source = [
            f"def shared({arguments}):",
            *(f"    {name} = {texts[name]}" for name in shared),
            f"    return [{', '.join(used)}]",
            f"def plain({', '.join([arguments, *lists])}):",
            *(f"    {name} = []" for name in names),
            *(f"    {name} = {texts[name]}" for name in shared),
            f"    for {', '.join(cell)}, in zip({', '.join(lists)}, strict=True):",
            *(f"        {name} = {line}" for name, line in texts.items() if name not in shared),
            *(f"        {name}.append({one})" for name, one in zip(names, results, strict=True)),
            f"    return {', '.join(names)},",
        ]
        space = dict(self._names)
        exec("\n".join(source), space)  # noqa: S102  # nothing is in it but names and numbers of ours
        return Formula(space["plain"], space["shared"], lines, ring)

    def _lines(
        self, own: Sequence[str], kept: Sequence[str], found: Sequence[Any], after: Sequence[Any]
    ) -> tuple[Lines | None, list[str], int | None]:
        """The operations on a cell by the places of their numbers, the names of shared ones in use, and the ring."""
        if not self._fits_lines():
            return None, [], None
        each = {one[0].name: one[1:] for one in self._operations if one[0].name not in self._shared}
        ring, entry = _entry(each, kept, after)
        scalars = [(name, new) for name, new in zip(kept, after, strict=True) if name != ring]
        results = [*found, *(new for _, new in scalars), *entry]
        try:
            operands = [_of_numbers(operation, values, ring) for operation, values in each.values()]
            numbers = [*map(_key, results), *(_key(value) for values in operands for value in values)]
            constants = dict.fromkeys(number for number in numbers if not isinstance(number, str))
            used = dict.fromkeys(name for name in numbers if name in self._shared)
            order = [*used, *own, *(name for name, _ in scalars), *constants, *each]
            places = {number: place for place, number in enumerate(order)}
            operations = tuple(
                (operation, *(places[_key(value)] for value in values))
                for (operation, _), values in zip(each.values(), operands, strict=True)
            )
            found_at = tuple(places[_key(value)] for value in results)
        except (KeyError, TypeError):  # on something else than numbers, or on the ring in another way
            return None, [], None
        ends, cells_own = len(results) - len(entry), len(own) + len(scalars)
        lines = Lines(len(used), cells_own, tuple(constants), operations, found_at[:ends], found_at[ends:])
        return lines, list(used), None if ring is None else list(kept).index(ring)

    def _fits_lines(self) -> bool:
        """Whether every logical operation on a cell is on truths."""
        truths = {symbol.name for symbol, operation, _ in self._operations if operation in _TRUTHS}
        return all(
            isinstance(value, bool) or (isinstance(value, Symbol) and value.name in truths)
            for symbol, operation, values in self._operations
            if operation in _LOGICAL and symbol.name not in self._shared
            for value in values
        )


def _key(value: Any) -> str | float:
    """By what a number is found: its name, or itself."""
    return value.name if isinstance(value, Symbol) else float(value)


def _of_numbers(operation: str, values: tuple[Any, ...], ring: str | None) -> tuple[Any, ...]:
    """The numbers that an operation is on; a window is of the ring, which is one for all lines."""
    if operation != "window":
        return values
    if values[0].name != ring:
        raise TypeError("a window of another ring")
    return values[1:]


_Operation: TypeAlias = tuple[str, tuple[Any, ...]]


def _entry(
    each: dict[str, _Operation], kept: Sequence[str], after: Sequence[Any]
) -> tuple[str | None, tuple[Any, ...]]:
    """The first ring that a norm enters; the condition, how many it has seen and the norm, which are no lines then."""
    for name, new in zip(kept, after, strict=True):
        condition, entered = True, new
        operation, values = _made_by(each, new)
        if operation == "where" and isinstance(values[2], Symbol) and values[2].name == name:
            condition, entered = values[:2]
            operation, values = _made_by(each, entered)
        if operation == "entered" and values[0].name == name:
            for symbol in {new.name, entered.name}:
                del each[symbol]
            return name, (condition, *values[1:])
    return None, ()


def _made_by(each: dict[str, _Operation], value: Any) -> _Operation:
    return each.get(value.name, ("", ())) if isinstance(value, Symbol) else ("", ())


class Symbol:
    """A number that is not known yet: what a formula does with it is written down on its page."""

    __slots__ = ("name", "page")
    __array_ufunc__: ClassVar[None] = None  # NumPy's numbers leave operations to it
    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # what is looked up by it would be found for all numbers
    __iter__: ClassVar[None] = None  # else its items would be asked for one after the other, for ever

    def __init__(self, page: Page, name: str) -> None:
        self.page, self.name = page, name

    def write(self, operation: str, *values: Any) -> "Symbol":
        """Write an operation down."""
        return self.page.write(operation, *values)

    def call(self, function: Callable[..., Any], *values: Any, operation: str = "call") -> "Symbol":
        """Write a function's call down, or the operation that it stands for."""
        return self.page.call(function, *values, operation=operation)

    def __getitem__(self, place: Any) -> "Symbol":
        return self.write("item", self, place)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a formula in plain numbers is followed once for all of them: choose by where(), not by if"
        )

    def __str__(self) -> NoReturn:
        raise TypeError("a formula in plain numbers is followed once for all of them, which have no words")


def _operation(name: str) -> Callable[[Symbol, Any], Symbol]:
    return lambda self, other: self.page.write(name, self, other)


def _turned(name: str) -> Callable[[Symbol, Any], Symbol]:
    return lambda self, other: self.page.write(name, other, self)


def _change(name: str) -> Callable[[Symbol], Symbol]:
    return lambda self: self.page.write(name, self)


for _name, _sign in _SIGNS.items():
    setattr(Symbol, f"__{_name}__", _operation(_name))
    if _sign not in {"<", "<=", ">", ">=", "==", "!="}:  # Python turns these by itself
        setattr(Symbol, f"__r{_name}__", _turned(_name))
for _name in _CHANGES:
    setattr(Symbol, f"__{_name}__", _change(_name))
