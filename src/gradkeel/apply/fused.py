"""What may be folded into which optimizer: the one place that decides it.

A fused kernel divides by ``optimizer.grad_scale`` and skips where ``optimizer.found_inf`` is 1. Folding the
coefficient there saves a pass over the gradients. It is done only where it is exact and pays: every gradient float32
(an fp32 scale costs digits of a float64 gradient, and low-precision kernels gain nothing), one coefficient for all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from gradkeel.tensors import shares_memory

# RMSprop and the rest ignore or refuse grad_scale; each optimizer of torch.optim has its line in the tests.
FOLDING: tuple[type[Optimizer], ...] = (SGD, Adam, AdamW, Adagrad)


def reads_grad_scale(optimizer: Optimizer) -> bool:
    """Whether every group of this optimizer runs in a fused kernel that honours ``grad_scale``."""
    return type(optimizer) in FOLDING and all(bool(group.get("fused")) for group in optimizer.param_groups)


def can_fold(optimizer: Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether one coefficient for all these parameters may go into the optimizer's kernel."""
    return reads_grad_scale(optimizer) and all(
        p.grad is None
        or (p.grad.dtype == torch.float32 and p.grad.layout == torch.strided and not shares_memory(p.grad))
        for p in parameters
    )


def can_skip_on_device(optimizer: Optimizer, device: torch.device, parameters: Sequence[Tensor]) -> bool:
    """Whether ``found_inf`` may skip this step without the host.

    Not on a parameter's first step: its state would be created all the same, with an uninitialised momentum buffer
    under SGD. Not on CPU, where the host knows anyway.
    """
    return (
        device.type != "cpu"
        and reads_grad_scale(optimizer)
        and all(p.grad is None or (_has_state(optimizer, p) and p.grad.device == device) for p in parameters)
    )


def _has_state(optimizer: Optimizer, parameter: Tensor) -> bool:
    if isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups):
        return True
    return bool(optimizer.state.get(parameter))


def kernel_scale(factor: Tensor | float, device: torch.device) -> Tensor:
    """[] float32 ``grad_scale`` that makes a fused kernel multiply its gradients by ``factor``."""
    if isinstance(factor, float):
        return torch.full((), 1.0 / factor, dtype=torch.float32, device=device)
    return (1.0 / factor).to(torch.float32)
