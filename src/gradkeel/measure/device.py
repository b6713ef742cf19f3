"""What is read of tensors on one accelerator, in float64 and without a sync of the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import foreach, triton_host


def device_norms(tensors: Sequence[Tensor], norm_type: float, wide: torch.dtype) -> Tensor:
    """[k] norms of the tensors."""
    found = triton_host.norms(tensors, norm_type)
    return foreach.norms(tensors, norm_type, wide) if found is None else found


def device_units(tensors: Sequence[Tensor], norm_type: float, norms: Tensor, dim: int) -> Tensor:
    """[u] norms of the tensors' units along ``dim``, tensor after tensor.

    Args:
        tensors: in which each entry stands at its place.
        norm_type: the p of the p-norm.
        norms: [k] norms of the tensors themselves, which are those of the ones with a single unit.
        dim: the dimension that counts units, of a tensor with more than one.
    """
    cut = [i for i, tensor in enumerate(tensors) if tensor.dim() > 1]
    found = norms.new_zeros(0)
    if cut:
        chosen = [tensors[i] for i in cut]
        given = triton_host.unit_norms(chosen, norm_type, dim)
        found = foreach.unit_norms(chosen, norm_type, norms.dtype, dim) if given is None else given
    if len(cut) == len(tensors):
        return found
    parts = list(norms.split(1))
    for i, own in zip(cut, found.split([tensors[i].shape[dim] for i in cut]), strict=True):
        parts[i] = own
    return torch.cat(parts) if parts else found
