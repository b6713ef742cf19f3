"""Reads each gradient of a selection once, and makes norms of the true gradients of what was read."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gradkeel.kernels.native import Read, Table
from gradkeel.measure.powers import read, unit_count, wide_dtype
from gradkeel.norms import GradientNorms, Needs, combine, late
from gradkeel.selection import Selection
from gradkeel.tensors import local_parts, without_codes


@late("norms")
@dataclass(slots=True, eq=False)
class Readings:
    """Norms of a selection's stored gradients, without prescale: one rank's, or all ranks' together.

    Those of units, peaks and weights are there where asked for, as in `gradkeel.norms.GradientNorms`.
    """

    present: tuple[bool, ...]  # which of the parameters have a gradient
    norms: Tensor
    units: Tensor | None = None
    peaks: Tensor | None = None
    weights: Tensor | None = None
    unit_weights: Tensor | None = None
    # norm of all of them together, where it is known already: a number of the host's, or [] on an accelerator
    total: Tensor | float | None = None
    table: Table | None = None  # as in `gradkeel.kernels.native.Read`; None where a parameter has no gradient

    if TYPE_CHECKING:

        @property
        def known_norms(self) -> Any:
            """The same as the norms, or the host's memory of them that they were given as."""


class Members(Protocol):
    """The parameters of one selection: this rank's, or those of all ranks together; as `Selection` has them."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters have these names."""

    @property
    def groups(self) -> tuple[int, ...]:
        """The parameters' groups have these indices in the optimizer."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The parameters have so many entries."""

    def units(self, dim: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how many units along ``dim`` each has, and how many entries a unit."""


def blank_norms(members: Members, needs: Needs, device: torch.device) -> GradientNorms:
    """Return norms of the right shapes, all 0."""
    counts, unit_sizes = members.units(needs.unit_dim)
    zeros = partial(torch.zeros, dtype=wide_dtype(device), device=device)
    count, has_units = len(members.names), needs.unit_dim is not None
    return GradientNorms(
        names=members.names,
        norms=zeros(count),
        total=zeros(()),
        norm_type=needs.norm_type,
        groups=members.groups,
        step=0,
        sizes=members.sizes,
        weights=zeros(count) if needs.weights else None,
        units=zeros(sum(counts)) if has_units else None,
        unit_weights=zeros(sum(counts)) if has_units and needs.weights else None,
        unit_counts=counts,
        unit_sizes=unit_sizes,
        peaks=zeros(count, 2) if needs.peaks else None,
    )


def readings(selection: Selection, needs: Needs, device: torch.device) -> Readings:
    """Read a selection's gradients as they are stored on this rank; does not sync the host on an accelerator."""
    held = [gradient for parameter in selection.parameters if (gradient := parameter.grad) is not None]
    reading = read(
        local_parts(held) if selection.is_distributed else held,
        needs.norm_type,
        device,
        unit_dim=needs.unit_dim,
        with_peaks=needs.peaks,
    )
    if len(held) == len(selection.parameters):
        present = selection.all_present
        if not needs.weights:
            return Readings(
                present,
                reading.known_norms,
                reading.units,
                reading.peaks,
                total=reading.total,
                table=reading.table,
            )
    else:
        present = tuple(parameter.grad is not None for parameter in selection.parameters)
    weights = Read(reading.norms)
    if needs.weights:
        parameters = local_parts(selection.parameters)
        if not all(present):  # as no quantized one has a gradient
            parameters = [without_codes(parameter) for parameter in parameters]
        weights = read(parameters, needs.norm_type, device, unit_dim=needs.unit_dim)
    units = reading.units
    if units is not None and needs.unit_dim is not None and not all(present):
        shapes = [parameter.shape for parameter in local_parts(selection.parameters)]
        units = _spread_units(units, [unit_count(shape, needs.unit_dim) for shape in shapes], present)
    return Readings(
        present=present,
        norms=_spread(reading.norms, present),
        units=units,
        peaks=None if reading.peaks is None else _spread(reading.peaks, present),
        weights=weights.norms if needs.weights else None,
        unit_weights=weights.units,
        total=reading.total,
    )


def true_norms(
    blank: GradientNorms, found: Readings, prescale: Tensor | float, *, step: int, loss: Tensor | None
) -> GradientNorms:
    """Return ``blank`` with the norms of a step's true gradients: those of the stored ones times ``prescale``."""
    if not blank.names:
        return blank
    norms, units, peaks = found.known_norms, found.units, found.peaks
    total: Any = found.total
    if not (isinstance(prescale, float) and prescale == 1.0):
        norms = found.norms * prescale
        units = None if units is None else units * prescale
        peaks = None if peaks is None else peaks * prescale
        # What the host knows stays a number of the host's.
        is_known = isinstance(total, Tensor) or isinstance(prescale, float)
        total = total * prescale if total is not None and is_known else None
    if total is None:
        total = combine(found.norms if isinstance(norms, bytearray) else norms, blank.norm_type)
    return GradientNorms(
        names=blank.names,
        norms=norms,
        total=total,
        norm_type=blank.norm_type,
        groups=blank.groups,
        step=step,
        sizes=blank.sizes,
        weights=found.weights,
        units=units,
        unit_weights=found.unit_weights,
        unit_counts=blank.unit_counts,
        unit_sizes=blank.unit_sizes,
        peaks=peaks,
        loss=loss,
    )


def _spread(values: Tensor, present: tuple[bool, ...]) -> Tensor:
    if all(present):
        return values
    # Stacked rather than written by index: an index would have to travel to the device, which syncs.
    rows = iter(values.unbind())
    zero = values.new_zeros(values.shape[1:])
    return torch.stack([next(rows) if here else zero for here in present])


def _spread_units(values: Tensor, counts: list[int], present: tuple[bool, ...]) -> Tensor:
    parts = iter(values.split([count for count, here in zip(counts, present, strict=True) if here]))
    return torch.cat(
        [
            next(parts) if here else values.new_zeros(count)
            for count, here in zip(counts, present, strict=True)
        ]
    )
