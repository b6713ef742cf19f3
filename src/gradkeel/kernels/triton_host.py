"""Launches the Triton kernels on tensors of an accelerator, and says whether it did.

They are on by default on CUDA and ROCm where Triton is installed. Before a kernel is used with a dtype for the first
time, it is run on random tensors and compared with float64: one that is wrong there, or cannot be compiled, is never
used, which one warning says, and torch's foreach operations do the work. ``GRADKEEL_TRITON=off`` turns them off;
``on`` takes them on whatever device there is, without that check.
"""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import GradkeelWarning
from gradkeel.kernels.addresses import without_slots
from gradkeel.kernels.arrival import is_capturing
from gradkeel.kernels.native import Read
from gradkeel.kernels.triton_layout import DTYPES, Layout, Layouts, kinds_of
from gradkeel.tensors import limits_of

VARIABLE = "GRADKEEL_TRITON"

_OFF, _ON = {"off", "0", "no", "false"}, {"on", "1", "yes", "true"}
_BLOCK, _UNIT_BLOCK, _ROWS, _ROWS_SCALED = 2048, 512, 2, 8
_OPERATIONS = (
    "1-norm", "2-norm", "1-norm of units", "2-norm of units", "scale", "scale of units", "clamp",
    "extremes",
)  # fmt: skip


class TritonKernels:
    """The kernels of one device.

    Attributes:
        device: the device.
        fault: why they are not in use, once a check has failed; None as long as none has.
    """

    def __init__(self, device: torch.device, *, is_checked: bool = True) -> None:
        import triton.language

        from gradkeel.kernels import triton_kernels

        self.fault: str | None = None
        self.device = device
        self._kernels: Any = triton_kernels
        self._types = {dtype: getattr(triton.language, name) for dtype, name in DTYPES.items()}
        self._layouts = Layouts(device)
        # What has been checked: pairs of an operation's name and a dtype. None where nothing is to be.
        self._right: set[tuple[str, torch.dtype]] | None = set() if is_checked else None
        # Addresses are sent and read by two launches, between which no other thread may send its own.
        self.lock = threading.RLock()

    def layout(
        self, operation: str, tensors: Sequence[Tensor | None], unit_dim: int | None = None
    ) -> Layout | None:
        """Where the tensors lie, their addresses sent; None where the kernels cannot, or must not, be used on them."""
        kinds = kinds_of(tensors, self.device, unit_dim)
        if kinds is None or not self.is_right(operation, {kind.dtype for kind in kinds if kind is not None}):
            return None
        return self._layouts.of(tensors, kinds)

    def read(self, layout: Layout, norm_type: float, *, peaks: bool = False) -> Read:
        """Norms of the tensors, and of their units and the extremes where wanted; 0 for one that is not there."""
        by_unit, squared = layout.unit_spans is not None, norm_type == 2.0
        block, rows, warps = (_UNIT_BLOCK, _ROWS, 1) if by_unit else (_BLOCK, 1, 4)
        sums, scales, norms = (self._new(n) for n in (layout.pieces, layout.pieces, layout.tensors))
        extremes = self._new(2 * layout.pieces) if peaks else sums
        for run in layout.runs:
            self._kernels.read_pieces[(-(-run.length // rows),)](
                layout.addresses, layout.table, run.first, run.length, sums, scales, extremes, self._types[run.dtype],
                self._wide(run.dtype), min(run.alignment, layout.alignment), squared, peaks, block, rows,
                num_warps=warps,
            )  # fmt: skip
        block = min(4096, 1 << max(4, layout.longest - 1).bit_length())
        warps = max(1, block // 512)
        self._kernels.join_powers[(layout.tensors,)](
            sums, scales, layout.spans, norms, layout.has_float64, squared, block, num_warps=warps
        )
        total = self._new(1)
        self._kernels.join_norms[(1,)](norms, layout.tensors, total, squared, 1024)
        units = lowest_and_highest = None
        if layout.unit_spans is not None:
            units = self._new(layout.units)
            if layout.longest_unit <= 1:
                self._kernels.unit_norms[(-(-layout.pieces // 1024),)](
                    layout.table, layout.pieces, sums, scales, units.zero_() if layout.has_gaps else units, squared,
                    1024,
                )  # fmt: skip
            else:
                self._kernels.join_powers[(layout.units,)](
                    sums, scales, layout.unit_spans, units, layout.has_float64, squared, 16, num_warps=1
                )
        if peaks:
            lowest_and_highest = self._new(2 * layout.tensors).view(-1, 2)
            self._kernels.join_peaks[(layout.tensors,)](extremes, layout.spans, lowest_and_highest, 128)
        return Read(norms, total.squeeze(0), units, lowest_and_highest)

    def scale(self, layout: Layout, factors: Tensor, *, by_unit: bool = False) -> None:
        """Multiply tensors, or units, by ``factors``, [] or one each, in place; where it is 1 nothing is touched."""
        stride, factors = factors.dim(), factors.contiguous()
        if factors.data_ptr() % 16:
            factors = factors.clone()  # an address like any other's, so that no further kernel is compiled
        block, rows, warps = (_UNIT_BLOCK, _ROWS_SCALED, 1) if by_unit else (_BLOCK, 1, 4)
        for run in layout.runs:
            self._kernels.scale_pieces[(-(-run.length // rows),)](
                layout.addresses, layout.table, run.first, run.length, factors, stride, self._types[run.dtype],
                self._wide(run.dtype), min(run.alignment, layout.alignment), block, rows, num_warps=warps,
            )  # fmt: skip

    def clamp(self, layout: Layout, low: float, high: float, peaks: Tensor | None = None) -> None:
        """Clamp each entry into ``[low, high]`` in place; NaN stays, and what is within is not written.

        With ``peaks`` [k, 2], the tensors' extremes, one that is within is not even read.
        """
        given = layout.addresses if peaks is None else peaks.contiguous()
        for run in layout.runs:
            # As torch's clamp rounds them.
            limits = torch.tensor(limits_of(run.dtype, low, high), dtype=run.dtype, device="cpu").tolist()
            self._kernels.clamp_pieces[(run.length,)](
                layout.addresses, layout.table, run.first, given, *limits, self._types[run.dtype],
                min(run.alignment, layout.alignment), peaks is not None, _BLOCK,
            )  # fmt: skip

    def _wide(self, dtype: torch.dtype) -> Any:
        return self._types[torch.promote_types(dtype, torch.float32)]

    def _new(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float64, device=self.device)

    def is_right(self, operation: str, dtypes: Iterable[torch.dtype]) -> bool:
        """Whether an operation may be used with these dtypes; checks and warns at the first time."""
        if self._right is None or self.fault is not None:
            return self.fault is None
        unknown = [dtype for dtype in dtypes if (operation, dtype) not in self._right]
        if unknown and is_capturing(self.device):
            return False  # the check reads on the host
        for dtype in unknown:
            self._right.add((operation, dtype))
            try:
                with without_slots():
                    fault = _fault(self, operation, dtype)
            except Exception as error:  # noqa: BLE001  # whatever a compiler raises
                fault = f"cannot be run: {type(error).__name__}: {error}"
            if fault is not None:
                self.fault = f"the Triton kernel for {operation} of {dtype} on {self.device} {fault}"
                warnings.warn(
                    f"{self.fault}; torch's foreach operations are used instead, which launch more kernels "
                    f"({VARIABLE}=off turns the Triton kernels off without this warning)",
                    GradkeelWarning,
                    stacklevel=2,
                )
                return False
        return True


def _fault(kernels: TritonKernels, operation: str, dtype: torch.dtype) -> str | None:
    """What is wrong with an operation on a few random tensors, in words; None where it agrees with float64."""
    generator = torch.Generator().manual_seed(0)
    by_unit = operation.endswith("units")
    shapes = [(3, 5), (17, 2049), (1, 7)] if by_unit else [(3, 5), (70_003,), (1,)]
    drawn = [torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes]
    tensors = [tensor.to(kernels.device, copy=True) for tensor in drawn]
    layout = kernels.layout(operation, tensors, 0 if by_unit else None)
    assert layout is not None, "they are fit, and this check is noted already"
    cells = [unit for tensor in drawn for unit in (tensor.unbind() if by_unit else [tensor])]
    if "norm" in operation:
        p = float(operation[0])
        read = kernels.read(layout, p)
        found = read.norms if read.units is None else read.units
        wanted = torch.stack([torch.linalg.vector_norm(cell.double(), p) for cell in cells])
        error = float((found.cpu() / wanted - 1).abs().max())
        return None if error < 1e-10 else f"is wrong: a norm is off by {error:.1e} of itself"
    if operation == "extremes":
        peaks = kernels.read(layout, 2.0, peaks=True).peaks
        wanted = torch.stack([torch.stack(torch.aminmax(cell.double())) for cell in cells])
        return None if peaks is not None and torch.equal(peaks.cpu(), wanted) else "is wrong"
    if operation == "clamp":
        kernels.clamp(layout, -0.3, 0.7)
        results = [cell.clamp(-0.3, 0.7) for cell in cells]
    else:
        factors = torch.rand(len(cells), generator=generator, dtype=torch.float64, device="cpu")
        kernels.scale(layout, factors.to(kernels.device), by_unit=by_unit)
        wide = torch.promote_types(dtype, torch.float32)
        results = [(cell.to(wide) * f.to(wide)).to(dtype) for cell, f in zip(cells, factors, strict=True)]
    after = [unit for tensor in tensors for unit in (tensor.cpu().unbind() if by_unit else [tensor.cpu()])]
    wrong = sum(int((a != b).sum()) for a, b in zip(after, results, strict=True))
    return None if wrong == 0 else f"is wrong: entries that are not what they should be: {wrong}"


# -- what the rest of the package asks ----------------------------------------------------------------------------


def read(
    tensors: Sequence[Tensor | None], norm_type: float, unit_dim: int | None = None, *, peaks: bool = False
) -> Read | None:
    """One read of each tensor, of its units along ``unit_dim`` and its extremes where wanted; 0 for None.

    None where the kernels do not do it.
    """
    own = _kernels_of(tensors) if norm_type in (1.0, 2.0) else None
    if own is None:
        return None
    with own.lock, _on(own.device):
        norm = f"{norm_type:.0f}-norm"
        layout = own.layout(norm if unit_dim is None else f"{norm} of units", tensors, unit_dim)
        if layout is None or (peaks and not own.is_right("extremes", {run.dtype for run in layout.runs})):
            return None
        return own.read(layout, norm_type, peaks=peaks)


def scale(tensors: Sequence[Tensor | None], factors: Tensor) -> bool:
    """Multiply each tensor by its factor, [] or [k], in place; whether the kernels did it. None is passed over."""
    return _scale("scale", tensors, factors)


def scale_units(tensors: Sequence[Tensor | None], factors: Tensor, counts: Sequence[int], dim: int) -> bool:
    """Multiply each unit along ``dim`` by its factor, [u], in place; whether the kernels did it.

    As `foreach.scale_units`; a tensor may be None, which is passed over with its factors.
    """
    return _scale("scale of units", tensors, factors, tuple(counts), dim)


def _scale(
    operation: str,
    tensors: Sequence[Tensor | None],
    factors: Tensor,
    counts: tuple[int, ...] | None = None,
    dim: int | None = None,
) -> bool:
    own = _kernels_of(tensors)
    if own is None or factors.device != own.device:
        return False
    with own.lock, _on(own.device):
        layout = own.layout(operation, tensors, dim)
        if layout is None or counts not in (None, layout.unit_counts):
            return False
        own.scale(layout, factors, by_unit=counts is not None)
    return _written(tensors)


def clamp(tensors: Sequence[Tensor | None], low: float, high: float, peaks: Tensor | None = None) -> bool:
    """Clamp each entry into ``[low, high]`` in place; whether the kernels did it, which they do not for float64.

    With ``peaks`` [k, 2], the tensors' lowest and highest entries, one that is within is not read.
    """
    own = _kernels_of(tensors)
    # A number that the host gives a kernel arrives in float32.
    if own is None or any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return False
    with own.lock, _on(own.device):
        layout = own.layout("clamp", tensors)
        if layout is None:
            return False
        own.clamp(layout, low, high, None if peaks is None or peaks.device != own.device else peaks)
    return _written(tensors)


def _written(tensors: Sequence[Tensor | None]) -> bool:
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])
    return True


def _kernels_of(tensors: Sequence[Tensor | None]) -> TritonKernels | None:
    first = next((tensor for tensor in tensors if tensor is not None), None)
    return None if first is None else kernels(first.device)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def kernels(device: torch.device) -> TritonKernels | None:
    """The Triton kernels of a device, or None where they are not in use."""
    if why_not(device) is not None:
        return None
    return TritonKernels(device, is_checked=_wanted() not in _ON)


def unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels are not in use on a device, checking all of them; None where they are."""
    own = kernels(device)
    if own is None:
        return why_not(device)
    with own.lock:
        for operation in _OPERATIONS:
            own.is_right(
                operation, [dtype for dtype in DTYPES if (operation, dtype) != ("clamp", torch.float64)]
            )
    return own.fault


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot be tried on a device; None where they can."""
    wanted = _wanted()
    if wanted in _OFF:
        return f"turned off by {VARIABLE}={wanted}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "not for CPUs"
    if device.type != "cuda" and wanted not in _ON:
        return f"for CUDA and ROCm, unless {VARIABLE}=on"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return "Triton is not installed" if isinstance(error, ModuleNotFoundError) else f"Triton: {error}"
    return None


def remedy(device: torch.device) -> str | None:
    """What one can do to have the kernels used where `unavailable` says why they are not; None if nothing."""
    if _wanted() in _OFF:
        return f"unset {VARIABLE}"
    if device.type == "cuda" and kernels(device) is None:
        return "install Triton: its kernels launch fewer operations"
    return None


def _wanted() -> str:
    return os.environ.get(VARIABLE, "").lower()
