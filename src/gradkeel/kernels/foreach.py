"""torch's own operations on many tensors of accelerators at once: what is done where no kernel of Triton's is in use.

How many operations are launched depends on what kinds of tensors there are and on how many entries, not on how many
tensors. The host is not synced, but for lists of sizes that are sent to the device once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkeel.norms import index, take
from gradkeel.tensors import is_dense, limits_of

BUCKET = 1 << 24
"""Entries that are copied at once, in float32 or float64, where an operation needs a copy."""


def norms(tensors: Sequence[Tensor], norm_type: float, wide: torch.dtype) -> Tensor:
    """[k] norms of the tensors of one accelerator, summed in ``wide``."""
    groups = alike(tensors)
    found: list[Tensor] = []
    for (_, dtype), rows in groups.items():
        members = [_filled(tensors[i]) for i in rows]
        if dtype == torch.float64 and norm_type > 0 and not math.isinf(norm_type):
            found.append(_scaled_norms(members, norm_type))
        else:
            found.append(torch.stack(list(torch._foreach_norm(members, norm_type, dtype=wide))))
    return in_order(list(groups.values()), found)


def _scaled_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """[k] the same for float64 tensors, whose powers leave even float64's range, so that they are relative to max |g|.

    At any rate: looking whether that is necessary would sync the host.
    """
    scales = _scales(torch.stack(list(torch._foreach_norm(tensors, math.inf))))
    found: list[Tensor] = []
    for start, end in buckets(tensors):
        chosen = tensors[start:end]
        divided = torch._foreach_div(chosen, spread(scales.narrow(0, start, end - start), chosen))
        found += torch._foreach_norm(divided, norm_type)
    return torch.stack(found) * scales


def _scales(largest: Tensor) -> Tensor:
    return torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))


def unit_norms(tensors: Sequence[Tensor], norm_type: float, wide: torch.dtype, dim: int) -> Tensor:
    """[u] norm of each slice along ``dim`` of tensors of one accelerator, of two dimensions or more.

    One reduction for each shape of a slice that occurs.
    """
    moved = [tensor.movedim(dim, 0) for tensor in tensors]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, rows in enumerate(moved):
        groups.setdefault((rows.dtype, rows.shape[1:]), []).append(i)
    found = [torch.zeros(0, dtype=wide, device="cpu")] * len(moved)
    for members in groups.values():
        for start, end in buckets([moved[i] for i in members]):
            part = members[start:end]
            rows = moved[part[0]] if len(part) == 1 else torch.cat([moved[i] for i in part])
            values = row_norms(rows, norm_type, wide)
            for i, own in zip(part, values.split([len(moved[i]) for i in part]), strict=True):
                found[i] = own
    return torch.cat(found)


def row_norms(rows: Tensor, norm_type: float, wide: torch.dtype) -> Tensor:
    """Norm of each slice along the first dimension, summed in ``wide``; does not sync the host."""
    dims = list(range(1, rows.dim()))
    if rows.numel() == 0:  # some norms of nothing are undefined in torch
        return torch.zeros(len(rows), dtype=wide, device=rows.device)
    if rows.dtype != torch.float64 or norm_type <= 0 or math.isinf(norm_type):
        return torch.linalg.vector_norm(rows, norm_type, dim=dims, dtype=wide)
    scales = _scales(torch.linalg.vector_norm(rows, math.inf, dim=dims, keepdim=True))
    return torch.linalg.vector_norm(rows / scales, norm_type, dim=dims) * scales.flatten()


def peaks(tensors: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """[k, 2] lowest and highest entry of each tensor of one accelerator; 0, 0 for an empty one."""
    groups = alike(tensors)
    found = []
    for rows in groups.values():
        members = [_filled(tensors[i]) for i in rows]
        lowest: list[Tensor] = []
        for start, end in buckets(members):
            lowest += torch._foreach_max(torch._foreach_neg(members[start:end]))
        highest = torch.stack(list(torch._foreach_max(members)))
        found.append(torch.stack([-torch.stack(lowest), highest], dim=1).to(wide))
    return in_order(list(groups.values()), found)


def scale(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply the tensors by ``factors``, [] or [k] one each, in place.

    Each product is made in float32, or in float64 where the tensor is, and rounded once.
    """
    for (device, dtype), rows in alike(tensors).items():
        members = [tensors[i] for i in rows]
        numbers = pick(factors, rows).to(device, torch.promote_types(dtype, torch.float32))
        if numbers.dim() == 0 and numbers.dtype == dtype:
            torch._foreach_mul_(members, numbers)
            continue
        for start, end in buckets(members):
            chosen = members[start:end]
            if len(chosen) == 1:
                # With as many dimensions as the tensor has it promotes; one without would be rounded first.
                number = numbers if numbers.dim() == 0 else numbers.select(0, start)
                chosen[0].mul_(number.reshape((1,) * chosen[0].dim()))
            elif numbers.dim() == 0:
                _multiply(chosen, numbers)
            else:
                _multiply(chosen, spread(numbers.narrow(0, start, end - start), chosen))


def scale_units(tensors: Sequence[Tensor], factors: Tensor, counts: Sequence[int], dim: int) -> None:
    """Multiply each unit of strided tensors by its factor, [u] tensor after tensor, in place.

    ``counts``: how many units along ``dim`` each tensor has; one with at most one dimension has 1.
    """
    for (device, dtype), rows in alike(tensors).items():
        members, own = [tensors[i] for i in rows], [counts[i] for i in rows]
        parts = factors.split(list(counts))
        wide = torch.promote_types(dtype, torch.float32)
        for start, end in buckets(members):
            chosen = members[start:end]
            numbers = torch.cat([parts[i] for i in rows[start:end]]).to(device, wide)
            if len(chosen) == 1:
                shape = [1] * chosen[0].dim()
                if chosen[0].dim() > 1:
                    shape[dim] = own[start]
                chosen[0].mul_(numbers.reshape(shape))
            else:
                _multiply(chosen, _spread_units(numbers, chosen, own[start:end], dim))


def _multiply(tensors: list[Tensor], factors: Any) -> None:
    """Multiply tensors of one dtype by factors of another, one or a list, at least as wide, and round once."""
    wide = factors.dtype if isinstance(factors, Tensor) else factors[0].dtype
    if tensors[0].dtype == wide:
        torch._foreach_mul_(tensors, factors)
        return
    copies = [torch.empty_like(tensor, dtype=wide) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    torch._foreach_mul_(copies, factors)
    torch._foreach_copy_(tensors, copies)


def clamp(tensors: Sequence[Tensor], low: float, high: float) -> None:
    """Clamp every entry into ``[low, high]``, in place; NaN stays."""
    for rows in alike(tensors).values():
        members = [tensors[i] for i in rows]
        least, most = limits_of(members[0].dtype, low, high)
        torch._foreach_clamp_min_(members, least)
        torch._foreach_clamp_max_(members, most)


def spread(values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each of the [k] values as a tensor that lies as the tensor of its index does, all in one piece of memory."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = values.repeat_interleave(index(sizes, values.device), output_size=sum(sizes))
    return [
        part.view(tensor.shape)
        if tensor.is_contiguous() or not is_dense(tensor)
        else part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
        for part, tensor in zip(flat.split(sizes), tensors, strict=True)
    ]


def _spread_units(values: Tensor, tensors: Sequence[Tensor], counts: Sequence[int], dim: int) -> list[Tensor]:
    """The same of the values of units."""
    sizes = [tensor.numel() for tensor in tensors]
    of_unit = index([size // max(1, n) for size, n in zip(sizes, counts, strict=True)], values.device)
    repeats = of_unit.repeat_interleave(index(counts, values.device), output_size=len(values))
    flat = values.repeat_interleave(repeats, output_size=sum(sizes))
    return [
        part.view(tensor.movedim(dim, 0).shape).movedim(0, dim)
        if tensor.dim() > 1
        else part.view(tensor.shape)
        for part, tensor in zip(flat.split(sizes), tensors, strict=True)
    ]


def alike(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Which tensors are of one device and dtype: foreach operations take no others together."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    return groups


def buckets(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """First and last index but one of each run of tensors that have ``BUCKET`` entries together, or are one."""
    start = size = 0
    for i, tensor in enumerate(tensors):
        if size + tensor.numel() > BUCKET and i > start:
            yield start, i
            start, size = i, 0
        size += tensor.numel()
    if start < len(tensors):
        yield start, len(tensors)


def in_order(rows: Sequence[Sequence[int]], values: Sequence[Tensor]) -> Tensor:
    """[k, ...] values of the rows in the rows' order, from those of each group."""
    if len(values) == 1:
        return values[0]
    order = [i for group in rows for i in group]
    place = {row: i for i, row in enumerate(order)}
    return take(torch.cat(list(values)), [place[i] for i in range(len(order))])


def pick(values: Tensor, rows: Sequence[int]) -> Tensor:
    """``values[rows]`` of [n] values, without a sync after the first time; a [] one is for all rows."""
    if values.dim() == 0 or (len(rows) == len(values) and list(rows) == list(range(len(rows)))):
        return values
    return take(values, rows)


def _filled(tensor: Tensor) -> Tensor:
    # Some norms of an empty tensor are undefined in torch; that of a zero is 0.
    return tensor if tensor.numel() else tensor.new_zeros(1)
