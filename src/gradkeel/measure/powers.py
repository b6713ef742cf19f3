"""Norms of local tensors, exact to float64's last digits but for the rounding of 4096-entry blocks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 4096
"""Entries that torch's own kernel may sum in float32; longer sums are made of such blocks, in float64."""

# Squares of float32 entries overflow above 1.8e19 and lose digits below 1e-19; norms outside this range are redone.
_SAFE = {torch.float64: (1e-140, 1e150)}
_SAFE_FLOAT32 = (1e-15, 1e18)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which norms are combined: float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def tensor_norms(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """[k] norm of each real strided tensor, in float64 on ``device``.

    A tensor whose entries are all finite has a finite norm; a NaN or inf entry gives NaN or inf. On CPU a norm whose
    squares left float32's range is computed again in float64; on an accelerator all sums are float64 to begin with,
    and the host is not synced.
    """
    wide = wide_dtype(device)
    if not tensors:
        return torch.zeros(0, dtype=wide, device=device)
    if device.type == "cpu":
        return _cpu_norms(tensors, norm_type)
    # One foreach call a device; CPU-offloaded tensors may stand beside those on the accelerator.
    result = torch.zeros(len(tensors), dtype=wide, device=device)
    for kind in {tensor.device for tensor in tensors}:
        here = [i for i, tensor in enumerate(tensors) if tensor.device == kind]
        chosen = [tensors[i] for i in here]
        if kind.type == "cpu":
            values = _cpu_norms(chosen, norm_type).to(device, non_blocking=True)
        else:
            norms = [n for n in torch._foreach_norm([_filled(t) for t in chosen], norm_type, dtype=wide)]
            values = torch.stack(norms).to(device, non_blocking=True)
        if len(here) == len(tensors):
            return values
        result[here] = values
    return result


def _filled(tensor: Tensor) -> Tensor:
    # Some norms of an empty tensor are undefined in torch; that of a zero is 0.
    return tensor if tensor.numel() else tensor.new_zeros(1)


def _cpu_norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """[k] float64 norms of CPU tensors: long ones by blocks, the rest in one foreach call a dtype."""
    result = torch.zeros(len(tensors), dtype=torch.float64)
    short: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel() > BLOCK and norm_type > 0 and not math.isinf(norm_type) and tensor.dtype != torch.float64:
            result[i] = _blocked_norm(tensor, norm_type)
        elif tensor.numel():
            short.setdefault(tensor.dtype, []).append(i)
    for dtype, indices in short.items():
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch._foreach_norm([tensors[i] for i in indices], norm_type, dtype=sum_dtype)
        values = torch.stack(list(norms)).double()
        if len(indices) == len(tensors):
            result = values
        else:
            result[indices] = values
    return _redone(result, tensors, norm_type)


def _blocked_norm(tensor: Tensor, norm_type: float) -> Tensor:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else _storage_order(tensor)
    whole = flat.numel() // BLOCK * BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), norm_type, dim=1, dtype=torch.float32)
    blocks = blocks.double()
    if whole < flat.numel():
        tail = torch.linalg.vector_norm(flat[whole:], norm_type, dtype=torch.float32)
        blocks = torch.cat([blocks, tail.double().reshape(1)])
    return torch.linalg.vector_norm(blocks, norm_type)


def _storage_order(tensor: Tensor) -> Tensor:
    """All entries as a flat tensor, without a copy where they lie densely in memory in another order."""
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    permuted = tensor.permute(order)
    return permuted.reshape(-1)


def _redone(norms: Tensor, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Norms with those outside the safe range of their sums computed again in float64, relative to max |g|."""
    if norm_type <= 0 or math.isinf(norm_type):
        return norms
    # Powers above 2 leave the range sooner.
    power = max(norm_type, 2.0) / 2.0
    for i, norm in enumerate(norms.tolist()):
        low, high = _SAFE.get(tensors[i].dtype, _SAFE_FLOAT32)
        if low ** (1 / power) <= norm <= high ** (1 / power) or not tensors[i].numel():
            continue
        largest = tensors[i].abs().amax().double()
        if largest == 0 or not torch.isfinite(largest):
            norms[i] = largest  # zero, inf, or NaN, which amax passes on
        else:
            norms[i] = torch.linalg.vector_norm(tensors[i].double() / largest, norm_type) * largest
    return norms


def unit_norms(tensor: Tensor, units: int, dim: int, norm_type: float) -> Tensor:
    """[units] norm of each slice along ``dim``, in float64; ``units == 1`` takes the tensor as one unit."""
    rows = tensor.reshape(1, -1) if units == 1 else tensor.movedim(dim, 0).flatten(1)
    wide = wide_dtype(tensor.device)
    if tensor.device.type != "cpu" or tensor.dtype == torch.float64 or rows.shape[1] > BLOCK:
        return torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=wide)
    norms = torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=torch.float32)
    low, high = _SAFE_FLOAT32
    if ((norms > low) & (norms < high)).all():
        return norms.double()
    return torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=torch.float64)


def unit_count(shape: Sequence[int], dim: int) -> int:
    """How many units a tensor of this shape has: its size along ``dim``, or 1 with at most one dimension."""
    return 1 if len(shape) <= 1 else shape[dim]


def peaks(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """[k, 2] lowest and highest entry of each real strided tensor, in float64 on ``device``; 0, 0 for an empty one."""
    pairs = [
        torch.stack(torch.aminmax(tensor)).to(device, wide_dtype(device))
        if tensor.numel()
        else torch.zeros(2, dtype=wide_dtype(device), device=device)
        for tensor in tensors
    ]
    return torch.stack(pairs) if pairs else torch.zeros(0, 2, dtype=wide_dtype(device), device=device)
