"""When the weights themselves are measured, and how: their norms before a step, and the norms of its update."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkeel.guard.report import StepReport
from gradkeel.kernels import foreach
from gradkeel.measure.powers import tensor_norms
from gradkeel.record.rows import Sample
from gradkeel.tensors import entries_to_read

FIRST_STEPS = 100
EVERY = 50  # steps; an update costs a copy of the weights and three passes over them
SUSPICION, ALARM = 1.5, 3.0
"""Times the highest norm of the last 20 steps: from there on weights, and also updates, are measured whatever the
interval."""
AFTER_ALARM = 10
RATE_ALARM = 2.0  # times the last learning rate
_NO_STATE: Mapping[str, Any] = {}


class Sampling:
    """Chooses steps: each of the first 100, then every 50th, and those at which something jumps.

    That is the learning rate and, on the CPU, the gradient norm: these steps are what one wants to know about later;
    elsewhere the host would have to wait for the norm. What is measured are 2-norms.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=20)
        self._seen = 0
        self._alarmed_until = 0
        self._rate: float | None = None

    def next(self, step: int, total: float | None, rate: float | None = None) -> tuple[bool, bool]:
        """Whether to measure the weights at this step, and whether the update as well; call it once a step.

        Args:
            step: its number.
            total: the gradients' norm; None where the host would have to wait for it.
            rate: the learning rate, likewise.
        """
        self._seen += 1
        jump = 0.0 if total is None else self._jump(total)
        if rate != self._rate:
            if rate is not None and self._rate is not None and rate > RATE_ALARM * self._rate:
                self._alarmed_until = step + AFTER_ALARM
            self._rate = rate
        if not jump <= ALARM:
            self._alarmed_until = step + AFTER_ALARM
        updates = self._seen <= FIRST_STEPS or step % EVERY == 0 or step <= self._alarmed_until
        return updates or not jump <= SUSPICION, updates

    def _jump(self, total: float) -> float:
        """The norm relative to the highest of the last steps, or to the last; NaN where it is not finite."""
        recent = self._recent
        if not math.isfinite(total):
            return math.nan
        highest = recent[-1] if recent else math.inf
        if total > SUSPICION * highest:  # the last alone says too little
            highest = max(recent)
        recent.append(total)
        return total / highest if highest > 0 else 0.0


def second_moment_lag(
    optimizers: Sequence[Optimizer], report: StepReport, parameters: Sequence[Tensor]
) -> Tensor | None:
    """[] the norm of the gradients of a step, over what an Adam-like optimizer remembers of those before it.

    It divides by the root of its second moment, bias-corrected; where the gradients have grown and that lags behind,
    updates are as many times larger than they are meant to be. About 1 while nothing changes.

    Args:
        optimizers: those with ``exp_avg_sq`` in their state count, or what AMSGrad divides by, its highest value; None
            comes of it where there are none, or where the gradients as they are applied are not known by their 2-norms.
        report: of the step, which has been decided and not been made.
        parameters: in the order of the report; those without a gradient are passed over, as the optimizer does.

    Syncs the host where some parameters have made more steps than others and the host counts them.

    Source:
        Bai et al., "Adaptive preconditioners trigger loss spikes in Adam", 2025, arXiv:2506.04805.
    """
    if any(s.decision.clamp is not None or s.measured.norm_type != 2.0 for s in report.selections):
        return None
    present = chain.from_iterable(s.present for s in report.selections)
    places = {id(p): i for i, (p, here) in enumerate(zip(parameters, present, strict=True)) if here}
    rows, remembered = list[int](), list[Tensor]()
    device = report.selections[0].measured.norms.device
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [
                (places[id(p)], moment, state["step"])
                for p in (group["params"] if "betas" in group else ())
                if id(p) in places
                and (moment := _moment(state := optimizer.state.get(p) or _NO_STATE, p)) is not None
            ]
            if not kept:
                continue
            rows += [place for place, _, _ in kept]
            sums = tensor_norms([moment for _, moment, _ in kept], 1.0, device)
            corrections = _correction(group["betas"][1], [made for _, _, made in kept], sums)
            remembered.append((sums / corrections).sum())
    if not rows:
        return None
    squares = [s.measured.after(s.decision).norms.square() for s in report.selections]
    whole = squares[0] if len(squares) == 1 else torch.cat(squares)
    together = remembered[0] if len(remembered) == 1 else torch.stack(remembered).sum()
    return (foreach.pick(whole, rows).sum() / together).sqrt()


def _moment(state: Mapping[str, Any], parameter: Tensor) -> Any:
    """The second moment that an optimizer divides by, entry by entry, where it has begun to keep one."""
    moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    return moment if moment is not None and moment.shape == parameter.shape and "step" in state else None


def _correction(beta: Any, steps: Sequence[Any], like: Tensor) -> Tensor | float:
    """Adam's bias correction, [k] where parameters have not made as many steps: one without a gradient makes none."""
    if any(isinstance(step, Tensor) and not step.is_cpu for step in steps):
        return 1 - beta ** torch.stack([step.to(like) for step in steps])
    made = [float(step) for step in steps]
    return 1 - beta ** (made[0] if len(set(made)) == 1 else like.new_tensor(made))


class BeforeUpdate:
    """The norms of the weights before a step's update, and the weights themselves where the update is wanted.

    Attributes:
        lag: of Adam's second moment, where that is known.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        parameters: Sequence[Tensor],
        device: torch.device,
        lag: Tensor | None,
        *,
        updates: bool,
    ) -> None:
        self._names, self._parameters, self._device, self.lag = names, parameters, device, lag
        entries = [entries_to_read(parameter) for parameter in parameters]
        self._weights = tensor_norms(entries, 2.0, device)
        self._copies = [entry.clone() for entry in entries] if updates else None

    def sample(self) -> Sample:
        """Norms of the weights before the update, and of the update; call it after the optimizer's step."""
        if self._copies is None:
            return Sample(self._names, self._weights, torch.full_like(self._weights, math.nan))
        entries = [entries_to_read(parameter) for parameter in self._parameters]
        if entries:  # in place, for the copies are as large as the model
            torch._foreach_sub_(self._copies, entries)
        return Sample(self._names, self._weights, tensor_norms(self._copies, 2.0, self._device))
