"""Formulas followed once, with symbols in place of numbers, and written down as Python."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn


class Page:
    """The lines of a function under way: each gives what one operation comes to a name; none is written twice."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {
            "inf": math.inf, "nan": math.nan, "exp": math.exp, "log": math.log, "sqrt": math.sqrt,
        }  # fmt: skip
        self._of_line: dict[str, Symbol] = {}

    def symbol(self, name: str) -> "Symbol":
        """Return one of the function's arguments."""
        return Symbol(self, name)

    def write(self, template: str, *values: Any) -> "Symbol":
        """Write an operation down, and return what stands for its result."""
        line = template.format(*map(self.text, values))
        if line not in self._of_line:
            self._of_line[line] = Symbol(self, f"v{len(self._of_line)}")
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

    def call(self, function: Callable[..., Any], *values: Any, usual: str = "") -> "Symbol":
        """Write a function's call down; ``usual`` is what it mostly comes to, and when: ``sqrt({0}) if {0} >= 0``."""
        name = next(
            (name for name, known in self._names.items() if known == function), f"f{len(self._names)}"
        )
        self._names[name] = function
        arguments = ", ".join(f"{{{i}}}" for i in range(len(values)))
        return self.write(f"{usual} else {name}({arguments})" if usual else f"{name}({arguments})", *values)

    def function(
        self, shared: Sequence[str], each: Sequence[str | tuple[str, ...]], results: Sequence[Any]
    ) -> Callable[..., tuple[list[Any], ...]]:
        """Return what these lines make of one cell after the other.

        Args:
            shared: names of the arguments that are for all cells.
            each: names of what each cell has of its own; the function is given a list of each, a tuple of names for
                a list of tuples.
            results: what comes of a cell; the function returns a list of each.
        """
        lists, found = [f"of{i}" for i in range(len(each))], [f"found{i}" for i in range(len(results))]
        cell = [one if isinstance(one, str) else f"({', '.join(one)},)" for one in each]
        source = [
            f"def formula({', '.join([*shared, *lists])}):",
            *(f"    {name} = []" for name in found),
            f"    for {', '.join(cell)}, in zip({', '.join(lists)}, strict=True):",
            *(f"        {symbol.name} = {line}" for line, symbol in self._of_line.items()),
            *(f"        {name}.append({self.text(one)})" for name, one in zip(found, results, strict=True)),
            f"    return {', '.join(found)}",
        ]
        space = dict(self._names)
        exec("\n".join(source), space)  # noqa: S102  # nothing is in it but names and numbers of ours
        formula: Callable[..., tuple[list[Any], ...]] = space["formula"]
        return formula


class Symbol:
    """A number that is not known yet: what a formula does with it is written down on its page."""

    __slots__ = ("name", "page")
    __array_ufunc__: ClassVar[None] = None  # NumPy's numbers leave operations to it
    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # what is looked up by it would be found for all numbers
    __iter__: ClassVar[None] = None  # else its items would be asked for one after the other, for ever

    def __init__(self, page: Page, name: str) -> None:
        self.page, self.name = page, name

    def write(self, template: str, *values: Any) -> "Symbol":
        """Write an operation down."""
        return self.page.write(template, *values)

    def call(self, function: Callable[..., Any], *values: Any, usual: str = "") -> "Symbol":
        """Write a function's call down."""
        return self.page.call(function, *values, usual=usual)

    def __getitem__(self, place: Any) -> "Symbol":
        return self.write("{}[{}]", self, place)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a formula in plain numbers is followed once for all of them: choose by where(), not by if"
        )

    def __str__(self) -> NoReturn:
        raise TypeError("a formula in plain numbers is followed once for all of them, which have no words")


def _operation(template: str) -> Callable[[Symbol, Any], Symbol]:
    return lambda self, other: self.page.write(template, self, other)


def _change(template: str) -> Callable[[Symbol], Symbol]:
    return lambda self: self.page.write(template, self)


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "mod": "%", "pow": "**", "and": "&", "or": "|"}
for _name, _sign in _SIGNS.items():
    setattr(Symbol, f"__{_name}__", _operation(f"{{}} {_sign} {{}}"))
    setattr(Symbol, f"__r{_name}__", _operation(f"{{1}} {_sign} {{0}}"))
for _name, _sign in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():
    setattr(Symbol, f"__{_name}__", _operation(f"{{}} {_sign} {{}}"))
for _name, _form in {"neg": "-{}", "abs": "abs({})", "invert": "not {}"}.items():
    setattr(Symbol, f"__{_name}__", _change(_form))
