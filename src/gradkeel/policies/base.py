"""A policy is scope x bound x form: what is measured together, how large it may be, what happens above that."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, Needs, State, combine

Scope = Literal["value", "unit", "tensor", "group", "global"]

SCOPE_WORDS: Mapping[str, str] = {
    "value": "each entry separately",
    "unit": "each output unit separately",
    "tensor": "each tensor separately",
    "group": "each parameter group together",
    "global": "all tensors together",
}


class Policy(ABC):
    """Decides from norms what is done to gradients: ``decide(norms, state) -> (Decision, new_state)``.

    A policy is configuration: frozen, hashable, comparable, and written as a spec string by ``policy.spec``. What it
    remembers is in the state that it returns. It never sees gradients or the optimizer, so the same object serves a
    live run, every rank of a distributed one, and the replay of a record.
    """

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What must be measured for this policy."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The string from which ``gradkeel.policies.parse`` makes this policy again."""

    @abstractmethod
    def init(self, norms: GradientNorms) -> State:
        """State before the first step, shaped after ``norms`` (whose values are not looked at)."""

    @abstractmethod
    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        """Decide on one step; does not sync the host."""


class Cells:
    """The norms as one scope sees them: k things that are measured, bounded and scaled separately.

    Attributes:
        norms: [k] gradient norm of each cell.
        valid: [k] bool: finite and above zero; only such cells enter a bound's statistics.
        total: [] norm of all parameters together.
        step: number of the step, from 1.
        loss: [] loss of the step, or None.
    """

    def __init__(self, measured: GradientNorms, scope: Scope) -> None:
        self._measured = measured
        self._scope = scope
        self.norms = self._gather(measured.norms, measured.units, measured.total)
        self.valid = torch.isfinite(self.norms) & (self.norms > 0)
        self.total = measured.total
        self.step = measured.step
        self.loss = measured.loss

    def _gather(self, per_tensor: Tensor, per_unit: Tensor | None, total: Tensor | None = None) -> Tensor:
        if self._scope == "tensor":
            return per_tensor
        if self._scope == "unit":
            assert per_unit is not None, "the unit scope declares that it needs units"
            return per_unit
        p = self._measured.norm_type
        if self._scope == "global":
            return (combine(per_tensor, p) if total is None else total).reshape(1)
        groups = torch.tensor(self._measured.groups, device=per_tensor.device)
        return torch.stack([combine(per_tensor[groups == g], p) for g in sorted(set(self._measured.groups))])

    @cached_property
    def weights(self) -> Tensor:
        """[k] norm of each cell's weights; measured only for bounds with ``needs_weights``."""
        assert self._measured.weights is not None, "the bound declares needs_weights"
        return self._gather(self._measured.weights, self._measured.unit_weights)

    @cached_property
    def sizes(self) -> Tensor:
        """[k] number of entries of each cell."""
        measured, like = self._measured, self.norms
        sizes = torch.tensor(measured.sizes, dtype=like.dtype, device=like.device)
        if self._scope == "tensor":
            return sizes
        if self._scope == "unit":
            unit_sizes = torch.tensor(measured.unit_sizes, dtype=like.dtype, device=like.device)
            counts = torch.tensor(measured.unit_counts, device=like.device)
            return unit_sizes.repeat_interleave(counts, output_size=like.numel())
        if self._scope == "global":
            return sizes.sum().reshape(1)
        groups = torch.tensor(measured.groups, device=like.device)
        return torch.stack([sizes[groups == g].sum() for g in sorted(set(measured.groups))])

    def spread(self, coefficients: Tensor, bound: Tensor) -> Decision:
        """Decision that multiplies every parameter by the coefficient of its cell."""
        if self._scope == "unit":
            return Decision(unit_coefficients=coefficients, bound=bound)
        if self._scope == "tensor":
            return Decision(coefficients=coefficients, bound=bound)
        if self._scope == "global":
            return Decision(coefficients=coefficients.reshape(()), bound=bound.reshape(()))
        order = {g: i for i, g in enumerate(sorted(set(self._measured.groups)))}
        index = torch.tensor([order[g] for g in self._measured.groups], device=coefficients.device)
        return Decision(coefficients=coefficients[index], bound=bound.expand(len(order))[index])


class Bound(ABC):
    """How large a cell's norm may be. Configuration only; every state tensor has the leading dimension k."""

    needs_weights: ClassVar[bool] = False

    def init(self, cells: Cells) -> State:
        """State before the first step; none unless a bound says otherwise."""
        return {}

    @abstractmethod
    def bound(self, cells: Cells, state: State) -> Tensor:
        """[k] or [1] bound in force at this step; inf where there is none yet."""

    def update(self, cells: Cells, state: State, bound: Tensor) -> State:
        """State after this step; a cell that is not valid keeps its old state whatever is returned for it."""
        return state


class HostBound(Bound):
    """A bound that the host knows without looking at norms; the only kind that can bound single entries."""

    @abstractmethod
    def at(self, step: int) -> tuple[float, float]:
        """Lowest entry and highest entry or norm allowed at ``step`` (from 1)."""

    def bound(self, cells: Cells, state: State) -> Tensor:
        """[1] the highest norm allowed."""
        return cells.norms.new_full((1,), self.at(cells.step)[1])


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

    Raises:
        ValueError: for a combination that means nothing, with the reason.
    """

    scope: Scope
    bound: Bound
    form: Form
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.scope not in get_args(Scope):
            raise ValueError(f"Clip(scope={self.scope!r}): scope must be one of {', '.join(get_args(Scope))}")
        positive("Clip", "norm_type", self.norm_type, infinite=True)
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
        return Needs(self.norm_type, self.bound.needs_weights, self.scope == "unit", self.scope == "value")

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
        bound = self.bound.bound(cells, state)
        updated = keep_where(cells.valid, self.bound.update(cells, state, bound), state)
        if self.form.asks_to_skip:
            return Decision(skip=(cells.valid & (cells.norms > bound)).any(), bound=bound), updated
        coefficients = self.form.coefficient(cells.norms, bound)
        return cells.spread(torch.where(cells.valid, coefficients, torch.ones_like(coefficients)), bound), updated


def keep_where(valid: Tensor, new: State, old: State) -> State:
    """State with the new rows where ``valid`` [k] holds and the old ones elsewhere."""
    if new is old:
        return old
    return {key: torch.where(_like(valid, value), value, old[key]) for key, value in new.items()}


def _like(valid: Tensor, value: Tensor) -> Tensor:
    return valid.reshape(valid.shape + (1,) * (value.dim() - valid.dim()))


@dataclass(frozen=True, repr=False)
class NamedPolicy(Policy):
    """A published method: a name, its parameters, and the parts that it is made of."""

    spec_name: ClassVar[str]

    @property
    @abstractmethod
    def parts(self) -> Policy:
        """The general policy that this name stands for."""

    @cached_property
    def _parts(self) -> Policy:
        return self.parts

    @property
    def needs(self) -> Needs:
        """What the parts need."""
        return self._parts.needs

    def init(self, norms: GradientNorms) -> State:
        """State of the parts."""
        return self._parts.init(norms)

    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        """What the parts decide."""
        return self._parts.decide(norms, state)

    @property
    def spec(self) -> str:
        """Name and the parameters that are not at their defaults, such as ``global-norm:1.0,norm_type=inf``."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                words.append(spec_value(value))
            elif value != field.default:
                words.append(f"{field.name}={spec_value(value)}")
        return f"{self.spec_name}:{','.join(words)}" if words else self.spec_name

    def __repr__(self) -> str:
        """Call that makes this policy, and what it bounds, as a comment."""
        arguments = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                arguments.append(f"{field.name}={value!r}")
        words = f"  # {SCOPE_WORDS[self._parts.scope]}" if isinstance(self._parts, Clip) else ""
        return f"{type(self).__name__}({', '.join(arguments)}){words}"


def spec_value(value: object) -> str:
    """A parameter as it is written in a spec string."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def positive(owner: str, argument: str, value: object, *, infinite: bool = False) -> float:
    """``value`` as a float, if it is a positive number; else an error that names the argument, rule and fix."""
    off = "; to turn clipping off pass None as the policy" if argument in {"max_norm", "max"} else ""
    shown = f"{owner}({argument}={value!r}): {argument} must be a positive number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{shown}, not {type(value).__name__}{off}")
    if not value > 0 or (math.isinf(value) and not infinite):
        raise ValueError(f"{shown}{off}")
    return float(value)
