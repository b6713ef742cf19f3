"""Where a gradient's entries lie: the one place that knows sparse, complex and distributed tensors."""

import ctypes
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

_PLAIN = {Tensor, nn.Parameter}


def is_quantized(parameter: Tensor) -> bool:
    """Whether these are integers or float8, as a frozen base model under adapters has them: codes without a norm."""
    return parameter.itemsize == 1 or not (parameter.is_floating_point() or parameter.is_complex())


def without_codes(parameter: Tensor) -> Tensor:
    """The parameter; of a quantized one zeros of its shape, which take no memory."""
    if not is_quantized(parameter):
        return parameter
    return torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)


def entries_to_read(gradient: Tensor) -> Tensor:
    """Return the gradient's entries here as a real strided tensor; the sum over duplicate indices where sparse.

    Shares memory with the gradient except where an uncoalesced sparse gradient must be summed first, and where a
    conjugate view's imaginary parts are stored with the other sign.
    """
    local = local_part(gradient)
    if local.layout != torch.strided:
        local = local.coalesce().values() if local.layout == torch.sparse_coo else local.values()
    return torch.view_as_real(local.resolve_conj()) if local.is_complex() else local


def entries_to_scale(gradient: Tensor) -> Tensor:
    """Return the entries as stored, to be multiplied in place: real, strided, sharing the gradient's memory.

    Those of conjugate and negative views are the memory behind them, in which signs differ.
    """
    local = local_part(gradient)
    if local.layout != torch.strided:
        local = local._values() if local.layout == torch.sparse_coo else local.values()
    if local.is_conj():
        local = local.conj()
    if local.is_neg():
        local = torch._neg_view(local)
    return torch.view_as_real(local) if local.is_complex() else local


def limits_of(dtype: torch.dtype, low: float, high: float) -> list[float]:
    """A clamp's limits as this dtype has them: beyond its range, where torch raises, rounded to its end or infinity."""
    if dtype.itemsize == 2:  # by way of float32, as torch does
        low, high = ctypes.c_float(low).value, ctypes.c_float(high).value
    most, step = torch.finfo(dtype).max, torch.finfo(dtype).eps
    infinite = most * ((4 - step) / (4 - 2 * step))  # half a step beyond
    return [
        limit if abs(limit) <= most else math.copysign(most if abs(limit) < infinite else math.inf, limit)
        for limit in (low, high)
    ]


def entries_by_position(tensor: Tensor) -> Tensor:
    """Return the entries here as a real strided tensor in which each stands at its place: sparse ones made dense."""
    return entries_to_read(tensor.detach().to_dense() if tensor.layout != torch.strided else tensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in its own memory: all of a plain one."""
    if not is_distributed(tensor):
        return tensor.detach()
    with torch.no_grad():
        return _local(tensor).detach()


def _local(tensor: Any) -> Tensor:
    """Return what this rank holds of a distributed tensor."""
    local = tensor.to_local()
    # Where it is still on its way from an asynchronous collective, it is waited for.
    return local if type(local) in _PLAIN or not hasattr(local, "wait") else local.wait()


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Tell whether none of the tensors is of a subclass, which may hold its entries elsewhere."""
    return set(map(type, tensors)) <= _PLAIN


def local_parts(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return what this rank holds of each tensor; plain ones are passed on as they are."""
    if are_plain(tensors):
        return tensors
    with torch.no_grad():
        return [_local(tensor) if is_distributed(tensor) else tensor for tensor in tensors]


def is_distributed(tensor: Tensor) -> TypeGuard[Any]:
    """Tell whether the tensor is a DTensor: one tensor, whose entries lie on a mesh of ranks."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported there are none
    return module is not None and isinstance(tensor, module.DTensor)


def are_distributed(tensors: Sequence[Tensor]) -> bool:
    """Tell whether any of the tensors is a DTensor."""
    return not are_plain(tensors) and any(map(is_distributed, tensors))


class Seen:
    """A tensor as it was seen once: held weakly, with the version that torch counts up at each write.

    ``GradScaler.unscale_`` does not count: it leaves the version as it is.
    """

    __slots__ = ("_reference", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._reference, self._version = TensorWeakRef(tensor), tensor._version

    def is_tensor(self, tensor: Tensor | None) -> bool:
        """Tell whether this is the tensor that was seen."""
        return tensor is not None and self._reference() is tensor

    def unchanged(self) -> Tensor | None:
        """Return the tensor, if it is still there and nobody has written to it."""
        tensor: Tensor | None = self._reference()
        return tensor if tensor is not None and tensor._version == self._version else None


def settle(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Give every distributed gradient its parameter's placements, so that what ranks hold are parts, not addends.

    A gradient that is ``Partial``, as tensor parallelism leaves it on replicated parameters, is reduced, which is a
    collective for each; the optimizer would do the same. Others are left as they are.

    Returns the gradients of the parameters that have one; where the parameter is ``Partial`` too, their sum.
    """
    held = [own for parameter in parameters if (own := parameter.grad) is not None]
    if are_plain(held):
        return held
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None and is_distributed(gradient):
            wanted = parameter.placements  # type: ignore[attr-defined]  # its gradient is distributed, so it is
            if gradient.placements != wanted:
                parameter.grad = gradient.redistribute(placements=wanted)
    return settled([own for parameter in parameters if (own := parameter.grad) is not None])


def settled(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the tensors, those that are ``Partial`` reduced: a collective for each of them."""
    if are_plain(tensors):
        return tensors
    result = []
    for tensor in tensors:
        given: Any = tensor
        if is_distributed(tensor) and any(placement.is_partial() for placement in given.placements):
            module = sys.modules["torch.distributed.tensor"]
            wanted = [module.Replicate() if one.is_partial() else one for one in given.placements]
            given = given.redistribute(placements=wanted)
        result.append(given)
    return result


def coordinate(tensor: Tensor) -> tuple[int, ...] | None:
    """Tell which piece of a distributed tensor this rank holds, by its place on each mesh axis that splits it.

    Ranks with equal coordinates hold copies of one piece. () for a plain tensor, which is one piece; None for a rank
    that is not on the mesh.
    """
    if not is_distributed(tensor):
        return ()
    here = mesh_of(tensor).get_coordinate()
    return None if here is None else tuple(here[axis] for axis in split_axes(tensor))


def split_axes(tensor: Tensor) -> tuple[int, ...]:
    """Return the mesh axes that split a distributed tensor; the others hold copies. A plain tensor has none."""
    if not is_distributed(tensor):
        return ()
    given: Any = tensor
    return tuple(axis for axis, placement in enumerate(given.placements) if hasattr(placement, "dim"))


def is_first_copy(tensor: Tensor) -> bool:
    """Tell whether this rank holds the first of the copies of its piece of a distributed tensor."""
    here, axes = mesh_of(tensor).get_coordinate(), split_axes(tensor)
    return here is not None and not any(place for axis, place in enumerate(here) if axis not in axes)


def is_split(tensor: Tensor) -> bool:
    """Tell whether a tensor lies in more than one piece that has entries."""
    given: Any = tensor
    return bool(tensor.numel()) and any(
        given.device_mesh.size(axis) > 1 and tensor.shape[given.placements[axis].dim] > 1
        for axis in split_axes(tensor)
    )


def units_here(tensor: Tensor, unit_dim: int) -> Sequence[int]:
    """Return the indices, in the whole tensor, of the units of which this rank holds something, as they lie."""
    if tensor.dim() <= 1:
        return (0,)
    if not is_distributed(tensor):
        return range(tensor.shape[unit_dim])
    # Outside of the mesh torch leaves an empty vector, which is one unit.
    return _held(tensor, unit_dim) if is_member(tensor) else (0,)


def mesh_of(tensor: Tensor) -> Any:
    """Return the mesh of a distributed tensor; None for a plain one."""
    return tensor.device_mesh if is_distributed(tensor) else None


def on_mesh_of(tensors: Sequence[Tensor], number: Tensor) -> Tensor:
    """Return a [] number that all ranks know, as a replicated DTensor where all the tensors lie on one mesh."""
    meshes = {mesh_of(tensor) for tensor in tensors} if not are_plain(tensors) else {None}
    mesh = meshes.pop()
    if mesh is None or meshes:
        return number
    module: Any = sys.modules["torch.distributed.tensor"]
    return module.DTensor.from_local(number, mesh, [module.Replicate()] * mesh.ndim, run_check=False)


def whole(tensor: Tensor) -> Tensor:
    """Return all ranks' entries of a distributed tensor, a collective unless it is replicated; others as they are."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def shard_groups(tensor: Tensor) -> list[Any]:
    """Return the process group of each mesh axis over which a distributed tensor is split; none for a plain tensor."""
    if not is_distributed(tensor) or not is_member(tensor):
        return []
    mesh = mesh_of(tensor)
    return [mesh.get_group(axis) for axis in split_axes(tensor) if mesh.size(axis) > 1]


def placement_key(tensor: Tensor) -> object:
    """Return a key that is equal for distributed tensors that lie alike on one mesh; None for a plain tensor."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_distributed(tensor) else None


def is_member(tensor: Tensor) -> bool:
    """Tell whether this rank is on the mesh of a distributed tensor."""
    return mesh_of(tensor).get_coordinate() is not None


def mesh_ranks(tensor: Tensor) -> tuple[int, ...]:
    """Return the ranks over which a distributed tensor is spread; none for a plain tensor."""
    return tuple(mesh_of(tensor).mesh.flatten().tolist()) if is_distributed(tensor) else ()


def _held(tensor: Any, dim: int) -> Sequence[int]:
    """Return the indices along ``dim`` that this rank holds: each mesh axis splits what the earlier left."""
    indices: Sequence[int] = range(tensor.shape[dim])
    mesh, here = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    for axis in split_axes(tensor):
        placement = tensor.placements[axis]
        if placement.dim == dim:
            # A strided shard is interleaved: split first as a later axis does, then each part by this axis.
            stride = int(getattr(placement, "split_factor", 1))
            parts = [_chunk(indices, stride, which) for which in range(stride)]
            split = [_chunk(part, mesh.size(axis), here[axis]) for part in parts]
            indices = split[0] if stride == 1 else tuple(itertools.chain.from_iterable(split))
    return indices


def _chunk(indices: Sequence[int], count: int, which: int) -> Sequence[int]:
    """Return part ``which`` of ``count``, as ``torch.chunk`` cuts: equal parts, then a shorter one, then empty ones."""
    length = -(-len(indices) // count)
    return indices[which * length : (which + 1) * length]


def is_only_a_view(gradient: Tensor) -> bool:
    """Tell whether entries cannot be written to where they lie.

    Several lie in one place, as after ``expand``, or what is stored has other signs, as in conjugate views.
    """
    if gradient.layout != torch.strided:
        return False
    return (0 in gradient.stride() and gradient.numel() > 1) or gradient.is_conj() or gradient.is_neg()


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the entries of a strided tensor fill one piece of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    width = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != width:
            return False
        width *= size
    return True
