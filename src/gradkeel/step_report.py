"""What one optimizer step came to: lazy over device tensors, so that making a report costs nothing until it is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, combine

ASKED = "the policy asked to skip this step"
"""Why a step was skipped that nothing else forbade."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SelectionReport:
    """What one policy did to its selection of parameters in one step. Reading a number syncs the host.

    Attributes:
        label: "main", "group 0", ..., or "excluded".
        policy: the policy's repr, or "None" where gradients were only measured.
        measured: the norms of the true gradients, before clipping.
        decision: what was applied; empty where the step was skipped.
        present: which of the parameters had a gradient.
    """

    label: str
    policy: str
    measured: GradientNorms
    decision: Decision
    present: tuple[bool, ...]
    _remeasure: Callable[[], Tensor | None] | None = None
    _place_of: Callable[[int], str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold what was measured, and cannot measure again."""
        return type(self), (self.label, self.policy, self.measured, self.decision, self.present)

    @property
    def norm(self) -> float:
        """Norm of the selection's true gradients, before clipping."""
        return float(self.measured.total)

    @property
    def norms(self) -> dict[str, float]:
        """Norm of each parameter's true gradient; parameters without a gradient, on any rank, are not listed."""
        values = self.measured.norms.tolist()
        return {
            name: value
            for name, value, here in zip(self.measured.names, values, self.present, strict=True)
            if here or value != 0
        }

    def place_of(self, name: str) -> str:
        """On which rank the gradient of a parameter is not finite, in words; empty where there are no ranks."""
        return "" if self._place_of is None else self._place_of(self.measured.names.index(name))

    @property
    def coefficient(self) -> float:
        """What the gradients were multiplied by; the smallest one where parameters or units have their own."""
        parts = [self.decision.coefficients, self.decision.unit_coefficients]
        return math.prod(float(part.min()) for part in parts if part is not None and part.numel())

    @property
    def coefficients(self) -> dict[str, float]:
        """What each parameter's gradient was multiplied by; the smallest one of its units under the unit scope."""
        return dict(zip(self.measured.names, self.parameter_coefficients().tolist(), strict=True))

    def parameter_coefficients(self) -> Tensor:
        """[n] what each parameter's gradient was multiplied by, as a tensor; does not sync the host."""
        norms, decision = self.measured.norms, self.decision
        result = torch.ones_like(norms)
        if decision.coefficients is not None:
            result = result * decision.coefficients
        if decision.unit_coefficients is not None:
            parts = decision.unit_coefficients.split(list(self.measured.unit_counts))
            result = result * torch.stack(
                [part.min() if part.numel() else norms.new_ones(()) for part in parts]
            )
        return result

    def bound(self) -> Tensor | None:
        """[] the bound in force: the smallest one where parameters or units have their own; None without a bound."""
        if self.decision.bound is not None and self.decision.bound.numel():
            return self.decision.bound.min()
        return None if self.decision.clamp is None else self.measured.norms.new_tensor(self.decision.clamp[1])

    def was_clipped(self) -> Tensor:
        """[] bool: whether any gradient was made smaller; does not sync the host."""
        decision = self.decision
        result = torch.zeros((), dtype=torch.bool, device=self.measured.norms.device)
        for part in (decision.coefficients, decision.unit_coefficients):
            if part is not None:
                result = result | (part < 1).any()
        if decision.clamp is not None and self.measured.peaks is not None:
            low, high = decision.clamp
            peaks = self.measured.peaks * self.parameter_coefficients().unsqueeze(1)  # the clamp comes last
            result = result | (peaks[:, 0] < low).any() | (peaks[:, 1] > high).any()
        return result

    @property
    def clipped(self) -> bool:
        """Whether any of the selection's gradients was made smaller."""
        return bool(self.was_clipped())

    @property
    def clipped_norm(self) -> float | None:
        """Norm of the selection's gradients after clipping.

        Under the value scope it is measured when read, and None once the gradients are cleared or changed.
        """
        untouched = self.decision.coefficients is None and self.decision.unit_coefficients is None
        if self.decision.clamp is not None and untouched and not self.clipped:
            return self.norm
        total = self.clipped_total()
        return None if total is None else float(total)

    def clipped_total(self) -> Tensor | None:
        """[] the same as a tensor; does not sync the host. Under the value scope it is measured now, clipped or not."""
        measured, decision = self.measured, self.decision
        if decision.clamp is not None:
            return self._remeasure() if self._remeasure is not None else None
        if decision.unit_coefficients is not None and measured.units is not None:
            scales = decision.unit_coefficients
            if decision.coefficients is not None:
                counts = torch.tensor(measured.unit_counts, device=scales.device)
                scales = scales * decision.coefficients.expand(len(counts)).repeat_interleave(counts)
            return combine(measured.units * scales, measured.norm_type)
        if decision.coefficients is None:
            return measured.total
        if decision.coefficients.dim() == 0:
            return measured.total * decision.coefficients
        return combine(measured.norms * decision.coefficients, measured.norm_type)

    def __repr__(self) -> str:
        """One line."""
        return (
            f"{self.label}: {self.policy}: norm {self.norm:.6g}, coefficient {self.coefficient:.6g}, "
            f"{len(self.measured.names)} parameters"
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StepReport:
    """What one ``optimizer.step()`` came to. Reading a number syncs the host, so read it outside the hot loop.

    ``norm``, ``clipped_norm``, ``coefficient`` and ``clipped`` are the main policy's; each other policy's are in
    ``selections``.

    Attributes:
        step: number of the step, from 1; skipped steps count.
        selections: the main policy's report, then those of parameter groups with their own, then of the excluded.
        prescale: [] what gradients were multiplied by besides clipping: 1 / (loss scale x window weight).
        scalars: what ``guard.log`` was told before this step, such as the loss.
    """

    step: int
    selections: tuple[SelectionReport, ...]
    prescale: Tensor | float = 1.0
    scalars: Mapping[str, Tensor | float] = field(default_factory=dict)
    _stepped: bool | Tensor = True
    _reason: str | None = None

    @property
    def norm_type(self) -> float:
        """The p of the norm that the main policy looks at."""
        return self.selections[0].measured.norm_type

    @property
    def norm(self) -> float:
        """Norm of the true gradients before clipping."""
        return self.selections[0].norm

    @property
    def clipped_norm(self) -> float | None:
        """Norm of the gradients after clipping."""
        return self.selections[0].clipped_norm

    @property
    def coefficient(self) -> float:
        """What clipping multiplied the gradients by; the smallest one where parameters have their own."""
        return self.selections[0].coefficient

    @property
    def clipped(self) -> bool:
        """Whether the main policy made any gradient smaller."""
        return self.selections[0].clipped

    @property
    def stepped(self) -> bool:
        """Whether the optimizer made its step; False where it was skipped."""
        return bool(self._stepped)

    @property
    def reason(self) -> str | None:
        """Why the step was skipped, with the parameter's name; None where it was made."""
        if self.stepped:
            return None
        return self._reason or self.nonfinite_reason() or ASKED

    def nonfinite_reason(self) -> str | None:
        """The first parameter whose gradient is not finite, in words; None where all are finite."""
        for selection in self.selections:
            for name, norm in selection.norms.items():
                if not math.isfinite(norm):
                    kind = "NaN" if math.isnan(norm) else "inf"
                    where = selection.place_of(name)
                    return f"step {self.step}: the gradient of {name!r} is not finite ({kind}){where}"
        return None

    @property
    def stepped_or_pending(self) -> bool | Tensor:
        """Whether the step was made; a [] bool tensor where only the device knows yet. Does not sync the host."""
        return self._stepped

    def stepped_tensor(self) -> Tensor:
        """[] bool: whether the optimizer made its step, without syncing the host."""
        if isinstance(self._stepped, Tensor):
            return self._stepped
        return torch.tensor(self._stepped)

    @property
    def norms(self) -> dict[str, float]:
        """Norm of every parameter's true gradient, excluded ones included, by name."""
        return {name: norm for selection in self.selections for name, norm in selection.norms.items()}

    def __repr__(self) -> str:
        """The step in one line."""
        kind = "inf-norm" if math.isinf(self.norm_type) else f"{self.norm_type:g}-norm"
        after = self.clipped_norm
        words = [
            f"step {self.step}",
            f"{kind} {self.norm:.6g}" + (f" -> {after:.6g}" if self.clipped and after is not None else ""),
            f"coefficient {self.coefficient:.6g}",
            "clipped" if self.clipped else "not clipped",
            "stepped" if self.stepped else f"SKIPPED: {self.reason}",
        ]
        return f"StepReport({', '.join(words)})"

    def _repr_html_(self) -> str:
        """The step as a table, for notebooks."""
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{norm:.6g}</td></tr>" for name, norm in self.norms.items()
        )
        return f"<p>{escape(repr(self))}</p><table><tr><th>parameter</th><th>norm</th></tr>{rows}</table>"


def nonfinite_words(report: StepReport, *, is_scaled: bool) -> str:
    """Why a step without finite gradients is skipped, under a loss scale or without; syncs the host."""
    found = report.nonfinite_reason()
    if is_scaled:
        return f"step {report.step}: the loss scale overflowed" + (f" ({found})" if found else "")
    return found or f"step {report.step}: a gradient is not finite"


class Recorder(Protocol):
    """Whoever wants to be told of every step: a file, a tracker, a test.

    ``record`` is called after each optimizer step, skipped ones included, on the training thread; one that raises is
    dropped with a `RecordWarning`. It should not read the report's numbers at once, for that syncs the host on an
    accelerator. A method ``before_step``, where there is one, is called when the step has been decided.
    """

    def record(self, report: StepReport) -> None:
        """Take note of one step."""

    def close(self) -> None:
        """Write what is still in memory; called by ``guard.detach()``."""
