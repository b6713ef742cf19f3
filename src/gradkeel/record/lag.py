"""How far what an Adam-like optimizer remembers of the gradients lags behind them."""

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

_HOST = torch.device("cpu")
_NO_STATE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """What is remembered of k parameters.

    Attributes:
        rows: their places in the report.
        sums: [k] sums of second moments.
        made: [k] steps that Adam has made of each: none of one that had no gradient.
        beta: of its bias correction.
    """

    rows: Sequence[int]
    sums: Tensor
    made: Tensor
    beta: Tensor | float

    def on_host(self) -> "Remembered":
        """A copy on the CPU, to be read when it has arrived."""
        beta = self.beta if isinstance(self.beta, float) else to_host(self.beta)
        return Remembered(self.rows, to_host(self.sums), to_host(self.made), beta)

    def moments(self) -> float:
        """The sum of the bias-corrected second moments, of what is on the host."""
        corrections = 1 - self.beta**self.made
        pairs = zip(self.sums.tolist(), corrections.tolist(), strict=True)
        return sum(total / correction if correction else math.nan for total, correction in pairs)


@dataclass(frozen=True, slots=True, eq=False)
class Lag:
    """What the figure follows from, which nobody needs before it is written.

    Attributes:
        norms: those of the gradients of each selection, as they are applied.
        remembered: by the optimizers' groups.
    """

    norms: Sequence[Tensor]
    remembered: Sequence[Remembered]

    def on_host(self) -> "Lag":
        """A copy on the CPU, to be read when it has arrived."""
        return Lag([to_host(norms) for norms in self.norms], [own.on_host() for own in self.remembered])

    def value(self) -> float:
        """The norm of the gradients over the root of what is remembered of their squares, of what is on the host."""
        norms = [norm for own in self.norms for norm in own.tolist()]
        now = sum(norms[row] * norms[row] for own in self.remembered for row in own.rows)
        then = sum(own.moments() for own in self.remembered)
        if then:
            return math.sqrt(now / then) if now / then >= 0 else math.nan
        return math.inf if now > 0 else math.nan


def second_moment_lag(
    optimizers: Sequence[Optimizer], report: StepReport, parameters: Sequence[Tensor]
) -> Lag | None:
    """The norm of the gradients of a step, over what an Adam-like optimizer remembers of those before it.

    It divides by the root of its second moment, bias-corrected; where the gradients have grown and that lags behind,
    updates are as many times larger than they are meant to be. About 1 while nothing changes.

    Args:
        optimizers: those with ``exp_avg_sq`` in their state count, or what AMSGrad divides by, its highest value; None
            comes of it where there are none, or where the gradients as they are applied are not known by their 2-norms.
        report: of the step, which has been decided and not been made.
        parameters: in the order of the report; those without a gradient are passed over, as the optimizer does.

    Does not sync the host.

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
            if "betas" not in group:
                continue
            rows, moments, made = [], [], []
            for parameter in group["params"]:
                row, state = places.get(id(parameter)), states.get(parameter) or _NO_STATE
                moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
                # What an optimizer divides by, entry by entry, where it has begun to keep it.
                if row is None or moment is None or moment.shape != parameter.shape or "step" not in state:
                    continue
                rows.append(row)
                moments.append(moment)
                made.append(state["step"])
            if rows:
                sums = tensor_norms(moments, 1.0, device)
                beta = group["betas"][1]
                beta = beta.reshape(()) if isinstance(beta, Tensor) and not beta.is_cpu else float(beta)
                remembered.append(Remembered(rows, sums, _numbers(made, device), beta))
    return Lag([s.measured.after(s.decision).norms for s in selections], remembered) if remembered else None


def _numbers(counts: Sequence[Any], device: torch.device) -> Tensor:
    """[k] float64 from k counts, on an accelerator if one of them is there; of tensors on the host a copy."""
    if all(isinstance(one, Tensor) and one.is_cpu and one.is_floating_point() for one in counts):
        return tensor_norms(counts, math.inf, _HOST)  # their magnitudes, read in one go
    if any(isinstance(one, Tensor) and not one.is_cpu for one in counts):
        return torch.stack([torch.as_tensor(one, dtype=torch.float32).to(device) for one in counts])
    return from_list([float(one) for one in counts])
