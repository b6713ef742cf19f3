"""A verdict on one cell as one function of plain numbers, which is applied to a few cells one after the other."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from gradkeel.norms import GradientNorms, State
from gradkeel.policies.base import Scope
from gradkeel.policies.numbers import Memory, Number
from gradkeel.policies.scopes import Cells, WrittenCell
from gradkeel.policies.states import PlainState
from gradkeel.policies.symbols import Page

Verdict: TypeAlias = tuple[Number, Number, Memory]
"""Coefficients, or whether to skip; the bounds in force; and the state after the step."""


class Written:
    """A verdict, written down when it is first asked for: once for each set of names that a state may have.

    Args:
        verdict: the formulas, on `Cells` and what they remember.
        cell: what stands for a cell in them.
    """

    def __init__(
        self, verdict: Callable[[Cells, Memory], Verdict], cell: type[WrittenCell] = WrittenCell
    ) -> None:
        self._verdict, self._cell = verdict, cell
        self._functions: dict[tuple[str, ...], tuple[Callable[..., Any] | None, tuple[str, ...]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles write it anew."""
        return type(self), (self._verdict, self._cell)

    def on(
        self, measured: GradientNorms, scope: Scope, state: State
    ) -> tuple[list[Any], list[float], State] | None:
        """Return the verdicts on the cells, the bounds in force, and the new state.

        None where cells are many or not on the host, or the formulas cannot be written down, for they are of tensors,
        or an operator of theirs has no result in plain numbers.
        """
        norms, total = self._cell.plain(measured, scope)
        if not norms:
            return None
        names = tuple(state)
        if names not in self._functions:
            self._functions[names] = self._write(names)
        function, uses = self._functions[names]
        if function is None:
            return None
        columns: list[Sequence[Any]] = [norms]
        if uses:
            cells = Cells(measured, scope)
            columns += [getattr(cells, name).tolist() for name in uses]
        plain = PlainState.of(state) if names else None
        try:
            found, bounds, after = function(
                total, measured.step, *columns, *([] if plain is None else [plain.cells])
            )
        except (ArithmeticError, TypeError):  # Python raises where tensors are inf or NaN
            return None
        return found, bounds, state if plain is None else PlainState(after, plain.dtypes)

    def _write(self, names: Sequence[str]) -> tuple[Callable[..., Any] | None, tuple[str, ...]]:
        page = Page()
        cell = self._cell(page)
        kept = [f"kept{i}" for i in range(len(names))]
        before = {name: page.symbol(own) for name, own in zip(names, kept, strict=True)}
        try:
            found, bound, after = self._verdict(cell, before)
            each: list[str | tuple[str, ...]] = ["norm", *cell.uses]
            if kept:
                each.append(tuple(kept))
            results = (found, bound, tuple(after[name] for name in names))
            return page.function(("total", "step"), each, results), tuple(cell.uses)
        except Exception:  # noqa: BLE001  # the formulas are the user's; what is wrong with them is seen on tensors
            return None, ()
