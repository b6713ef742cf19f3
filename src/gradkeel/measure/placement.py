"""Where a gradient's entries lie: the one place that knows sparse, complex and distributed tensors."""

import torch
from torch import Tensor


def entries_to_read(gradient: Tensor) -> Tensor:
    """The gradient's entries on this rank as a real strided tensor; the sum over duplicate indices where sparse.

    Shares memory with the gradient except where an uncoalesced sparse gradient must be summed first.
    """
    local = _local(gradient.detach())
    if local.layout != torch.strided:
        local = local.coalesce().values() if local.layout == torch.sparse_coo else local.values()
    return _real(local)


def entries_to_scale(gradient: Tensor) -> Tensor:
    """The entries as they are stored, to be multiplied in place: real, strided, sharing the gradient's memory."""
    local = _local(gradient.detach())
    if local.layout != torch.strided:
        local = local._values() if local.layout == torch.sparse_coo else local.values()
    return _real(local)


def entries_by_position(tensor: Tensor) -> Tensor:
    """The entries on this rank as a real strided tensor in which each stands at its place: sparse ones made dense."""
    return entries_to_read(tensor.detach().to_dense() if tensor.layout != torch.strided else tensor)


def _local(tensor: Tensor) -> Tensor:
    return tensor


def _real(tensor: Tensor) -> Tensor:
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor.resolve_conj())
