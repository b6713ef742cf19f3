"""Every benchmark has these contenders: torch's ``clip_grad_norm_``, gradkeel's, and a guard."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from gradkeel.attaching import attach
from gradkeel.bench.stopwatch import Contender
from gradkeel.bench.workload import Gradients
from gradkeel.functional import clip_grad_norm_
from gradkeel.language import say
from gradkeel.policies import ClipByGlobalNorm, Policy

TORCH = "torch clip_grad_norm_"
FUNCTION = "gradkeel clip_grad_norm_"
GUARD = "gradkeel guard"
GUARDED_STEP = f"{GUARD} + step"


class NoStep(Optimizer):
    """An optimizer whose step does nothing, so that what is left to time is the guard."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing."""


def clip_function(
    name: str, function: Callable[..., object], gradients: Gradients, bound: float
) -> Contender:
    """Make a contender of any ``clip_grad_norm_(parameters, max_norm)``."""
    return Contender(
        name,
        lambda: function(gradients.parameters, bound),
        gradients.refill,
        lambda: gradients.error(bound),
    )


def clip_functions(gradients: Gradients, bound: float) -> list[Contender]:
    """Return torch's ``clip_grad_norm_``, and gradkeel's."""
    functions = ((TORCH, torch.nn.utils.clip_grad_norm_), (FUNCTION, clip_grad_norm_))
    return [clip_function(name, function, gradients, bound) for name, function in functions]


def guard_alone(
    gradients: Gradients, policy: Policy, error: Callable[[], float], name: str = GUARD
) -> Contender:
    """Guard an optimizer that does nothing: norms per tensor, the decision, skipping, the report."""
    optimizer = NoStep(gradients.parameters)
    attach(optimizer, policy)
    return Contender(name, optimizer.step, gradients.refill, error)


def clips(gradients: Gradients, bound: float) -> list[Contender]:
    """Return all that clip by the global norm, torch's first, and the limit."""
    guard = guard_alone(gradients, ClipByGlobalNorm(bound), lambda: gradients.error(bound))
    return [*clip_functions(gradients, bound), guard, gradients.read()]


def steps(gradients: Gradients, bound: float) -> list[Contender]:
    """Return clip and AdamW's step, fused where it can be; torch's first, and last the step without clipping."""
    fused = gradients.device.type in {"cpu", "cuda"}
    torchs, own, plain = (torch.optim.AdamW(gradients.parameters, lr=1e-9, fused=fused) for _ in range(3))

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(gradients.parameters, bound)
        torchs.step()

    return [
        Contender(f"{TORCH} + step", clip_and_step, gradients.refill),
        guarded_step(gradients, ClipByGlobalNorm(bound), own),
        Contender(say("step without clipping"), plain.step, gradients.refill),
    ]


def guarded_step(gradients: Gradients, policy: Policy, optimizer: Optimizer, **options: Any) -> Contender:
    """The optimizer's step under a guard."""
    attach(optimizer, policy, **options)
    return Contender(GUARDED_STEP, optimizer.step, gradients.refill)
