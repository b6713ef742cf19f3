"""The general policy: scope x bound x form, what is measured together, how large it may be, what happens above."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, get_args

from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, Needs, State, from_list
from gradkeel.policies.base import Part, Policy, Scope, count, positive
from gradkeel.policies.bounds.base import Bound, HostBound
from gradkeel.policies.numbers import Memory, Number
from gradkeel.policies.scopes import Cells, spread
from gradkeel.policies.written import Verdict, Written


class Form(Part, ABC):
    """A form says what happens to a cell above its bound."""

    asks_to_skip: ClassVar[bool] = False
    clamps: ClassVar[bool] = False
    """Whether the form has a meaning for single entries."""

    @abstractmethod
    def coefficient(self, norms: Number, bound: Number) -> Number:
        """Return [k] what each cell is multiplied by; read only where the norm is finite and above zero."""


@dataclass(frozen=True)
class Clip(Policy):
    """The general policy: any scope with any bound and any form.

    ``coefficient = form(norm, bound)`` for each cell of the scope. A cell whose norm is zero or not finite gets the
    coefficient 1 and leaves no trace in the bound's statistics.

    Args:
        scope: "value", "unit", "tensor", "group" or "global".
        bound: how large a cell's norm may be.
        form: what happens above that.
        norm_type: the p of the p-norm, above 0; ``math.inf`` is the largest absolute entry.
        unit_dim: the dimension that counts a tensor's units, for the unit scope; 0 in torch's layout.

    Raises:
        ValueError: for a combination that means nothing, with the reason.

    Example:
        >>> Clip("tensor", Quantile(0.9), Hard()).needs.norm_type
        2.0
    """

    scope: Scope
    bound: Bound
    form: Form
    norm_type: float = 2.0
    unit_dim: int = 0

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"Clip(scope={self.scope!r}): scope must be one of {', '.join(get_args(Scope))}")
        for argument, kind, example in (("bound", Bound, "Constant(1.0)"), ("form", Form, "Hard()")):
            value = getattr(self, argument)
            if not isinstance(value, kind):
                raise TypeError(
                    f"Clip({argument}={value!r}): {argument} must be a {kind.__name__}, such as {example}"
                )
        positive("Clip", "norm_type", self.norm_type, infinite=True)
        count("Clip", "unit_dim", self.unit_dim, least=0)
        if self.scope == "value" and not isinstance(self.bound, HostBound):
            raise ValueError(
                f"Clip(scope='value', bound={self.bound!r}): single entries can only be bounded by a constant or a "
                "schedule, for this bound follows norms; choose the scope 'unit', 'tensor', 'group' or 'global'"
            )
        if self.scope == "value" and not self.form.clamps:
            raise ValueError(
                f"Clip(scope='value', form={self.form!r}): single entries can only be clamped; use the form Hard()"
            )

    @cached_property
    def needs(self) -> Needs:
        """It needs norms of this type; units, peaks and weights where the scope or the bound looks at them."""
        unit_dim = self.unit_dim if self.scope == "unit" else None
        return Needs(self.norm_type, self.bound.needs_weights, unit_dim, self.scope == "value")

    @property
    def spec(self) -> str:
        """Raise: parts are Python objects, and only named policies can be written as a string."""
        raise TypeError(
            f"{self!r} cannot be written as a spec string, so it cannot be a parameter group's 'clip'; use a named "
            "policy there, or pass this one to attach() as the main policy"
        )

    def init(self, norms: GradientNorms) -> State:
        """Return the bound's state."""
        return {} if self.scope == "value" else self.bound.init(Cells(norms, self.scope))

    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        """Bound each cell, form its coefficient, and update the statistics of the valid cells."""
        scope = self.scope
        if scope == "value":
            assert isinstance(self.bound, HostBound), "as __post_init__ has checked"
            return Decision(clamp=self.bound.at(norms.step)), state
        found: Any
        bounds: Any
        written = self._written
        if written is not None and (verdicts := written.on(norms, scope, state)) is not None:
            found, bounds, state = verdicts
        else:
            found, bounds, state = self._verdict(Cells(norms, scope), state)
            bounds = bounds.expand_as(found)
        bound = spread(bounds, norms, scope)
        if self.form.asks_to_skip:
            return Decision(skip=any_of(found), bound=bound), state
        coefficients = spread(found, norms, scope)
        if scope == "unit":
            units = coefficients if isinstance(coefficients, Tensor) else from_list(coefficients)
            return Decision(unit_coefficients=units, bound=bound), state
        return Decision(coefficients=coefficients, bound=bound), state

    @cached_property
    def _written(self) -> Written | None:
        return Written(self._verdict) if self.bound.on_numbers and self.form.on_numbers else None

    def _verdict(self, cells: Cells, state: Memory) -> Verdict:
        bound, updated = judge(self.bound, cells, state)
        if self.form.asks_to_skip:
            return cells.valid & (cells.norms > bound), bound, updated
        return cells.if_valid(self.form.coefficient(cells.norms, bound), 1.0), bound, updated


def judge(bound: Bound, cells: Cells, state: Memory) -> tuple[Number, Memory]:
    """Return the bound in force, and the state in which only valid cells have left a trace."""
    limit = bound.bound(cells, state)
    updated = bound.update(cells, state, limit)
    if updated is state or cells.all_valid:
        return limit, updated
    return limit, {key: cells.if_valid(new, state[key]) for key, new in updated.items()}


def any_of(found: Tensor | Sequence[bool]) -> Any:
    """Return [] bool: whether any cell's verdict is true; a number where the host knows, as `Decision` takes it."""
    if isinstance(found, Tensor):
        return found.any()
    return any(found)
