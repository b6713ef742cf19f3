"""How far tensors move: they are copied, and later what they are away from their copies is read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import native
from gradkeel.kernels.native import Table
from gradkeel.measure.powers import tensor_norms
from gradkeel.tensors import entries_to_read


class Copies:
    """What tensors hold, in memory of its own.

    Args:
        tensors: k tensors of any layout.
        table: where they lie, if the native kernels have read them.
    """

    def __init__(self, tensors: Sequence[Tensor], table: Table | None) -> None:
        kernels = native.kernels()
        self._table = self._kept = None
        self._clones: list[Tensor] = []
        if kernels is not None and table is not None and all(map(Tensor.is_contiguous, table.tensors)):
            self._table, self._kept = table, kernels.copied(table)
        else:
            self._clones = [entries_to_read(tensor).clone() for tensor in tensors]

    def distances(self, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        """[k] the 2-norm of what each tensor is away from its copy, which is given up; does not sync the host."""
        kernels, kept, clones = native.kernels(), self._kept, self._clones
        if kernels is not None and self._table is not None and kept is not None:
            table = kernels.table(tensors)
            if table is not None and table.is_where(self._table):
                return kernels.distances(table, kept)
        entries = [entries_to_read(tensor) for tensor in tensors]
        if kept is not None:  # the optimizer has put other memory in the place of theirs
            clones = [own.view(now.shape) for own, now in zip(native.as_tensors(kept), entries, strict=True)]
        if entries:  # in place, for the copies are as large as the model
            torch._foreach_sub_(clones, entries)
        return tensor_norms(clones, 2.0, device)
