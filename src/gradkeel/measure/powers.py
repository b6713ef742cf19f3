"""Norms of local tensors are exact to float64's last digits but for the rounding of 4096-entry blocks.

On CPU the native kernels read where they are in use, torch's own operations elsewhere; the choice is made here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gradkeel.kernels import foreach, native
from gradkeel.kernels.native import Read
from gradkeel.measure import device as accelerator
from gradkeel.tensors import entries_by_position, entries_to_read

BLOCK = 4096
"""Entries that torch's own kernel may sum in float32; longer sums are made of such blocks, in float64."""

_HOST = torch.device("cpu")

# Squares of float32 entries overflow above 1.8e19 and lose digits below 1e-19; norms outside this range are redone.
_SAFE = {torch.float64: (1e-140, 1e150)}
_SAFE_FLOAT32 = (1e-15, 1e18)


def read(
    tensors: Sequence[Tensor],
    norm_type: float,
    device: torch.device,
    *,
    unit_dim: int | None = None,
    with_peaks: bool = False,
) -> Read:
    """Return norms of tensors of any layout, and those of the units along ``unit_dim`` and the peaks where asked for.

    A tensor whose entries are all finite has finite norms; a NaN or inf entry gives NaN or inf. On an accelerator all
    sums are float64 to begin with, and the host is not synced.
    """
    kernels = native.kernels() if device == _HOST and norm_type in native.NORMS else None
    if kernels is not None:
        reading = _native_reading(kernels, tensors, norm_type, unit_dim=unit_dim, with_peaks=with_peaks)
        if reading is not None:
            return reading
    entries = [entries_to_read(tensor) for tensor in tensors]
    placed: Sequence[Tensor] = entries
    if unit_dim is not None and any(tensor.layout != torch.strided for tensor in tensors):
        placed = [entries_by_position(tensor) for tensor in tensors]
    if unit_dim is not None and any(map(torch.is_complex, tensors)):
        # A vector is one unit, and its real and imaginary parts are a matrix.
        placed = [
            own.flatten() if whole.dim() <= 1 else own for own, whole in zip(placed, tensors, strict=True)
        ]
    return _reading(entries, placed, norm_type, device, unit_dim=unit_dim, with_peaks=with_peaks)


def _reading(
    entries: Sequence[Tensor],
    placed: Sequence[Tensor],
    norm_type: float,
    device: torch.device,
    *,
    unit_dim: int | None,
    with_peaks: bool,
) -> Read:
    """Read real strided tensors by torch's operations and Triton's kernels.

    ``placed`` has each entry at its place: units are cut of these. CPU-offloaded tensors may stand beside those on an
    accelerator: each device reads its own.
    """
    wide = wide_dtype(device)
    if not entries:
        nothing = torch.zeros(0, dtype=wide, device=device)
        units = nothing if unit_dim is not None else None
        return Read(nothing, None, units, nothing.view(0, 2) if with_peaks else None)
    places: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(entries):
        places.setdefault(tensor.device, []).append(i)
    found: list[list[Tensor]] = []
    total: Tensor | float | None = None
    for kind, rows in places.items():
        chosen, cut = [entries[i] for i in rows], [placed[i] for i in rows]
        if kind.type == "cpu":
            read_here: _ReadHere = _cpu_reading
        else:
            read_here = partial(accelerator.read, wide=wide_dtype(kind))
        own = read_here(chosen, norm_type, unit_dim=unit_dim if placed is entries else None, peaks=with_peaks)
        if placed is not entries:
            own = replace(own, units=read_here(cut, norm_type, unit_dim=unit_dim, peaks=False).units)
        total = own.total if len(places) == 1 else None
        held = (own.norms, own.units, own.peaks)
        # To the host only when it is there: nobody would wait for it.
        is_late = device.type != "cpu"
        found.append([one.to(device, wide, non_blocking=is_late) for one in held if one is not None])
    order = list(places.values())
    norms = foreach.in_order(order, [own[0] for own in found])
    units = None
    if unit_dim is not None:
        units = _units_in_order(order, [own[1] for own in found], placed, unit_dim)
    peaks = foreach.in_order(order, [own[-1] for own in found]) if with_peaks else None
    return Read(norms, total, units, peaks)


_ReadHere = Callable[..., Read]


def _units_in_order(
    order: Sequence[Sequence[int]], units: Sequence[Tensor], tensors: Sequence[Tensor], dim: int
) -> Tensor:
    if len(units) == 1:
        return units[0]
    parts = [units[0]] * len(tensors)
    for rows, own in zip(order, units, strict=True):
        counts = [unit_count(tensors[i].shape, dim) for i in rows]
        for i, part in zip(rows, own.split(counts), strict=True):
            parts[i] = part
    return torch.cat(parts)


def tensor_norms(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Return [k] the norm of each tensor: `read` for norms alone."""
    return read(tensors, norm_type, device).norms


def unit_count(shape: Sequence[int], dim: int) -> int:
    """Count the units of a tensor of this shape: its size along ``dim``, or 1 with at most one dimension."""
    return 1 if len(shape) <= 1 else shape[dim]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which norms are combined: float64, or float32 on devices that have no float64."""
    has_it = device.type != "mps"
    if device.type == "xpu":  # graphics cards of its first generation have not
        has_it = torch.xpu.get_device_properties(device).has_fp64
    return torch.float64 if has_it else torch.float32


def _native_reading(
    kernels: native.Kernels,
    tensors: Sequence[Tensor],
    norm_type: float,
    *,
    unit_dim: int | None,
    with_peaks: bool,
) -> Read | None:
    """Read by the native kernels; None where one of the tensors is not for them."""
    if unit_dim is None and not with_peaks:
        if (found := kernels.norms(list(tensors), norm_type)) is not None:
            return found
        found = kernels.norms([entries_to_read(tensor) for tensor in tensors], norm_type)
        return None if found is None else Read(found.norms, found.total)
    # What sparse, complex and sharded tensors hold is dense, but not cut into units as they are.
    table = kernels.table(tensors, unit_dim, otherwise=entries_to_read if unit_dim is None else None)
    if table is None or (with_peaks and any(map(Tensor.is_neg, table.tensors))):
        return None
    return kernels.read(table, norm_type, units=unit_dim is not None, peaks=with_peaks)


def _cpu_reading(tensors: Sequence[Tensor], norm_type: float, *, unit_dim: int | None, peaks: bool) -> Read:
    units = extremes = None
    if unit_dim is not None:
        units = torch.cat(
            [unit_norms(t, unit_count(t.shape, unit_dim), unit_dim, norm_type) for t in tensors]
        )
    if peaks:
        nothing = torch.zeros(2, dtype=torch.float64, device="cpu")
        pairs = [torch.stack(torch.aminmax(t)).double() if t.numel() else nothing for t in tensors]
        extremes = torch.stack(pairs)
    return Read(_cpu_norms(tensors, norm_type), None, units, extremes)


def _cpu_norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return [k] float64 norms of CPU tensors: long ones by blocks, the rest in one foreach call a dtype."""
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
    """Return all entries as a flat tensor, without a copy where they lie densely in memory in another order."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return tensor.permute(order).reshape(-1)


def _redone(norms: Tensor, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Compute norms outside the safe range of their sums again in float64, relative to what counts most.

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


def unit_norms(tensor: Tensor, units: int, dim: int, norm_type: float) -> Tensor:
    """Return [units] the float64 norm of each slice along ``dim`` of a CPU tensor; ``units == 1`` takes it as one."""
    rows = tensor.reshape(1, -1) if units == 1 else tensor.movedim(dim, 0).flatten(1)
    if tensor.dtype == torch.float64 or rows.shape[1] > BLOCK or not rows.numel():
        return foreach.row_norms(rows, norm_type, torch.float64)
    norms = torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=torch.float32)
    low, high = _SAFE_FLOAT32
    if ((norms > low) & (norms < high)).all():
        return norms.double()
    return torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=torch.float64)
