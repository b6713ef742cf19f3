"""Adaptive gradient clipping (Brock et al. 2021) as it is usually written: a loop, and with foreach operations."""

import torch
from torch import Tensor

from gradkeel.bench import Contender, Gradients

LOOP, FOREACH = "loop over tensors, as timm's", "foreach operations"
RATIO, FLOOR, TINY = 0.01, 1e-3, 1e-6


def unit_norms(tensor: Tensor) -> Tensor:
    """Norm of each output unit, shaped to multiply the tensor."""
    dims = tuple(range(1, tensor.dim())) or None
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)


@torch.no_grad()
def clip_by_loop(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        limit = unit_norms(parameter).clamp_(min=FLOOR).mul_(RATIO)
        norm = unit_norms(gradient)
        clipped = gradient * (limit / norm.clamp(min=TINY))
        gradient.copy_(torch.where(norm < limit, gradient, clipped))


@torch.no_grad()
def clip_by_foreach(parameters: list[torch.nn.Parameter]) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    limits = torch._foreach_clamp_min([unit_norms(parameter) for parameter in parameters], FLOOR)
    torch._foreach_mul_(limits, RATIO)
    norms = torch._foreach_clamp_min([unit_norms(gradient) for gradient in gradients], TINY)
    torch._foreach_div_(limits, norms)
    torch._foreach_clamp_max_(limits, 1.0)
    torch._foreach_mul_(gradients, limits)


def clips(gradients: Gradients) -> list[Contender]:
    """Both of them; foreach first, for it is the faster one."""
    return [
        Contender(
            FOREACH, lambda: clip_by_foreach(gradients.parameters), gradients.refill, lambda: error(gradients)
        ),
        Contender(
            LOOP, lambda: clip_by_loop(gradients.parameters), gradients.refill, lambda: error(gradients)
        ),
    ]


def error(gradients: Gradients) -> float:
    """Relative error of what stands in the gradients against the definition in float64."""
    differences = total = 0.0
    for parameter, true in zip(gradients.parameters, gradients.true, strict=True):
        assert parameter.grad is not None
        limit = RATIO * unit_norms(parameter.detach().double()).clamp(min=FLOOR)
        wanted = true.double() * (limit / unit_norms(true.double()).clamp(min=TINY)).clamp(max=1.0)
        differences += float((parameter.grad.double() - wanted).square().sum())
        total += float(wanted.square().sum())
    return (differences / total) ** 0.5
