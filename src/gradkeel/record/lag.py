"""How far what an Adam-like optimizer remembers of the gradients lags behind them."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkeel.guard.report import StepReport
from gradkeel.kernels.arrival import to_host
from gradkeel.measure.powers import tensor_norms
from gradkeel.norms import from_list

SERIES = "second_moment_lag"
"""The scalar's name in a record."""

_NO_STATE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """What is remembered of k parameters: [k] sums of second moments, and [k] Adam's bias correction of each."""

    rows: Sequence[int]
    sums: Tensor
    corrections: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Lag:
    """What the figure follows from, which nobody needs before it is written."""

    norms: Sequence[Tensor]  # those of the gradients of each selection, as they are applied
    remembered: Sequence[Remembered]  # by the optimizers' groups

    def on_host(self) -> "Lag":
        """A copy on the CPU, to be read when it has arrived."""
        return Lag(
            [to_host(norms) for norms in self.norms],
            [Remembered(own.rows, to_host(own.sums), to_host(own.corrections)) for own in self.remembered],
        )

    def value(self) -> float:
        """The norm of the gradients over the root of what is remembered of their squares, of what is on the host."""
        # An optimizer may keep anything under these names.
        with contextlib.suppress(ArithmeticError, TypeError, ValueError):
            return self._value()
        return math.nan

    def _value(self) -> float:
        norms = [norm for own in self.norms for norm in own.tolist()]
        now = then = 0.0
        for own in self.remembered:
            now += sum(norms[row] * norms[row] for row in own.rows)
            pairs = zip(own.sums.tolist(), own.corrections.tolist(), strict=True)
            then += sum(total / correction if correction else math.nan for total, correction in pairs)
        if then:
            return math.sqrt(now / then) if now / then >= 0 else math.nan
        return math.inf if now > 0 else math.nan


def second_moment_lag(
    optimizers: Sequence[Optimizer], report: StepReport, parameters: Sequence[Tensor]
) -> Lag | None:
    """The norm of the gradients of a step, over what an Adam-like optimizer remembers of those before it.

    It divides by the root of its second moment, bias-corrected; where the gradients have grown and that lags behind,
    updates are as many times larger than they are meant to be. About 1 while nothing changes.

    Optimizers with ``exp_avg_sq`` in their state count, or what AMSGrad divides by, its highest value; None comes of it
    where there are none, or where the gradients as they are applied are not known by their 2-norms. The step of the
    report has been decided and not been made; ``parameters`` are in its order, and those without a gradient are passed
    over, as the optimizer does. Does not sync the host.

    Source:
        Bai et al., "Adaptive preconditioners trigger loss spikes in Adam", 2025, arXiv:2506.04805.
    """
    selections = report.selections
    if any(s.decision.clamp is not None or s.measured.norm_type != 2.0 for s in selections):
        return None
    present = chain.from_iterable(s.present for s in selections)
    places = {id(p): i for i, (p, here) in enumerate(zip(parameters, present, strict=True)) if here}
    device, remembered = selections[0].measured.norms.device, []
    for optimizer in optimizers:
        states = optimizer.state
        for group in optimizer.param_groups:
            rows, moments, made = [], [], []
            for parameter in group["params"] if "betas" in group else ():
                row = places.get(id(parameter))
                if row is None:
                    continue
                state = states.get(parameter) or _NO_STATE
                # What it divides by, entry by entry, once it has begun to keep it.
                moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
                if moment is not None and moment.shape == parameter.shape and "step" in state:
                    rows.append(row)
                    moments.append(moment)
                    made.append(state["step"])
            if rows:
                corrections = _corrections(group["betas"][1], made, device)
                remembered.append(Remembered(rows, tensor_norms(moments, 1.0, device), corrections))
    return Lag([s.measured.after(s.decision).norms for s in selections], remembered) if remembered else None


def _corrections(beta: Any, steps: Sequence[Any], device: torch.device) -> Tensor:
    """[k] Adam's bias correction of each of k parameters: one without a gradient makes no step."""
    if any(isinstance(one, Tensor) and not one.is_cpu for one in (beta, *steps)):
        made = torch.stack([torch.as_tensor(step, dtype=torch.float32, device=device) for step in steps])
        return 1 - beta**made
    return from_list([1 - float(beta) ** float(step) for step in steps])
