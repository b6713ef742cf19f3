"""The general policy: scope x bound x form, what is measured together, how large it may be, what happens above."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, Needs, State
from gradkeel.policies.base import Policy, Scope, count, positive
from gradkeel.policies.bounds.base import Bound, HostBound
from gradkeel.policies.scopes import Cells


class Form(ABC):
    """What happens to a cell above its bound."""

    asks_to_skip: ClassVar[bool] = False
    clamps: ClassVar[bool] = False
    """Whether the form has a meaning for single entries."""

    @abstractmethod
    def coefficient(self, norms: Tensor, bound: Tensor) -> Tensor:
        """[k] what each cell is multiplied by; read only where the norm is finite and above zero."""


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
        """Refuse what means nothing."""
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

    @property
    def needs(self) -> Needs:
        """Norms of this type; units, peaks and weights where the scope or the bound looks at them."""
        unit_dim = self.unit_dim if self.scope == "unit" else None
        return Needs(self.norm_type, self.bound.needs_weights, unit_dim, self.scope == "value")

    @property
    def spec(self) -> str:
        """Raises: parts are Python objects; only named policies can be written as a string."""
        raise TypeError(
            f"{self!r} cannot be written as a spec string, so it cannot be a parameter group's 'clip'; use a named "
            "policy there, or pass this one to attach() as the main policy"
        )

    def init(self, norms: GradientNorms) -> State:
        """State of the bound."""
        return {} if self.scope == "value" else self.bound.init(Cells(norms, self.scope))

    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        """Bound each cell, form its coefficient, and update the statistics of the valid cells."""
        if isinstance(self.bound, HostBound) and self.scope == "value":
            return Decision(clamp=self.bound.at(norms.step)), state
        cells = Cells(norms, self.scope)
        bound, updated = judge(self.bound, cells, state)
        if self.form.asks_to_skip:
            skip = (cells.valid & (cells.norms > bound)).any()
            return Decision(skip=skip, bound=cells.spread(cells.norms, bound).bound), updated
        coefficients = self.form.coefficient(cells.norms, bound)
        return cells.spread(
            torch.where(cells.valid, coefficients, torch.ones_like(coefficients)), bound
        ), updated


def judge(bound: Bound, cells: Cells, state: State) -> tuple[Tensor, State]:
    """The bound in force, and the state in which only valid cells have left a trace."""
    limit = bound.bound(cells, state)
    updated = bound.update(cells, state, limit)
    if updated is state:
        return limit, state
    return limit, {key: torch.where(_like(cells.valid, new), new, state[key]) for key, new in updated.items()}


def _like(valid: Tensor, value: Tensor) -> Tensor:
    return valid.reshape(valid.shape + (1,) * (value.dim() - valid.dim()))
