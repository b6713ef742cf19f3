"""Scaling on an accelerator, where the host does not know the factors and must not ask for them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import triton_host
from gradkeel.tensors import entries_to_scale, shares_memory


def scale(parameters: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient by its factor, which lies on an accelerator.

    Args:
        parameters: n parameters; those without a gradient are passed over.
        factor: [] or [n].
    """
    rows = [factor] * len(parameters) if factor.dim() == 0 else list(factor.unbind())
    chosen = [
        (gradient, row) for p, row in zip(parameters, rows, strict=True) if (gradient := own(p)) is not None
    ]
    scale_entries([entries_to_scale(gradient) for gradient, _ in chosen], [row for _, row in chosen])


def scale_units(parameters: Sequence[Tensor], coefficients: Tensor, counts: Sequence[int], dim: int) -> None:
    """Multiply each unit by its coefficient; arguments as in ``host.scale_units``, on an accelerator."""
    for parameter, part in zip(parameters, coefficients.split(list(counts)), strict=True):
        gradient = own(parameter)
        if gradient is not None:
            entries = entries_to_scale(gradient)
            wide = torch.promote_types(entries.dtype, torch.float32)
            entries.mul_(over_units(part.to(entries.device, wide), gradient, entries.dim(), dim))


def scale_entries(entries: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by its factor, [] on some device, without the host knowing the factors."""
    kernels = triton_host.kernels()
    table = None if kernels is None else kernels.table(entries)
    if kernels is not None and table is not None:
        kernels.scale(table, torch.stack([factor.to(entries[0].device) for factor in factors]))
        torch.autograd.graph.increment_version(entries)
        return
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(entries):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    for (device, dtype), members in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        moved = {id(factors[i]): factors[i].to(device, wide) for i in members}
        chosen, numbers = [entries[i] for i in members], [moved[id(factors[i])] for i in members]
        if dtype == wide:
            torch._foreach_mul_(chosen, numbers[0] if len(moved) == 1 else numbers)
            continue
        for tensor, number in zip(chosen, numbers, strict=True):
            # A factor without a dimension would be rounded to the gradient's dtype first; with one it promotes.
            tensor.mul_(number.reshape(1))


def own(parameter: Tensor) -> Tensor | None:
    """The gradient, copied first if its entries share memory, as those of an expanded gradient do."""
    gradient = parameter.grad
    if gradient is not None and shares_memory(gradient):
        parameter.grad = gradient = gradient.clone(memory_format=torch.contiguous_format)
    return gradient


def over_units(factors: Tensor, gradient: Tensor, dims: int, dim: int) -> Tensor:
    """One factor for each unit, shaped to multiply the gradient's stored entries, which have ``dims`` dimensions."""
    if factors.numel() > 1 and gradient.layout == torch.sparse_coo:
        # Stored entries are one row for each stored index.
        sparse = gradient.sparse_dim()
        factors, dim = (factors[gradient._indices()[dim]], 0) if dim < sparse else (factors, dim - sparse + 1)
    shape = [1] * dims
    if factors.numel() > 1 or gradient.dim() > 1:
        shape[dim] = factors.numel()
    return factors.reshape(shape)
