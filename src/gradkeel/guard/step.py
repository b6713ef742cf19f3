"""One step's way from gradients to decisions: measure every selection, let its policy decide, judge the whole."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradkeel.apply import apply, factors
from gradkeel.apply.fused import Folding, can_fold, kernel_scale
from gradkeel.errors import CheckpointError
from gradkeel.guard.prescale import LossScale, prescale
from gradkeel.guard.report import SelectionReport
from gradkeel.guard.roster import Item, Roster
from gradkeel.measure import Readings, true_norms
from gradkeel.norms import Decision, GradientNorms, State, Window
from gradkeel.policies import Policy
from gradkeel.ranks.exchange import Agreed, Exchange, Told
from gradkeel.ranks.local import Locally
from gradkeel.ranks.total import measure_total
from gradkeel.selection import Selection

_NO_STATE: State = {}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One selection on its way through the pipeline.

    Attributes:
        selection: its parameters on this rank.
        policy: what decides on them; None where they are only measured.
        measured: the norms of the whole selection, over all ranks.
        present: which of the measured parameters have a gradient.
        decision: what is to be done, to the whole selection.
        state: the policy's new state.
        shown: the policy's repr.
        local: which of the measured parameters are on this rank; None where all are, and whole.
        place_of: tells where a parameter of the given index is not finite.
    """

    selection: Selection
    policy: Policy | None
    measured: GradientNorms
    present: tuple[bool, ...]
    decision: Decision
    state: State
    shown: str
    local: Locally | None = None
    place_of: Callable[[int], str] | None = None

    def undone(self) -> "Part":
        """The same part with nothing applied; the bound stays, for the report."""
        return replace(self, decision=Decision(bound=self.decision.bound))

    def report(self) -> SelectionReport:
        """What to tell of this part."""
        again = None
        if (
            self.decision.clamp is not None and self.local is None
        ):  # measuring again would be another collective
            again = _norm_while_untouched(self.selection.parameters, self.measured)
        return SelectionReport(
            self.selection.label,
            self.shown,
            self.measured,
            self.decision,
            self.present,
            again,
            self.place_of,
        )

    @property
    def here(self) -> tuple[Decision, GradientNorms]:
        """What is to be done to the parameters on this rank, and their norms."""
        if self.local is None:
            return self.decision, self.measured
        return self.local.decision(self.decision), self.local.measured(self.measured)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What one step's gradients are, before any decision.

    Attributes:
        prescale: [] what turns the stored gradients into the true ones.
        norms: each selection's.
        present: for each selection, which of its parameters have a gradient.
        has_gradients: whether any parameter has one, on any rank.
        found_inf: [] above 0 where a loss scaler saw a non-finite gradient, or a rank has raised.
        agreed: what the ranks told each other.
        agreed_scalars: what was logged and is now the same on all ranks.
    """

    prescale: Tensor | float
    norms: tuple[GradientNorms, ...]
    present: tuple[tuple[bool, ...], ...]
    has_gradients: bool
    found_inf: Tensor | None
    agreed: Agreed | None
    agreed_scalars: Mapping[str, Tensor]


def blank(item: Item) -> Part:
    """A part on which nothing has been measured yet."""
    return Part(
        item.selection, item.policy, item.blank, (False,) * len(item.blank.names), Decision(), {}, item.shown
    )


def measure_all(
    roster: Roster,
    found: Sequence[Readings],
    *,
    window: Window | None,
    loss_scale: LossScale,
    step: int,
    loss: Tensor | float | None,
) -> Measured:
    """The true norms of all selections from what this rank has read; one collective where ranks share parameters."""
    gradients = sum(sum(one.present) for one in found)
    agreed, scalars, found_inf = None, dict[str, Tensor](), loss_scale.found_inf
    if roster.exchange is not None:
        weight = None if window is None or window.ranks is None else window.weight()
        agreed = roster.exchange(found, Told(gradients, found_inf, weight, loss))
        found, found_inf = agreed.readings, agreed.found_inf + agreed.failed
        # An accelerator is not asked: without gradients norms are 0, and without losses their mean is NaN.
        on_host = roster.device.type == "cpu"
        gradients = int(agreed.gradients) if on_host else 1
        if loss is not None or (on_host and not bool(agreed.loss.isnan())):
            scalars["loss"] = agreed.loss
        if window is not None and agreed.weight is not None:
            window.agree(agreed.weight, scalars.get("loss"))
        loss = None if on_host and not scalars else agreed.loss
    if isinstance(loss, float):
        loss = torch.full((), loss, device=roster.device)
    factor = prescale(loss_scale, 1.0 if window is None else window.factor(), roster.device)
    norms = tuple(
        true_norms(item.blank, one, factor, step=step, loss=loss)
        for item, one in zip(roster.items, found, strict=True)
    )
    present = tuple(one.present for one in found)
    return Measured(factor, norms, present, gradients > 0, found_inf, agreed, scalars)


def decide_all(roster: Roster, measured: Measured, states: Mapping[str, State]) -> list[Part]:
    """Let each selection's policy decide; does not sync the host."""
    parts = []
    for i, (item, norms, present) in enumerate(
        zip(roster.items, measured.norms, measured.present, strict=True)
    ):
        decision, state = Decision(), _NO_STATE
        if item.policy is not None and norms.names:
            before = states.get(item.selection.label)
            decision, state = item.policy.decide(norms, item.policy.init(norms) if before is None else before)
        local, place_of = None, None
        if roster.exchange is not None and measured.agreed is not None:
            local = roster.exchange.local[i]
            if not roster.exchange.splits and local.rows is None:
                local = None
            place_of = partial(_place_of, roster.exchange, measured.agreed, i)
        parts.append(
            Part(item.selection, item.policy, norms, present, decision, state, item.shown, local, place_of)
        )
    return parts


def _place_of(exchange: Exchange, agreed: Agreed, selection: int, position: int) -> str:
    rank = exchange.where(agreed, selection, position)
    return "" if rank is None else f" on rank {rank}"


def judge(
    parts: Sequence[Part], found_inf: Tensor | None, window: Window | None, *, tolerant: bool
) -> tuple[Tensor, bool | Tensor]:
    """[] bool: every gradient is finite, excluded ones included; and whether the step may be made.

    The latter is a [] bool tensor, or known to the host: False in an empty window, True where nothing can forbid it.

    Args:
        parts: all of them, with their policies' decisions.
        found_inf: [] above 0 where a loss scaler, or another rank, knows of a non-finite gradient.
        window: the accumulation window, if there is one.
        tolerant: whether a step may be made on non-finite gradients.
    """
    # A norm is never below zero, so that only NaN and inf are not below inf.
    totals = [part.measured.total for part in parts if part.measured.names] or [parts[0].measured.total]
    finite = _all([total < math.inf for total in totals])
    if found_inf is not None:
        finite = finite & (found_inf.to(finite.device) == 0)
    assents = [~part.decision.skip for part in parts if part.decision.skip is not None]
    if not tolerant:
        assents.append(finite)
    empty = window is not None and window.is_empty()
    if isinstance(empty, Tensor):
        assents.append(~empty.to(finite.device))
    elif empty:
        return finite, False
    return finite, _all(assents) if assents else True


def _all(flags: Sequence[Tensor]) -> Tensor:
    """[] bool: every one of the [] bools."""
    return flags[0] if len(flags) == 1 else torch.stack(list(flags)).all()


def carry_out(
    optimizer: Optimizer, parts: Sequence[Part], prescale: Tensor | float, folding: Folding
) -> Tensor | None:
    """Apply the decisions; returns the scale where one was folded into the optimizer's kernel, to be set on it."""
    filled = [part for part in parts if any(p.grad is not None for p in part.selection.parameters)]
    for part in filled:
        decision, measured = part.here
        plain = decision.unit_coefficients is None and decision.clamp is None
        factor = factors(decision, prescale) if plain and len(filled) == 1 else None
        if isinstance(factor, float):
            factor = measured.total.new_full((), factor)
        if factor is not None and factor.dim() == 0:
            if factor.device.type == "cpu" and float(factor) == 1.0:
                return None
            if folding.pays(factor) and can_fold(optimizer, part.selection.parameters):
                return kernel_scale(factor)
        unit_dim = None if part.policy is None else part.policy.needs.unit_dim
        apply(part.selection.parameters, decision, measured, prescale=prescale, unit_dim=unit_dim)
    return None


def committed(parts: Sequence[Part], old: Mapping[str, State], commit: Tensor | bool) -> dict[str, State]:
    """The policies' states after the step: the new ones where ``commit`` holds."""
    result = dict(old)
    for part in parts:
        label, measured = part.selection.label, part.measured
        if part.policy is None or commit is False or not measured.names:
            continue
        if isinstance(commit, Tensor):
            before = old.get(label) or part.policy.init(measured)
            result[label] = {k: torch.where(commit, value, before[k]) for k, value in part.state.items()}
        else:
            result[label] = part.state
    return result


def check_state(
    state: Mapping[str, Any],
    *,
    version: int,
    policies: Mapping[str, str],
    parameters: Mapping[str, int],
    states: Mapping[str, State],
) -> None:
    """Raise `CheckpointError` unless a guard's saved state belongs to these policies and numbers of parameters.

    A policy that remembers nothing may be another one than before: with a lower bound, for instance.
    """
    if state.get("version") != version:
        raise CheckpointError(f"state has version {state.get('version')!r}; this gradkeel reads {version}")
    remembering = [
        label for label in {**state["states"], **states} if state["states"].get(label) or states.get(label)
    ]
    if any(state["policies"].get(label) != policies.get(label) for label in remembering):
        raise CheckpointError(
            f"state belongs to the policies {state['policies']}, but this guard has {policies}; attach with the same "
            "policies and groups, or do not load it, so that statistics begin anew"
        )
    if state["parameters"] != parameters:
        raise CheckpointError(
            f"state belongs to so many parameters: {state['parameters']}, but this guard has {parameters}; attach to "
            "the same parameters with the same exclude"
        )


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
