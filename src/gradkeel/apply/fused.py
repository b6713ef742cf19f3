"""What may be folded into which optimizer: the one place that decides it.

A fused kernel divides by ``optimizer.grad_scale`` and skips where ``optimizer.found_inf`` is 1. Folding the
coefficient there saves a pass over the gradients. It is done only where it is exact and pays: every gradient float32
(an fp32 scale costs digits of a float64 gradient, and low-precision kernels gain nothing), one coefficient for all.

A kernel that is given a scale also writes the scaled gradients back, even where it is 1. So where the Triton kernels
scale, which do not touch what is multiplied by 1, folding pays only if most steps are scaled.
"""

from collections import deque
from collections.abc import Sequence
from typing import TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from gradkeel.apply.host import LEAST
from gradkeel.kernels import triton_host
from gradkeel.kernels.arrival import Arrival, is_capturing, to_host
from gradkeel.tensors import is_only_a_view

# RMSprop and the rest ignore or refuse grad_scale; each optimizer of torch.optim has its line in the tests.
FOLDING: tuple[type[Optimizer], ...] = (SGD, Adam, AdamW, Adagrad)
HONOURING = ("cpu", "cuda", "xpu")
"""Devices whose fused kernels heed ``grad_scale`` and ``found_inf``; before torch 2.13 Apple's do not (#186360)."""


def reads_grad_scale(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether every group of this optimizer runs in a fused kernel that honours ``grad_scale``."""
    return (
        type(optimizer) in FOLDING
        and device.type in HONOURING
        and all(bool(group.get("fused")) for group in optimizer.param_groups)
    )


def can_fold(optimizer: Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether one coefficient for all these parameters may go into the optimizer's kernel."""
    if not parameters or not reads_grad_scale(optimizer, parameters[0].device):
        return False
    return all(
        p.grad is None
        or (p.grad.dtype == torch.float32 and p.grad.layout == torch.strided and not is_only_a_view(p.grad))
        for p in parameters
    )


def is_shared(factor: Tensor | list[float] | float) -> TypeGuard[Tensor | float]:
    """Whether it is one factor for all parameters."""
    return isinstance(factor, float) or (isinstance(factor, Tensor) and factor.dim() == 0)


class Folding:
    """Chooses, step by step, between folding and a pass of its own that leaves alone what is multiplied by 1.

    Whether a step was scaled the host learns a few steps later, without waiting for it.
    """

    REMEMBERED = 32

    def __init__(self) -> None:
        self._arriving: deque[tuple[Tensor, Arrival]] = deque()
        self._scaled: deque[bool] = deque(maxlen=self.REMEMBERED)

    def pays(self, factor: Tensor | float) -> bool:
        """Whether to fold this step's factor, a number of the host's or []; takes note of it."""
        if isinstance(factor, float):
            return factor >= LEAST  # nothing is asked of the host that it does not know
        pays = self.is_worth(factor.device)
        if not is_capturing(factor.device):
            self._arriving.append((to_host(factor != 1), Arrival(factor.device)))
        return pays

    def is_worth(self, device: torch.device) -> bool:
        """Whether most of the steps that the host has heard of were scaled."""
        kernels = triton_host.kernels(device)
        if kernels is None or kernels.fault is not None:
            return True  # any other pass writes all gradients
        if not is_capturing(device):
            self._look()
        return sum(self._scaled) * 2 > len(self._scaled)

    def heard(self, scaled: bool) -> None:
        """Take note of a step of which the host knows by now whether it was scaled."""
        self._scaled.append(scaled)

    def _look(self) -> None:
        while self._arriving and self._arriving[0][1].is_there():
            self._scaled.append(bool(self._arriving.popleft()[0]))


# For each optimizer its state, how many entries that had, and the parameters, when all of these had their state.
_READY: WeakKeyDictionary[Optimizer, tuple[object, int, object]] = WeakKeyDictionary()


def can_skip_on_device(optimizer: Optimizer, device: torch.device, parameters: Sequence[Tensor]) -> bool:
    """Whether ``found_inf`` may skip this step without the host.

    Not on a parameter's first step: its state would be created all the same, with an uninitialised momentum buffer
    under SGD. Not on CPU, where the host knows anyway. Once every parameter has its state, only another table of
    states, or another number of them, can change that: until then no parameter is looked at again.
    """
    if device.type == "cpu" or not reads_grad_scale(optimizer, device):
        return False
    state, count, known = optimizer.state, len(optimizer.state), _READY.get(optimizer)
    if known is not None and known[0] is state and known[1] == count and known[2] is parameters:
        return True
    if all(_has_state(optimizer, p) and p.device == device for p in parameters):
        _READY[optimizer] = (state, count, parameters)
        return True
    return all(p.grad is None or (_has_state(optimizer, p) and p.grad.device == device) for p in parameters)


def _has_state(optimizer: Optimizer, parameter: Tensor) -> bool:
    if isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups):
        return True
    return bool(optimizer.state.get(parameter))


def kernel_scale(factor: Tensor | float, device: torch.device) -> Tensor:
    """[] float32 ``grad_scale`` that makes a fused kernel multiply its gradients by ``factor``."""
    if isinstance(factor, float):
        return torch.full((), 1.0 / factor, dtype=torch.float32, device=device)
    return (1.0 / factor).to(torch.float32)
