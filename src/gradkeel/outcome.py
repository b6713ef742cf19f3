"""What a decision does to the norms that it was made on: the one answer for report, record, replay and chains."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, combine


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The norms of one selection under a decision; every answer is computed when it is asked for, without a sync.

    Attributes:
        norms: what was measured.
        decision: what is done.
    """

    norms: GradientNorms
    decision: Decision

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The coefficients that there are: of parameters, and of units."""
        both = (self.decision.coefficients, self.decision.unit_coefficients)
        return tuple(one for one in both if one is not None and one.numel())

    def coefficients(self) -> Tensor:
        """[n] what each parameter's gradient is multiplied by; the smallest one of its units under the unit scope."""
        norms, decision = self.norms.norms, self.decision
        result = torch.ones_like(norms)
        if decision.coefficients is not None:
            result = result * decision.coefficients
        if decision.unit_coefficients is not None:
            parts = decision.unit_coefficients.split(list(self.norms.unit_counts))
            result = result * torch.stack(
                [part.min() if part.numel() else norms.new_ones(()) for part in parts]
            )
        return result

    def coefficient(self) -> float:
        """The smallest coefficient; syncs the host."""
        return math.prod(float(part.min()) for part in self.factors)

    def bound(self) -> Tensor | None:
        """[] the bound in force: the smallest one where parameters or units have their own; None without a bound."""
        if self.decision.bound is not None and self.decision.bound.numel():
            return self.decision.bound.min()
        return None if self.decision.clamp is None else self.norms.norms.new_tensor(self.decision.clamp[1])

    def is_clipped(self) -> Tensor:
        """[] bool: whether any gradient is made smaller."""
        result = torch.zeros((), dtype=torch.bool, device=self.norms.norms.device)
        for part in self.factors:
            result = result | (part < 1).any()
        if self.decision.clamp is not None and self.norms.peaks is not None:
            low, high = self.decision.clamp
            peaks = self.norms.peaks * self.coefficients().unsqueeze(1)  # the clamp comes last
            lowest, highest = peaks.unbind(1)
            result = result | (lowest < low).any() | (highest > high).any()
        return result

    def units(self) -> Tensor | None:
        """[u] norms of the units after scaling; None where they were not measured."""
        units, decision = self.norms.units, self.decision
        if units is None:
            return None
        if decision.coefficients is not None:
            factors = decision.coefficients
            if factors.dim():
                counts = torch.tensor(self.norms.unit_counts, device=factors.device)
                factors = factors.repeat_interleave(counts)
            units = units * factors
        return units if decision.unit_coefficients is None else units * decision.unit_coefficients

    def total(self) -> Tensor | None:
        """[] norm of all gradients after scaling; None where a clamp makes it unknown."""
        norms, decision = self.norms, self.decision
        if decision.clamp is not None:
            return None
        units = self.units() if decision.unit_coefficients is not None else None
        if units is not None:
            return combine(units, norms.norm_type)
        if decision.coefficients is None:
            return norms.total
        if decision.coefficients.dim() == 0:
            return norms.total * decision.coefficients
        return combine(norms.norms * decision.coefficients, norms.norm_type)
