"""The norms as one scope sees them: k things that are measured, bounded and scaled separately."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradkeel.norms import GradientNorms, combine, expanded, fixed, is_on_host, take
from gradkeel.policies.base import Scope
from gradkeel.policies.numbers import Number, where
from gradkeel.policies.states import from_list

# Cells up to this number are decided on one after the other in plain numbers, where the host has them.
FEW = 8


class Cells:
    """The norms as one scope sees them.

    Attributes:
        norms: [k] gradient norm of each cell.
        total: [] norm of all parameters together.
        step: number of the step, from 1.
        all_valid: whether the host knows that every cell is valid.
    """

    norms: Number
    total: Number
    step: int
    all_valid: bool

    def __init__(self, measured: GradientNorms, scope: Scope) -> None:
        self._measured = measured
        self._scope = scope
        self.norms = self._gather(measured.norms, measured.units, measured.total)
        self.total = measured.total
        self.step = measured.step
        self.all_valid = _are_valid(self.norms)

    @property
    def valid(self) -> Number:
        """[k] bool: finite and above zero; only such cells enter a bound's statistics."""
        return (self.norms > 0) & (self.norms < math.inf)

    def if_valid(self, yes: Number, no: Number) -> Number:
        """``yes`` [k, ...] for the valid cells, ``no`` for the others."""
        if self.all_valid:
            return yes
        valid = self.valid
        if isinstance(yes, Tensor):
            valid = valid.reshape(valid.shape + (1,) * (yes.dim() - 1))
        return where(valid, yes, no)

    def _gather(self, per_tensor: Tensor, per_unit: Tensor | None, total: Tensor | None = None) -> Tensor:
        if self._scope == "tensor":
            return per_tensor
        if self._scope == "unit":
            assert per_unit is not None, "the unit scope declares that it needs units"
            return per_unit
        p = self._measured.norm_type
        if self._scope == "global":
            return (combine(per_tensor, p) if total is None else total).reshape(1)
        members = group_members(self._measured.groups)
        if not members:
            return per_tensor.new_empty(0)
        return torch.stack([combine(take(per_tensor, rows), p) for rows in members])

    @property
    def weights(self) -> Number:
        """[k] norm of each cell's weights; measured only for bounds with ``needs_weights``."""
        assert self._measured.weights is not None, "the bound declares needs_weights"
        return self._gather(self._measured.weights, self._measured.unit_weights)

    @property
    def sizes(self) -> Number:
        """[k] number of entries of each cell."""
        return fixed(_sizes(self._measured, self._scope), self.norms.dtype, self.norms.device)


class Cell(Cells):
    """One of the cells in plain numbers, on the host; its attributes are those of `Cells`."""

    def __init__(self, measured: GradientNorms, scope: Scope, place: int, norm: float, total: float) -> None:
        self._measured = measured
        self._scope = scope
        self._place = place
        self.norms = norm
        self.total = total
        self.step = measured.step
        self.all_valid = 0.0 < norm < math.inf

    @property
    def valid(self) -> Number:
        """Tell whether the cell's norm is finite and above zero."""
        return self.all_valid

    @property
    def weights(self) -> Number:
        """Norm of the cell's weights."""
        whole = super().weights
        return whole.tolist()[self._place]

    @property
    def sizes(self) -> Number:
        """Number of the cell's entries."""
        return float(_sizes(self._measured, self._scope)[self._place])


def plain_cells(measured: GradientNorms, scope: Scope) -> Sequence[Cell]:
    """Return the cells in plain numbers, where they are few and on the host; else None."""
    norms, total = measured.norms, measured.known_total
    if isinstance(total, Tensor):  # else it was the host that read the gradients
        if not is_on_host(norms) or norms.dtype != torch.float64:
            return ()
        total = total.item()
    if scope == "global":
        return (Cell(measured, scope, 0, total, total),)
    if scope == "unit" and measured.units is not None:
        norms = measured.units
    elif scope == "group":
        norms = Cells(measured, scope).norms
    if norms.shape[0] > FEW:
        return ()
    return [Cell(measured, scope, i, norm, total) for i, norm in enumerate(norms.tolist())]


class LossCells(Cells):
    """The loss of the step as one cell; any finite loss is valid, zero and negative ones included."""

    def __init__(self, measured: GradientNorms, loss: Tensor) -> None:
        super().__init__(measured, "global")
        self.norms = loss.detach().to(measured.total).reshape(1)
        self.all_valid = False

    @property
    def valid(self) -> Number:
        """[1] bool: finite."""
        return torch.isfinite(self.norms)


def plain_loss(measured: GradientNorms, loss: Tensor) -> Sequence[Cell]:
    """Return the loss in plain numbers, where norms and loss are on the host; else None."""
    if not loss.is_cpu or not is_on_host(measured.norms):
        return ()
    value = loss.item()
    cell = Cell(measured, "global", 0, value, measured.total.item())
    cell.all_valid = math.isfinite(value)
    return (cell,)


def _are_valid(norms: Tensor) -> bool:
    if not norms.numel() or not is_on_host(norms):
        return False
    least, most = norms.aminmax()
    return least.item() > 0 and most.item() < math.inf


def _sizes(measured: GradientNorms, scope: Scope) -> tuple[int, ...]:
    if scope == "unit":
        return expanded(measured.unit_sizes, measured.unit_counts)
    if scope == "tensor":
        return measured.sizes
    if scope == "global":
        return (sum(measured.sizes),)
    return tuple(sum(measured.sizes[i] for i in rows) for rows in group_members(measured.groups))


def spread(values: Tensor | list[float], measured: GradientNorms, scope: Scope) -> Any:
    """Turn a value for each cell [k] into one for all parameters [], for each parameter [n], or for each unit [u].

    The one for all is a number where the host knows it, as `Decision` takes it.
    """
    if isinstance(values, list):
        if scope == "global":
            return float(values[0])
        values = from_list(values)
    elif scope == "global":
        return values.reshape(())
    return values if scope != "group" else take(values, _places(measured.groups))


@lru_cache(maxsize=64)
def group_members(groups: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return, for each parameter group in ascending order, which parameters are in it."""
    return tuple(tuple(i for i, g in enumerate(groups) if g == group) for group in sorted(set(groups)))


@lru_cache(maxsize=64)
def _places(groups: tuple[int, ...]) -> tuple[int, ...]:
    order = {group: i for i, group in enumerate(sorted(set(groups)))}
    return tuple(order[group] for group in groups)
