"""One step's way from gradients to decisions: measure every selection, let its policy decide, judge the whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradkeel.apply import apply, factors
from gradkeel.apply.fused import can_fold, kernel_scale
from gradkeel.measure import measure, measure_total
from gradkeel.norms import Decision, GradientNorms, Needs, State
from gradkeel.policies import Policy
from gradkeel.selection import Selection
from gradkeel.step_report import SelectionReport


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One selection on its way through the pipeline."""

    selection: Selection
    policy: Policy | None
    measured: GradientNorms
    present: tuple[bool, ...]
    decision: Decision
    state: State

    def undone(self) -> "Part":
        """The same part with nothing applied; the bound stays, for the report."""
        return replace(self, decision=Decision(bound=self.decision.bound))

    def report(self) -> SelectionReport:
        """What to tell of this part."""
        again = None
        if self.decision.clamp is not None:
            again = _norm_while_untouched(self.selection.parameters, self.measured)
        return SelectionReport(
            self.selection.label, repr(self.policy), self.measured, self.decision, self.present, again
        )


def blank(selection: Selection, policy: Policy | None, norm_type: float, device: torch.device) -> Part:
    """A part on which nothing has been measured yet."""
    zero = torch.zeros((), device=device)
    norms = zero.expand(len(selection.names))
    measured = GradientNorms(selection.names, norms, zero, norm_type, selection.groups, 0)
    return Part(selection, policy, measured, (False,) * len(selection.names), Decision(), {})


def decide(
    selection: Selection,
    policy: Policy | None,
    needs: Needs,
    states: Mapping[str, State],
    *,
    device: torch.device,
    prescale: Tensor | float,
    step: int,
    loss: Tensor | float | None,
) -> Part:
    """Measure one selection's true gradients and let its policy decide; does not sync the host."""
    if isinstance(loss, float):
        loss = torch.tensor(loss, device=device)
    measured, present = measure(selection, needs, device=device, prescale=prescale, step=step, loss=loss)
    if policy is None or not selection.names:
        return Part(selection, policy, measured, present, Decision(), {})
    state = states.get(selection.label)
    decision, state = policy.decide(measured, policy.init(measured) if state is None else state)
    return Part(selection, policy, measured, present, decision, state)


def all_finite(parts: Sequence[Part]) -> Tensor:
    """[] bool: every gradient of every parameter is finite, excluded ones included."""
    return torch.stack([torch.isfinite(part.measured.total) for part in parts]).all()


def asks_to_skip(parts: Sequence[Part]) -> Tensor:
    """[] bool: some policy asks to skip the step."""
    asked = torch.zeros_like(parts[0].measured.total, dtype=torch.bool)
    for part in parts:
        if part.decision.skip is not None:
            asked = asked | part.decision.skip
    return asked


def carry_out(optimizer: Optimizer, parts: Sequence[Part], prescale: Tensor | float) -> Tensor | None:
    """Apply the decisions; returns the scale where one was folded into the optimizer's kernel, to be set on it."""
    filled = [part for part in parts if any(part.present)]
    for part in filled:
        plain = part.decision.unit_coefficients is None and part.decision.clamp is None
        if len(filled) == 1 and plain and can_fold(optimizer, part.selection.parameters):
            factor = factors(part.decision, part.measured, prescale)
            if factor is not None and factor.dim() == 0:
                return None if factor.device.type == "cpu" and float(factor) == 1.0 else kernel_scale(factor)
        unit_dim = None if part.policy is None else part.policy.needs.unit_dim
        apply(part.selection.parameters, part.decision, part.measured, prescale=prescale, unit_dim=unit_dim)
    return None


def committed(parts: Sequence[Part], old: Mapping[str, State], commit: Tensor | bool) -> dict[str, State]:
    """The policies' states after the step: the new ones where ``commit`` holds."""
    result = dict(old)
    for part in parts:
        label, measured = part.selection.label, part.measured
        if part.policy is None or commit is False or not part.selection.names:
            continue
        if isinstance(commit, Tensor):
            before = old.get(label) or part.policy.init(measured)
            result[label] = {k: torch.where(commit, value, before[k]) for k, value in part.state.items()}
        else:
            result[label] = part.state
    return result


def _norm_while_untouched(
    parameters: Sequence[Tensor], measured: GradientNorms
) -> Callable[[], Tensor | None]:
    """Measures the gradients when called, or returns None once one of them is gone or was changed."""
    seen = [(TensorWeakRef(p.grad), p.grad._version) for p in parameters if p.grad is not None]

    def norm() -> Tensor | None:
        gradients = [(reference(), version) for reference, version in seen]
        untouched = [g for g, version in gradients if g is not None and g._version == version]
        if len(untouched) != len(seen):
            return None
        return measure_total(untouched, measured.norm_type, measured.norms.device)

    return norm
