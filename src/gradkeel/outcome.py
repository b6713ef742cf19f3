"""What a decision does to the norms that it was made on: the one answer for report, record and replay."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, per_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The norms of one selection under a decision; every answer is computed when it is asked for, without a sync."""

    norms: GradientNorms  # what was measured
    decision: Decision  # what is done

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
            least = per_tensor(decision.unit_coefficients, self.norms, least=True)
            result = result * torch.where(least == math.inf, 1.0, least)  # of no units
        return result

    def coefficient(self) -> float:
        """The smallest coefficient; syncs the host."""
        return math.prod(float(part.min()) for part in self.factors)

    def bound(self) -> Tensor | None:
        """[] the bound in force: the smallest one where parameters or units have their own; None without a bound."""
        if self.decision.bound is not None and self.decision.bound.numel():
            return self.decision.bound.min()
        clamp = self.decision.clamp
        return None if clamp is None else self.norms.norms.new_full((), float(clamp[1]))

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

    def total(self) -> Tensor | None:
        """[] norm of all gradients after scaling; None where a clamp makes it unknown."""
        return None if self.decision.clamp is not None else self.norms.after(self.decision).total
