"""Scaling and clamping on accelerators, where the host does not know the factors and must not ask for them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import foreach, triton_host
from gradkeel.kernels.addresses import miss
from gradkeel.tensors import are_plain, entries_to_scale, is_only_a_view


def scale(parameters: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply the gradients of n parameters, where they have one, by ``factor``, [] or [n] on an accelerator."""
    gradients = [own(parameter) for parameter in parameters]
    entries = [None if gradient is None else entries_to_scale(gradient) for gradient in gradients]
    scale_entries(entries, factor)


def scale_entries(entries: Sequence[Tensor | None], factors: Tensor) -> None:
    """Multiply n tensors or None, on whatever devices, by ``factors``, [] or [n], which the host need not know."""
    if triton_host.scale(entries, factors):
        return
    miss()
    rows = [i for i, entry in enumerate(entries) if entry is not None]
    places = dict.fromkeys(entry.device for entry in entries if entry is not None)
    held = [entry for entry in entries if entry is not None]
    numbers = foreach.pick(factors, rows)
    if len(places) > 1:
        for device in places:
            here = [i for i, entry in enumerate(held) if entry.device == device]
            scale_entries([held[i] for i in here], foreach.pick(numbers, here).to(device))
    else:
        foreach.scale(held, numbers)


def scale_units(parameters: Sequence[Tensor], coefficients: Tensor, counts: Sequence[int], dim: int) -> None:
    """Multiply each unit by its coefficient; arguments as in ``host.scale_units``, on an accelerator."""
    gradients = [own(parameter) for parameter in parameters]
    # What a sparse gradient stores does not lie unit by unit.
    is_strided = all(gradient is None or gradient.layout == torch.strided for gradient in gradients)
    entries = [None if gradient is None else entries_to_scale(gradient) for gradient in gradients]
    if is_strided and triton_host.scale_units(entries, coefficients, counts, dim):
        return
    miss()
    parts = coefficients.split(list(counts))
    strided: list[tuple[Tensor, Tensor, int]] = []
    for gradient, own_entries, part, count in zip(gradients, entries, parts, counts, strict=True):
        if gradient is None or own_entries is None:
            continue
        if gradient.layout == torch.strided and gradient.dim() == own_entries.dim():
            strided.append((own_entries, part, count))
        else:
            factors = part.to(own_entries.device, torch.promote_types(own_entries.dtype, torch.float32))
            own_entries.mul_(over_units(factors, gradient, own_entries.dim(), dim))
    if strided:
        foreach.scale_units(
            [one for one, _, _ in strided],
            torch.cat([part for _, part, _ in strided]),
            [n for _, _, n in strided],
            dim,
        )


def clamp(parameters: Sequence[Tensor], limits: tuple[float, float], peaks: Tensor | None = None) -> None:
    """Clamp every entry of every gradient into ``limits``; NaN stays.

    With ``peaks`` [n, 2], the lowest and highest entries, a gradient within the limits may be passed over.
    """
    entries: list[Tensor | None] = []
    for parameter in parameters:
        gradient = own(parameter)
        if gradient is not None and gradient.layout == torch.sparse_coo:
            parameter.grad = gradient = gradient.coalesce()
        entries.append(None if gradient is None else entries_to_scale(gradient))
    if not triton_host.clamp(entries, *limits, peaks):
        miss()
        foreach.clamp([entry for entry in entries if entry is not None], *limits)


def own(parameter: Tensor) -> Tensor | None:
    """The gradient, copied first if it cannot be written to, as an expanded one or a conjugate view."""
    gradient = parameter.grad
    if gradient is not None and is_only_a_view(gradient):
        parameter.grad = gradient = gradient.clone(memory_format=torch.contiguous_format)
    return gradient


def separate(parameters: Sequence[Tensor]) -> None:
    """Copy gradients that lie where another parameter's does, so that none is multiplied twice.

    ``torch.autograd.grad`` may give one tensor for several parameters, and views of one tensor.
    """
    held = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    try:
        if are_plain(held) and len(set(map(Tensor.data_ptr, held))) == len(held):
            return
    except RuntimeError:  # a tensor without an address of its own, such as a sparse one
        pass
    seen = set[int]()
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            place = _place(gradient)
            if place in seen:
                parameter.grad = gradient.clone()
            seen.add(place)


def _place(gradient: Tensor) -> int:
    """Where the entries begin in memory; the tensor's own identity where it has none, or nothing in it."""
    entries = entries_to_scale(gradient)
    return entries.data_ptr() or id(gradient) if are_plain([entries]) else id(gradient)


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
