"""The part of what all ranks have measured and decided that one rank carries out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradkeel.norms import Decision, GradientNorms


def indices_unless_all(indices: list[int], count: int, device: torch.device) -> Tensor | None:
    """[k] the indices as a tensor; None if they are all of ``count``, in order."""
    return None if indices == list(range(count)) else torch.tensor(indices, dtype=torch.int64, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Locally:
    """Which of all ranks' parameters and units lie on this one.

    Attributes:
        rows: indices of this rank's parameters; None if it has all of them, in the same order.
        units: indices of this rank's units, likewise.
        unit_counts: how many units this rank has of each of its parameters.
        positions: the same as ``rows``, for the host.
        elsewhere: positions of the parameters that only other ranks have.
    """

    rows: Tensor | None
    units: Tensor | None
    unit_counts: tuple[int, ...]
    positions: tuple[int, ...]
    elsewhere: frozenset[int]

    def present_of(self, own: Sequence[bool]) -> tuple[bool, ...]:
        """Which of all ranks' parameters have a gradient, as far as this rank knows; those of other ranks count."""
        result = [i in self.elsewhere for i in range(len(self.positions) + len(self.elsewhere))]
        for position, here in zip(self.positions, own, strict=True):
            result[position] = result[position] or here
        return tuple(result)

    def decision(self, decision: Decision) -> Decision:
        """The part of a decision that is about this rank's parameters."""
        coefficients, units = decision.coefficients, decision.unit_coefficients
        if self.rows is not None and coefficients is not None and coefficients.dim():
            coefficients = coefficients.index_select(0, self.rows)
        if self.units is not None and units is not None:
            units = units.index_select(0, self.units)
        return replace(decision, coefficients=coefficients, unit_coefficients=units, bound=None)

    def measured(self, measured: GradientNorms) -> GradientNorms:
        """What applying a decision looks at, for this rank's parameters."""
        peaks, norms = measured.peaks, measured.norms
        if self.rows is not None:
            norms = norms.index_select(0, self.rows)
            peaks = None if peaks is None else peaks.index_select(0, self.rows)
        counts = self.unit_counts if measured.unit_counts else ()
        return replace(measured, norms=norms, peaks=peaks, unit_counts=counts)
