"""Norms of local tensors, exact to float64's last digits but for the rounding of 4096-entry blocks.

On CPU the native kernels read where they are in use, torch's own operations elsewhere; the choice is made here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.kernels import foreach, native
from gradkeel.measure.device import device_norms, device_units
from gradkeel.tensors import entries_by_position, entries_to_read

BLOCK = 4096
"""Entries that torch's own kernel may sum in float32; longer sums are made of such blocks, in float64."""

# Squares of float32 entries overflow above 1.8e19 and lose digits below 1e-19; norms outside this range are redone.
_SAFE = {torch.float64: (1e-140, 1e150)}
_SAFE_FLOAT32 = (1e-15, 1e18)


@dataclass(slots=True, eq=False)
class Reading:
    """What one read of k tensors gave, in float64 (float32 on devices without it).

    Attributes:
        norms: [k] norm of each tensor.
        units: [u] norm of each unit, tensor after tensor, where asked for.
        peaks: [k, 2] each tensor's lowest and highest entry, where asked for; 0, 0 for an empty one.
        total: norm of all of them together, where the host knows it already.
    """

    norms: Tensor
    units: Tensor | None = None
    peaks: Tensor | None = None
    total: float | None = None


def read(
    tensors: Sequence[Tensor],
    norm_type: float,
    device: torch.device,
    *,
    unit_dim: int | None = None,
    with_peaks: bool = False,
) -> Reading:
    """Norms of tensors of any layout, and those of the units along ``unit_dim`` and the peaks where asked for.

    A tensor whose entries are all finite has finite norms; a NaN or inf entry gives NaN or inf. On an accelerator all
    sums are float64 to begin with, and the host is not synced.
    """
    kernels = native.kernels() if device.type == "cpu" and native.has_norm(norm_type) else None
    if kernels is not None:
        reading = _native_reading(kernels, tensors, norm_type, unit_dim=unit_dim, with_peaks=with_peaks)
        if reading is not None:
            return reading
    entries = [entries_to_read(tensor) for tensor in tensors]
    norms = _norms(entries, norm_type, device)
    return Reading(
        norms,
        None if unit_dim is None else _units(tensors, norms, norm_type, unit_dim),
        peaks(entries, device) if with_peaks else None,
    )


def tensor_norms(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """[k] norm of each tensor: `read` for norms alone."""
    return read(tensors, norm_type, device).norms


def unit_count(shape: Sequence[int], dim: int) -> int:
    """How many units a tensor of this shape has: its size along ``dim``, or 1 with at most one dimension."""
    return 1 if len(shape) <= 1 else shape[dim]


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which norms are combined: float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _native_reading(
    kernels: native.Kernels,
    tensors: Sequence[Tensor],
    norm_type: float,
    *,
    unit_dim: int | None,
    with_peaks: bool,
) -> Reading | None:
    """The same by the native kernels; None where one of the tensors is not for them."""
    if unit_dim is None and not with_peaks:
        found = kernels.norms(list(tensors), norm_type) or kernels.norms(
            [entries_to_read(tensor) for tensor in tensors], norm_type
        )
        return None if found is None else Reading(found[0], total=found[1])
    # What sparse, complex and sharded tensors hold is dense, but not cut into units as they are.
    table = kernels.table(tensors, unit_dim, otherwise=entries_to_read if unit_dim is None else None)
    if table is None or (with_peaks and any(map(Tensor.is_neg, table.tensors))):
        return None
    return Reading(*kernels.read(table, norm_type, units=unit_dim is not None, peaks=with_peaks))


def _norms(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """[k] norm of each real strided tensor by torch's operations; on CPU those that left float32's range are redone."""
    wide = wide_dtype(device)
    if not tensors:
        return torch.zeros(0, dtype=wide, device=device)
    if device.type == "cpu":
        return _cpu_norms(tensors, norm_type)
    # CPU-offloaded tensors may stand beside those on the accelerator.
    places = _by_device(tensors)
    found = []
    for kind, rows in places.items():
        chosen = [tensors[i] for i in rows]
        values = (
            _cpu_norms(chosen, norm_type) if kind.type == "cpu" else device_norms(chosen, norm_type, wide)
        )
        found.append(values.to(device, wide, non_blocking=True))
    return foreach.in_order(list(places.values()), found)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    places: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(i)
    return places


def _cpu_norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """[k] float64 norms of CPU tensors: long ones by blocks, the rest in one foreach call a dtype."""
    result = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    short: dict[torch.dtype, list[int]] = {}
    # Other powers are rare, and their float32 sums lose more; they are summed in float64 throughout, which is slow.
    usual = norm_type in (1.0, 2.0)
    for i, tensor in enumerate(tensors):
        if tensor.numel() > BLOCK and usual and tensor.dtype != torch.float64:
            result[i] = _blocked_norm(tensor, norm_type)
        elif tensor.numel():
            short.setdefault(tensor.dtype, []).append(i)
    for dtype, indices in short.items():
        narrow = dtype != torch.float64 and (usual or math.isinf(norm_type))
        sum_dtype = torch.float32 if narrow else torch.float64
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
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return tensor.permute(order).reshape(-1)


def _redone(norms: Tensor, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Norms with those outside the safe range of their sums computed again in float64, relative to what counts most.

    That is max |g|, and min |g| for a negative order.
    """
    if norm_type == 0 or math.isinf(norm_type):
        return norms
    # Powers above 2 leave the range sooner.
    power = max(abs(norm_type), 2.0) / 2.0
    for i, norm in enumerate(norms.tolist()):
        low, high = _SAFE.get(tensors[i].dtype, _SAFE_FLOAT32)
        if low ** (1 / power) <= norm <= high ** (1 / power) or not tensors[i].numel():
            continue
        magnitudes = tensors[i].abs()
        most = (magnitudes.amax() if norm_type > 0 else magnitudes.amin()).double()
        if most == 0 or not torch.isfinite(most):
            norms[i] = most  # zero, inf, or NaN, which both pass on
        else:
            norms[i] = torch.linalg.vector_norm(tensors[i].double() / most, norm_type) * most
    return norms


def _units(tensors: Sequence[Tensor], norms: Tensor, norm_type: float, dim: int) -> Tensor:
    """[u] norm of each unit by torch's operations, tensor after tensor; ``norms`` [k] are those of the tensors."""
    placed = [entries_by_position(tensor) for tensor in tensors]
    device = norms.device
    parts = [torch.zeros(0, dtype=norms.dtype, device=device)] * len(placed)
    for kind, rows in _by_device(placed).items():
        chosen, counts = [placed[i] for i in rows], [unit_count(placed[i].shape, dim) for i in rows]
        if kind.type == "cpu":
            own = [unit_norms(t, n, dim, norm_type).to(norms) for t, n in zip(chosen, counts, strict=True)]
        else:
            found = device_units(chosen, norm_type, foreach.pick(norms, rows).to(kind), dim)
            own = list(found.to(device, non_blocking=True).split(counts))
        for i, part in zip(rows, own, strict=True):
            parts[i] = part
    return torch.cat(parts) if parts else torch.zeros(0, dtype=norms.dtype, device=device)


def unit_norms(tensor: Tensor, units: int, dim: int, norm_type: float) -> Tensor:
    """[units] float64 norm of each slice along ``dim`` of a CPU tensor; ``units == 1`` takes it as one unit."""
    rows = tensor.reshape(1, -1) if units == 1 else tensor.movedim(dim, 0).flatten(1)
    if tensor.dtype == torch.float64 or rows.shape[1] > BLOCK or not rows.numel():
        return foreach.row_norms(rows, norm_type, torch.float64)
    norms = torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=torch.float32)
    low, high = _SAFE_FLOAT32
    if ((norms > low) & (norms < high)).all():
        return norms.double()
    return torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=torch.float64)


def peaks(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """[k, 2] lowest and highest entry of each real strided tensor, in float64 on ``device``; 0, 0 for an empty one."""
    if not tensors:
        return torch.zeros(0, 2, dtype=wide_dtype(device), device=device)
    places = _by_device(tensors)
    found = []
    for kind, rows in places.items():
        chosen = [tensors[i] for i in rows]
        values = _cpu_peaks(chosen) if kind.type == "cpu" else foreach.peaks(chosen, wide_dtype(kind))
        found.append(values.to(device, wide_dtype(device), non_blocking=True))
    return foreach.in_order(list(places.values()), found)


def _cpu_peaks(tensors: Sequence[Tensor]) -> Tensor:
    nothing = torch.zeros(2, dtype=torch.float64, device="cpu")
    pairs = [torch.stack(torch.aminmax(t)).double() if t.numel() else nothing for t in tensors]
    return torch.stack(pairs)
