"""The norms as one scope sees them: k things that are measured, bounded and scaled separately."""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, combine
from gradkeel.policies.base import Scope


class Cells:
    """The norms as one scope sees them.

    Attributes:
        norms: [k] gradient norm of each cell.
        valid: [k] bool: finite and above zero; only such cells enter a bound's statistics.
        total: [] norm of all parameters together.
        step: number of the step, from 1.
    """

    norms: Tensor
    valid: Tensor
    total: Tensor
    step: int

    def __init__(self, measured: GradientNorms, scope: Scope) -> None:
        self._measured = measured
        self._scope = scope
        self.norms = self._gather(measured.norms, measured.units, measured.total)
        self.valid = (self.norms > 0) & (self.norms < math.inf)
        self.total = measured.total
        self.step = measured.step

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

    @cached_property
    def weights(self) -> Tensor:
        """[k] norm of each cell's weights; measured only for bounds with ``needs_weights``."""
        assert self._measured.weights is not None, "the bound declares needs_weights"
        return self._gather(self._measured.weights, self._measured.unit_weights)

    @cached_property
    def sizes(self) -> Tensor:
        """[k] number of entries of each cell."""
        measured = self._measured
        if self._scope == "unit":
            sizes = expanded(measured.unit_sizes, measured.unit_counts)
        elif self._scope == "tensor":
            sizes = measured.sizes
        elif self._scope == "global":
            sizes = (sum(measured.sizes),)
        else:
            sizes = tuple(sum(measured.sizes[i] for i in rows) for rows in group_members(measured.groups))
        return _constant(sizes, self.norms.dtype, self.norms.device)

    def spread(self, coefficients: Tensor, bound: Tensor) -> Decision:
        """Decision that multiplies every parameter by the coefficient of its cell."""
        bound = bound.expand_as(coefficients)
        if self._scope == "unit":
            return Decision(unit_coefficients=coefficients, bound=bound)
        if self._scope == "tensor":
            return Decision(coefficients=coefficients, bound=bound)
        if self._scope == "global":
            return Decision(coefficients=coefficients.reshape(()), bound=bound.reshape(()))
        order = {group: i for i, group in enumerate(sorted(set(self._measured.groups)))}
        rows = tuple(order[group] for group in self._measured.groups)
        return Decision(coefficients=take(coefficients, rows), bound=take(bound, rows))


class LossCells(Cells):
    """The loss of the step as one cell; any finite loss is valid, zero and negative ones included."""

    def __init__(self, measured: GradientNorms) -> None:
        loss = measured.total if measured.loss is None else measured.loss
        self._measured = measured
        self._scope = "global"
        self.norms = loss.detach().to(measured.total).reshape(1)
        self.valid = torch.isfinite(self.norms)
        self.total = measured.total
        self.step = measured.step


def take(values: Tensor, rows: Sequence[int]) -> Tensor:
    """``values[rows]`` without a host sync after the first call with these rows."""
    return values.index_select(0, index(rows, values.device))


def index(rows: Sequence[int], device: torch.device) -> Tensor:
    """``rows`` as a tensor on ``device``, made once."""
    return _constant(tuple(rows), torch.int64, device)


@lru_cache(maxsize=256)
def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Making a device tensor of host numbers waits for the device, so each is made once.
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def group_members(groups: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """For each parameter group that is there, in ascending order, which parameters are in it."""
    return tuple(tuple(i for i, g in enumerate(groups) if g == group) for group in sorted(set(groups)))


@lru_cache(maxsize=64)
def expanded(values: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Each of n values as often as its count says: from a number per parameter to a number per unit."""
    return tuple(value for value, times in zip(values, counts, strict=True) for _ in range(times))
