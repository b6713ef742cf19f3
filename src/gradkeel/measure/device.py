"""This module reads tensors on one accelerator, in float64 and without a sync of the host."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradkeel.kernels import foreach, triton_host
from gradkeel.kernels.addresses import miss
from gradkeel.kernels.native import Read


def read(
    tensors: Sequence[Tensor], norm_type: float, *, wide: torch.dtype, unit_dim: int | None, peaks: bool
) -> Read:
    """Return norms of the tensors, those of their units along ``unit_dim``, and extremes, where wanted.

    A tensor with at most one dimension is one unit.
    """
    found = triton_host.read(tensors, norm_type, unit_dim, peaks=peaks)
    if found is None and unit_dim is not None:  # units that do not lie one after the other
        found = triton_host.read(tensors, norm_type, peaks=peaks)
    if found is None:
        miss()
        extremes = foreach.peaks(tensors, wide) if peaks else None
        found = Read(foreach.norms(tensors, norm_type, wide), peaks=extremes)
    if found.units is None and unit_dim is not None:
        miss()
        found = replace(found, units=_units(tensors, norm_type, found.norms, unit_dim))
    return found


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
