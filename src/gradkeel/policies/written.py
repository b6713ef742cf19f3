"""A verdict on one cell, written down once and followed for each: by a compiled formula, or by Python on numbers."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from gradkeel.norms import GradientNorms, State, compilers, from_memory
from gradkeel.policies.base import Scope
from gradkeel.policies.numbers import Memory, Number
from gradkeel.policies.scopes import Cells, WrittenCell
from gradkeel.policies.states import CompiledState, PlainState
from gradkeel.policies.symbols import Formula, Page

Verdict: TypeAlias = tuple[Number, Number, Memory]
"""Coefficients, or whether to skip; the bounds in force; and the state after the step."""

Verdicts: TypeAlias = tuple[list[Any], list[float], State]
"""The same of k cells, in plain numbers."""

_BYTES = 8  # of a number
FEW, MANY = 64, 4096
"""So many cells are decided on in plain numbers: by Python, and by a compiled formula."""


class Written:
    """A verdict on ``Cells``, written down when it is first asked for: once for each set of names a state may have.

    ``cell`` is what stands for a cell in its formulas.
    """

    def __init__(
        self, verdict: Callable[[Cells, Memory], Verdict], cell: type[WrittenCell] = WrittenCell
    ) -> None:
        self._verdict, self._cell = verdict, cell
        self._written: dict[tuple[str, ...], WrittenVerdict | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles write it anew."""
        return type(self), (self._verdict, self._cell)

    def on(self, measured: GradientNorms, scope: Scope, state: State) -> Verdicts | None:
        """Return the verdicts on the cells, the bounds in force, and the new state.

        None where cells are many or not on the host, or the formulas cannot be written down, for they are of tensors,
        or an operator of theirs has no result in plain numbers.
        """
        norms, number, total = self._cell.plain(measured, scope)
        names = tuple(state.layout.dtypes if type(state) is CompiledState else state)
        if names not in self._written:
            self._written[names] = self._write(names)
        written = self._written[names]
        if written is None or not 0 < number <= MANY:
            return None
        looks: Sequence[Tensor] = ()
        if written.looks:
            cells = Cells(measured, scope)
            looks = [getattr(cells, name) for name in written.looks]
        try:
            found = written.compiled_on(total, measured.step, norms, number, looks, state)
            if found is None and number <= FEW:
                found = written.plain_on(total, measured.step, norms, looks, state)
        except (ArithmeticError, TypeError):  # Python raises where tensors are inf or NaN
            return None
        return found

    def _write(self, names: Sequence[str]) -> "WrittenVerdict | None":
        page = Page(("total", "step"))
        cell = self._cell(page)
        kept = [f"kept{i}" for i in range(len(names))]
        before = {name: page.symbol(own) for name, own in zip(names, kept, strict=True)}
        try:
            found, bound, after = self._verdict(cell, before)
            own = ["norm", *cell.uses]
            formula = page.formula(own, kept, (found, bound), [after[name] for name in names])
        except Exception:  # noqa: BLE001  # the formulas are the user's; what is wrong with them is seen on tensors
            return None
        return WrittenVerdict(formula, tuple(cell.uses), remembers=bool(names))


class WrittenVerdict:
    """A verdict that is written down; it ``looks`` at more than norms and state, by the names of `Cells`."""

    def __init__(self, formula: Formula, looks: tuple[str, ...], *, remembers: bool) -> None:
        self.looks, self._remembers = looks, remembers
        self._formula, lines = formula, formula.lines
        self._compiled = (
            None if lines is None else next(filter(None, (make(lines) for make in compilers)), None)
        )

    def compiled_on(
        self, total: float, step: int, norms: Any, number: int, looks: Sequence[Tensor], state: State
    ) -> Verdicts | None:
        """Return the verdicts on so many cells by the compiled formula, where there is one that takes the state."""
        if self._compiled is None:
            return None
        shared = self._formula.shared(total, step)
        if not self._remembers:
            found, bounds = self._compiled(shared, norms, looks, bytearray(_BYTES * 2 * number))
            return found, bounds, state
        before = CompiledState.of(state, number, self._formula.ring)
        if before is None:
            return None
        after = before.following()
        found, bounds = self._compiled(
            shared, norms, looks, after.numbers, before.numbers, after.rings, before.layout.window
        )
        return found, bounds, after

    def plain_on(
        self, total: float, step: int, norms: Any, looks: Sequence[Tensor], state: State
    ) -> Verdicts:
        """Return the verdicts on the cells by Python."""
        if isinstance(norms, bytearray):
            norms = from_memory(norms)
        columns = [norms.tolist() if isinstance(norms, Tensor) else norms, *(look.tolist() for look in looks)]
        if not self._remembers:
            found, bounds = self._formula.plain(total, step, *columns)
            return found, bounds, state
        plain = PlainState.of(state)
        found, bounds, cells = self._formula.plain(total, step, *columns, plain.cells)
        return found, bounds, PlainState(cells, plain.dtypes)
