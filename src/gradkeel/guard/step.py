"""The stages of one step, in their order: exchange, measure, decide, judge, apply, commit; `Guard` runs them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkeel.apply import apply, factors, scale, separate
from gradkeel.apply.fused import Folding, can_fold, is_shared, kernel_scale
from gradkeel.guard.prescale import LossScale, prescale
from gradkeel.guard.report import SelectionReport
from gradkeel.guard.roster import Part, Roster
from gradkeel.kernels.native import Table
from gradkeel.measure import Readings, true_norms
from gradkeel.norms import Decision, GradientNorms, State, Window
from gradkeel.policies.base import decide
from gradkeel.ranks.exchange import Agreed, Told
from gradkeel.ranks.total import measure_total
from gradkeel.tensors import Seen

_NO_STATE: State = {}
_NOTHING = Decision()
_FEW = 64
"""So many numbers are read faster one by one than together."""


@dataclass(slots=True, eq=False)
class Measured:
    """What one step's gradients are, before any decision."""

    prescale: Tensor | float  # [] what turns the stored gradients into the true ones
    norms: list[GradientNorms]  # each part's
    present: list[tuple[bool, ...]]  # for each part, which of its parameters have a gradient
    has_gradients: bool  # whether any parameter has one, on any rank
    found_inf: Tensor | None  # [] above 0 where a loss scaler saw a non-finite gradient, or a rank has raised
    agreed: Agreed | None  # what the ranks told each other
    agreed_scalars: Mapping[str, Tensor]  # what was logged and is now the same on all ranks


def measure_all(
    roster: Roster,
    found: Sequence[Readings],
    *,
    window: Window | None,
    loss_scale: LossScale,
    step: int,
    loss: Tensor | float | None,
) -> Measured:
    """The true norms of all parts from what this rank has read; one collective where ranks share parameters."""
    has_gradients = any([True in one.present for one in found])  # noqa: C419  # a third of the time
    scalars: dict[str, Tensor] = {}
    agreed, found_inf = None, loss_scale.found_inf
    if roster.exchange is not None:
        weight = None if window is None or window.ranks is None else window.weight()
        gradients = sum(sum(one.present) for one in found)
        agreed = roster.exchange(found, Told(gradients, found_inf, weight, loss))
        found, found_inf = agreed.readings, agreed.found_inf + agreed.failed
        # An accelerator is not asked: without gradients norms are 0, and without losses their mean is NaN.
        on_host = roster.device.type == "cpu"
        has_gradients = int(agreed.gradients) > 0 if on_host else True
        if loss is not None or (on_host and not bool(agreed.loss.isnan())):
            scalars["loss"] = agreed.loss
        if window is not None and agreed.weight is not None:
            window.agree(agreed.weight, scalars.get("loss"))
        loss = None if on_host and not scalars else agreed.loss
    if isinstance(loss, float):
        loss = torch.full((), loss, device=roster.device)
    factor = prescale(loss_scale, 1.0 if window is None else window.factor(), roster.device)
    norms = [
        true_norms(part.blank, one, factor, step=step, loss=loss)
        for part, one in zip(roster.parts, found, strict=True)
    ]
    present = [one.present for one in found]
    return Measured(factor, norms, present, has_gradients, found_inf, agreed, scalars)


def decide_all(
    roster: Roster, measured: Measured, states: Mapping[str, State]
) -> tuple[list[SelectionReport], list[State]]:
    """Each part's report with its policy's decision, and its policy's new state; does not sync the host."""
    reports, after = [], []
    for i, (part, norms) in enumerate(zip(roster.parts, measured.norms, strict=True)):
        decision, state = _NOTHING, _NO_STATE
        if not norms.names:
            reports.append(part.report)
            after.append(state)
            continue
        if part.policy is not None:
            before = states.get(part.label)
            decision, state = decide(
                part.policy, norms, part.policy.init(norms) if before is None else before
            )
            if not part.is_own:
                decision = decision.apart()
        place_of = None if measured.agreed is None else partial(_place_of, roster, measured.agreed, i)
        reports.append(
            SelectionReport(
                part.label, part.shown, norms, decision, measured.present[i], None, place_of, part.order
            )
        )
        after.append(state)
    return reports, after


def _place_of(roster: Roster, agreed: Agreed, part: int, position: int) -> str:
    rank = None if roster.exchange is None else roster.exchange.where(agreed, part, position)
    return "" if rank is None else f" on rank {rank}"


def judge(
    reports: Sequence[SelectionReport], found_inf: Tensor | None, window: Window | None, *, tolerant: bool
) -> tuple[bool | Tensor, bool | Tensor]:
    """Whether every gradient is finite, excluded ones included; and whether the step may be made.

    Booleans where the host can know without waiting, [] bool tensors on an accelerator. ``found_inf`` is above 0 where
    a loss scaler, or another rank, knows of a non-finite gradient; a ``tolerant`` step may be made on those.
    """
    finite: Tensor | bool = True
    skips: list[Tensor | bool] = []
    for report in reports:
        if report.measured.names:
            # A norm is never below zero, so that only NaN and inf are not below inf.
            finite = _both(finite, known(report.measured.known_total) < math.inf)
        if (skip := report.decision.known_skip) is not None:
            skips.append(skip)
    if found_inf is not None:
        finite = _both(finite, known(found_inf) == 0)
    may_step: Tensor | bool = True if tolerant else finite
    for skip in skips:
        may_step = _both(may_step, _not(known(skip)))
    if window is not None:
        may_step = _both(may_step, _not(known(window.is_empty())))
    return finite, may_step


def known(value: Tensor | bool | float) -> Tensor | bool | float:
    """A number that the host may look at; on an accelerator the tensor."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return value.item()
    return value


def _not(flag: Tensor | bool | float) -> Tensor | bool:
    return ~flag if isinstance(flag, Tensor) else not flag


def _both(one: Tensor | bool, other: Tensor | bool) -> Tensor | bool:
    """Whether both flags are set; a bool where the host can know."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one & other.to(one.device)
    if isinstance(one, Tensor):
        return one if other else False
    return other if one else False


def carry_out(
    optimizer: Optimizer | None,
    roster: Roster,
    reports: Sequence[SelectionReport],
    prescale: Tensor | float,
    folding: Folding,
    table: Table | None = None,
) -> Tensor | None:
    """Apply the decisions; returns the scale where one was folded into the optimizer's kernel, to be set on it.

    Nothing is folded where ``optimizer`` is None; with a ``table`` of all gradients no two of them share memory.
    """
    todo = []
    for i in roster.here:
        decision, measured, local = reports[i].decision, reports[i].measured, roster.local(i)
        if local is not None:
            decision, measured = local.decision(decision), local.measured(measured)
        is_one_pass = decision.unit_coefficients is None and decision.clamp is None
        factor = factors(decision, prescale) if is_one_pass else None
        if not _is_one(factor):
            todo.append((roster.parts[i], reports[i], decision, measured, factor, local is None))
    if todo and table is None:
        separate(roster.parameters)
    alone = optimizer if len(roster.here) == 1 else None
    for part, report, decision, measured, factor, is_whole in todo:
        parameters = part.selection.parameters
        if factor is not None:
            if (
                is_shared(factor)
                and alone is not None
                and can_fold(alone, parameters)
                and folding.pays(factor)
            ):
                return kernel_scale(factor, roster.device)
            scale(parameters, factor, table)
            continue
        unit_dim = None if part.policy is None else part.needs.unit_dim
        apply(parameters, decision, measured, prescale=prescale, unit_dim=unit_dim)
        if decision.clamp is not None and is_whole:  # elsewhere it would be another collective
            report.remeasure = norm_while_unchanged(parameters, measured)
    return None


def _is_one(factor: Tensor | list[float] | float | None) -> bool:
    """Whether the host knows that nothing is to be multiplied."""
    if isinstance(factor, list):
        return factor.count(1.0) == len(factor)
    if isinstance(factor, Tensor):
        if not factor.is_cpu:
            return False
        if factor.numel() <= _FEW:
            return factor.item() == 1.0 if factor.dim() == 0 else factor.tolist().count(1.0) == len(factor)
        return bool((factor == 1).all())
    return factor == 1.0


def committed(
    parts: Sequence[Part],
    reports: Sequence[SelectionReport],
    after: Sequence[State],
    old: Mapping[str, State],
    commit: Tensor | bool,
) -> dict[str, State]:
    """The policies' states after the step: the new ones where ``commit`` holds."""
    result = dict(old)
    if commit is False:
        return result
    for part, report, new in zip(parts, reports, after, strict=True):
        if part.policy is None or not report.measured.names:
            continue
        if isinstance(commit, Tensor):
            before = old.get(part.label) or part.policy.init(report.measured)
            result[part.label] = {key: torch.where(commit, new[key], before[key]) for key in new}
        elif not part.is_own and any(own.is_cuda for own in new.values()):
            # A graph may write to them, and a policy's own may be anybody's.
            result[part.label] = {key: own.clone() for key, own in new.items()}
        else:
            result[part.label] = new
    return result


def norm_while_unchanged(
    parameters: Sequence[Tensor], measured: GradientNorms
) -> Callable[[], Tensor | None]:
    """What measures the gradients when it is called; None comes of it once one of them is gone or was changed."""
    seen = [Seen(p.grad) for p in parameters if p.grad is not None]

    def norm() -> Tensor | None:
        unchanged = [gradient for one in seen if (gradient := one.unchanged()) is not None]
        if len(unchanged) != len(seen):
            return None
        return measure_total(unchanged, measured.norm_type, measured.norms.device)

    return norm
