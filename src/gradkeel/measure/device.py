"""What is read of tensors on one accelerator, in float64 and without a sync of the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import foreach, triton_host


def read(
    tensors: Sequence[Tensor], norm_type: float, *, wide: torch.dtype, unit_dim: int | None, peaks: bool
) -> triton_host.Read:
    """[k] norms of the tensors; [u] those of their units along ``unit_dim`` and [k, 2] extremes, where wanted.

    A tensor with at most one dimension is one unit.
    """
    found = triton_host.read(tensors, norm_type, unit_dim, peaks=peaks)
    if found is None and unit_dim is not None:  # units that do not lie one after the other
        found = triton_host.read(tensors, norm_type, peaks=peaks)
    if found is None:
        extremes = foreach.peaks(tensors, wide) if peaks else None
        found = foreach.norms(tensors, norm_type, wide), None, extremes
    norms, units, extremes = found
    if units is None and unit_dim is not None:
        units = _units(tensors, norm_type, norms, unit_dim)
    return norms, units, extremes


def _units(tensors: Sequence[Tensor], norm_type: float, norms: Tensor, dim: int) -> Tensor:
    cut = [i for i, tensor in enumerate(tensors) if tensor.dim() > 1]
    if not cut:
        return norms
    found = foreach.unit_norms([tensors[i] for i in cut], norm_type, norms.dtype, dim)
    if len(cut) == len(tensors):
        return found
    parts = list(norms.split(1))
    for i, own in zip(cut, found.split([tensors[i].shape[dim] for i in cut]), strict=True):
        parts[i] = own
    return torch.cat(parts)
