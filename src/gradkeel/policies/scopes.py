"""The norms as one scope sees them: k things that are measured, bounded and scaled separately."""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from gradkeel.norms import GradientNorms, combine, expanded, fixed, is_on_host, take
from gradkeel.policies.base import Scope
from gradkeel.policies.numbers import Number, where
from gradkeel.policies.symbols import Page, Symbol


class Cells:
    """The norms as one scope sees them.

    Attributes:
        norms: [k] gradient norm of each cell.
        total: [] norm of all parameters together.
        step: number of the step, from 1.
    """

    norms: Number
    total: Number
    step: int

    def __init__(self, measured: GradientNorms, scope: Scope) -> None:
        self._measured = measured
        self._scope = scope
        self.norms = self._gather(measured.norms, measured.units, measured.total)
        self.total = measured.total
        self.step = measured.step

    @cached_property
    def all_valid(self) -> bool:
        """Whether the host knows that every cell is valid."""
        if not self.norms.numel() or not is_on_host(self.norms):
            return False
        least, most = self.norms.aminmax()
        return bool(least.item() > 0 and most.item() < math.inf)

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


class WrittenCell(Cells):
    """What stands for one cell in a formula that is written down; its attributes are those of `Cells`."""

    def __init__(self, page: Page) -> None:
        self.page = page  # on which it is written
        self.uses: dict[str, Symbol] = {}  # what else the formula looks at, by the names of `Cells`
        self.norms = page.symbol("norm")
        self.total = page.symbol("total")
        self.step = page.symbol("step")  # type: ignore[assignment]
        self.all_valid = False

    @staticmethod
    def plain(measured: GradientNorms, scope: Scope) -> tuple[Tensor | bytearray | list[float], int, float]:
        """Return the cells' norms, [k] float64 or numbers, their number, and the norm of all; 0 if not on the host."""
        total = measured.known_total
        if isinstance(total, Tensor):  # else it was the host that read the gradients
            if not is_on_host(measured.norms) or measured.norms.dtype != torch.float64:
                return [], 0, 0.0
            total = total.item()
        if scope == "global":
            return [total], 1, total
        norms: Any = measured.known_norms
        if scope == "unit" and measured.units is not None:
            norms = measured.units
        elif scope == "group":
            norms = Cells(measured, scope).norms
        elif not isinstance(norms, bytearray):
            norms = measured.norms
        if isinstance(norms, bytearray):
            return norms, len(norms) // 8, total
        if norms.dtype != torch.float64 or not norms.is_cpu:  # a policy may have put others in their place
            return [], 0, 0.0
        return norms.contiguous(), norms.shape[0], total

    @property
    def valid(self) -> Number:
        """What stands for whether the cell's norm is finite and above zero."""
        return self.page.write("is_norm", self.norms)

    @property
    def weights(self) -> Number:
        """What stands for the norm of the cell's weights."""
        return self._used("weights")

    @property
    def sizes(self) -> Number:
        """What stands for the number of the cell's entries."""
        return self._used("sizes")

    def _used(self, name: str) -> Symbol:
        return self.uses.setdefault(name, self.page.symbol(name))


class WrittenLoss(WrittenCell):
    """What stands for the loss as one cell."""

    @staticmethod
    def plain(measured: GradientNorms, scope: Scope) -> tuple[Tensor | bytearray | list[float], int, float]:
        """Return the loss and the norm of all in plain numbers, where both are on the host; else no loss."""
        loss = measured.loss
        if loss is None or not loss.is_cpu or not is_on_host(measured.norms):
            return [], 0, 0.0
        return [loss.item()], 1, measured.total.item()

    @property
    def valid(self) -> Number:
        """What stands for whether it is finite."""
        return self.page.write("is_number", self.norms)


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


def _sizes(measured: GradientNorms, scope: Scope) -> tuple[int, ...]:
    if scope == "unit":
        return expanded(measured.unit_sizes, measured.unit_counts)
    if scope == "tensor":
        return measured.sizes
    if scope == "global":
        return (sum(measured.sizes),)
    return tuple(sum(measured.sizes[i] for i in rows) for rows in group_members(measured.groups))


def spread(values: Tensor | Sequence[float], measured: GradientNorms, scope: Scope) -> Any:
    """Turn a value for each cell [k] into one for all parameters [], for each parameter [n], or for each unit [u].

    What the host knows stays a number, or a list of them, as `Decision` takes it.
    """
    if isinstance(values, Tensor):
        if scope == "global":
            return values.reshape(())
        return values if scope != "group" else take(values, _places(measured.groups))
    if scope == "global":
        return float(values[0])
    return values if scope != "group" else [values[place] for place in _places(measured.groups)]


@lru_cache(maxsize=64)
def group_members(groups: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return, for each parameter group in ascending order, which parameters are in it."""
    return tuple(tuple(i for i, g in enumerate(groups) if g == group) for group in sorted(set(groups)))


@lru_cache(maxsize=64)
def _places(groups: tuple[int, ...]) -> tuple[int, ...]:
    order = {group: i for i, group in enumerate(sorted(set(groups)))}
    return tuple(order[group] for group in groups)
