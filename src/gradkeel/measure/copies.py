"""How far tensors move: they are copied, and later what they are away from their copies is read."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import native
from gradkeel.kernels.native import Table
from gradkeel.measure.powers import tensor_norms, wide_dtype
from gradkeel.tensors import entries_to_read


class Copies:
    """What tensors of any layout hold, in memory of its own; ``table``: where they lie, if the kernels read them."""

    def __init__(self, tensors: Sequence[Tensor], table: Table | None) -> None:
        kernels, self._copied = native.kernels(), None
        self._clones: list[Tensor] = []
        if kernels is not None and table is not None and _lie_in_order(table.tensors):
            self._copied = kernels.copied(table)
        else:
            self._clones = [entries_to_read(tensor).clone() for tensor in tensors]

    def distances(self, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        """[k] the 2-norm of what each tensor is away from its copy, which is given up; does not sync the host.

        NaN where one has another size by now.
        """
        clones = self._clones
        if self._copied is not None:
            found = _by_kernels(tensors, self._copied)
            if found is not None:
                return found
            clones = self._copied.tensors()
        entries = [entries_to_read(tensor) for tensor in tensors]
        if [own.numel() for own in clones] != [now.numel() for now in entries]:
            return torch.full((len(entries),), math.nan, dtype=wide_dtype(device), device=device)
        clones = [own.reshape(now.shape) for own, now in zip(clones, entries, strict=True)]
        if entries:  # in place, for the copies are as large as the model
            torch._foreach_sub_(clones, entries)
        return tensor_norms(clones, 2.0, device)


def _by_kernels(tensors: Sequence[Tensor], copied: native.Copied) -> Tensor | None:
    kernels = native.kernels()
    table = None if kernels is None else kernels.table(tensors, otherwise=entries_to_read)
    if kernels is None or table is None or not _lie_in_order(table.tensors):
        return None
    return kernels.distances(table, copied)


def _lie_in_order(tensors: Sequence[Tensor]) -> bool:
    """Whether what lies in memory are the entries, in order."""
    return all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors))
