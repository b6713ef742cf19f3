"""Launches the Triton kernels, on accelerators where they are asked for; torch's foreach operations otherwise.

They are off unless ``GRADKEEL_TRITON=on``: they have been run in Triton's interpreter and compiled for several GPUs,
but not yet measured on one.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradkeel.tensors import are_plain

VARIABLE = "GRADKEEL_TRITON"

PIECE = 65_536
"""Entries that one program works on."""

_BLOCK = 2048
_KEPT = 16
_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Where k tensors of one device lie, cut into pieces.

    Attributes:
        pieces: [pieces, 3] int64 address, number of entries and tensor's index; tensors of one dtype in a row.
        spans: [k, 2] int64 each tensor's first piece and number of pieces.
        runs: for each dtype, the first and the last piece but one.
        alignment: bytes to which all addresses are aligned, 16 at most.
    """

    pieces: Tensor
    spans: Tensor
    runs: tuple[tuple[torch.dtype, int, int], ...]
    alignment: int


class TritonKernels:
    """The kernels, and the tables of addresses that were used last."""

    def __init__(self) -> None:
        import triton.language

        from gradkeel.kernels import triton_kernels

        self._kernels: Any = triton_kernels
        self._types = {dtype: getattr(triton.language, name) for dtype, name in _DTYPES.items()}
        # Gradients are often allocated at the same addresses in each step; a table is then made once.
        self._tables: dict[tuple[Any, ...], Table] = {}

    def table(self, tensors: Sequence[Tensor]) -> Table | None:
        """Where the tensors lie; None if one is not a dense float tensor, or they lie on several devices.

        While a CUDA graph is captured only addresses that are known already will do, for the table of new ones would
        have to travel to the device.
        """
        if not tensors or not are_plain(tensors):
            return None
        if len({tensor.device for tensor in tensors}) > 1:
            return None
        if not all(t.layout == torch.strided and t.is_contiguous() and t.dtype in _DTYPES for t in tensors):
            return None
        device = tensors[0].device
        # Another stream would not wait for a table on its way to the device.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream, tuple((t.data_ptr(), t.numel(), t.dtype) for t in tensors))
        if key not in self._tables and not (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            while len(self._tables) >= _KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = _table(tensors)
        return self._tables.get(key)

    def norms(self, table: Table, norm_type: float) -> Tensor:
        """[k] float64 1-norm or 2-norm of each tensor."""
        is_squared = norm_type == 2.0
        count = len(table.pieces)
        sums, scales, norms = (
            torch.empty(size, dtype=torch.float64, device=table.pieces.device)
            for size in (count, count, len(table.spans))
        )
        for dtype, first, last in table.runs:
            self._kernels.sum_powers[(last - first,)](
                table.pieces[first:last], sums[first:last], scales[first:last], self._types[dtype], table.alignment,
                is_squared, _BLOCK,
            )  # fmt: skip
        self._kernels.join_powers[(len(table.spans),)](sums, scales, table.spans, norms, is_squared, 128)
        return norms

    def scale(self, table: Table, factors: Tensor) -> None:
        """Multiply the tensors by ``factors``, [] or [k] one each, in place; where it is 1 nothing is touched."""
        for dtype, first, last in table.runs:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            self._kernels.scale_pieces[(last - first,)](
                table.pieces[first:last], factors, factors.dim(), self._types[dtype], self._types[wide],
                table.alignment, _BLOCK,
            )  # fmt: skip


@functools.cache
def kernels() -> TritonKernels | None:
    """The Triton kernels, or None where they are not asked for or there is no Triton."""
    return None if unavailable() is not None else TritonKernels()


def unavailable() -> str | None:
    """Why the Triton kernels are not in use; None where they are."""
    if os.environ.get(VARIABLE, "").lower() not in {"on", "1", "yes", "true"}:
        return f"not asked for by {VARIABLE}=on"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def _table(tensors: Sequence[Tensor]) -> Table:
    pieces: list[tuple[int, int, int]] = []
    spans = [(0, 0)] * len(tensors)
    runs = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        start = len(pieces)
        for i, tensor in enumerate(tensors):
            if tensor.dtype == dtype:
                first, size = len(pieces), tensor.numel()
                cuts = range(0, size, PIECE)
                pieces += [(tensor.data_ptr() + at * dtype.itemsize, min(PIECE, size - at), i) for at in cuts]
                spans[i] = (first, len(cuts))
        if len(pieces) > start:
            runs.append((dtype, start, len(pieces)))
    alignment = next(width for width in (16, 8, 4, 2) if all(t.data_ptr() % width == 0 for t in tensors))
    rows, device = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 3), tensors[0].device
    return Table(_moved(rows, device), _moved(torch.tensor(spans), device), tuple(runs), alignment)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, so that the host need not wait.
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
