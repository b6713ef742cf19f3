"""The optional native kernels for CPU tensors (`native.c`): found, loaded and called here, and never missed.

They are a shared library with a plain C interface, built with the package where there is a C compiler. Where it is not
there, or torch cannot feed it, `kernels` returns None and torch's own operations do the work.
"""

import ctypes
import functools
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradkeel.kernels.library import VARIABLE, UnavailableError, builtin, load, openmp, python
from gradkeel.norms import from_list, late
from gradkeel.tensors import are_plain

LEVELS = ("baseline", "avx2", "avx512")
_OFF, _ON = {"off", "0", "no", "false"}, {"", "on", "1", "yes", "true"}
NORMS = {math.inf: 0, 1.0: 1, 2.0: 2}
"""The norm types that the kernels know, with the C code's numbers for them."""
# struct answer of native.c: taken, rows, table, total, is_read, are_apart, is_wide.
_ANSWER, _TAKEN = struct.Struct("3qd4i"), struct.Struct("q")
# struct tensor of native.c: data, entries, rows, kind; and the bytes that copies begin at a multiple of.
_CELL, _ALIGNED = struct.Struct("4q"), 64
_KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_MEMORY = "gradkeel: no memory for the list of jobs"
_OF_TENSOR, _OF_ROW, _OF_ALL = range(3)
# What torch raises for a tensor without memory of its own: sparse, meta, wrapped.
_NO_ADDRESS = (RuntimeError, BufferError, TypeError, ValueError)


class _Team(ctypes.Structure):
    """struct team of native.c."""

    _fields_ = (("level", ctypes.c_int32), ("threads", ctypes.c_int32), ("parallel", ctypes.c_void_p))


@dataclass(slots=True, eq=False)
class Table:
    """Addresses, sizes and dtypes of dense CPU tensors; valid while none of them is resized."""

    tensors: list[Tensor]  # the tensors, so that they live as long
    address: int  # of the table, as the library reads it
    rows: int  # how many units the tensors have; each is one where it was not cut
    team: int  # the address of the threads that go through it
    memory: Any  # of the table
    # whether there are so few entries that the interpreter's lock need not be released for them
    are_few: bool = False
    is_wide: bool = False  # whether one of them is known to be float64


@late("norms")
@dataclass(slots=True, eq=False)
class Read:
    """What one read of k tensors gave, in float64 (float32 on devices without it)."""

    norms: Tensor  # [k] norm of each tensor
    # norm of all of them together, where it is known already: a number of the host's, or [] on an accelerator
    total: Tensor | float | None = None
    units: Tensor | None = None  # [u] norm of each unit, tensor after tensor, where asked for
    # [k, 2] each tensor's lowest and highest entry, where asked for: NaN where an entry is, 0 if empty
    peaks: Tensor | None = None
    # where they lie, if they were read as they are by these kernels and no two begin at one address
    table: Table | None = None

    if TYPE_CHECKING:

        @property
        def known_norms(self) -> Any:
            """The same as the norms, or the host's memory of them that they were given as."""


@dataclass(slots=True, eq=False)
class Copied:
    """What tensors held: [bytes] memory, and a table of where each lies in it."""

    memory: Tensor
    cells: "ctypes.Array[ctypes.c_char]"

    def tensors(self) -> list[Tensor]:
        """Each as [entries], in this memory."""
        found = []
        for data, entries, _, kind in _CELL.iter_unpack(self.cells):
            first, dtype = data - self.memory.data_ptr(), _KINDS[kind]
            found.append(self.memory[first : first + entries * dtype.itemsize].view(dtype))
        return found


class Kernels:
    """The loaded library.

    Attributes:
        level: the processor's features in use, one of ``LEVELS``.
        shares_threads: whether the kernels run on the threads of torch's own OpenMP library; else on one thread.
        follow: the library's ``gradkeel_follow``, for `gradkeel.kernels.formulas`.
    """

    def __init__(self, level: str | None = None) -> None:
        library = load()
        available = LEVELS[: library.gradkeel_levels()]
        self.level = available[-1] if level is None else level
        if self.level not in available:
            raise UnavailableError(
                f"{VARIABLE}={level}: this processor has {', '.join(available)}", f"unset {VARIABLE}"
            )
        self._parallel = openmp()
        self.shares_threads = self._parallel is not None
        self._teams: dict[int, Any] = {}
        self._python = python()
        library.gradkeel_python(self._python)
        self._describe, self._locate, self._scale_few, self.follow = (
            builtin(library, name) for name in ("describe", "locate", "scale_few", "follow")
        )
        pointer, integer = ctypes.c_void_p, ctypes.c_int32
        self._total = library.gradkeel_total
        self._total.restype = ctypes.c_double
        self._total.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
        self._read = library.gradkeel_read
        self._read.argtypes = (pointer, ctypes.c_int64, integer, *(pointer,) * 5)
        self._scale = library.gradkeel_scale
        self._scale.argtypes = (pointer, ctypes.c_int64, pointer, integer, pointer)
        self._clamp = library.gradkeel_clamp
        self._clamp.argtypes = (pointer, ctypes.c_int64, ctypes.c_double, ctypes.c_double, pointer)
        self._add = library.gradkeel_add
        self._add.argtypes = (pointer, pointer, ctypes.c_int64, pointer)
        self._copy = library.gradkeel_copy
        self._copy.argtypes = (pointer, ctypes.c_int64, pointer, pointer, pointer)

    def table(
        self,
        tensors: Sequence[Tensor],
        unit_dim: int | None = None,
        *,
        otherwise: Callable[[Tensor], Tensor] | None = None,
    ) -> Table | None:
        """Where the tensors lie, each cut into the units of ``unit_dim`` if given; None if one is not fit for that.

        Fit are dense CPU tensors of float32, bfloat16, float16 and float64, whose units lie one after the other. Where
        one is not fit as it is, the table is of what ``otherwise`` makes of each of them.
        """
        held, team = list(tensors), self._team()
        memory = self._tabled(held, -1 if unit_dim is None else unit_dim, -1, team, None)
        if memory is not None:
            _, rows, address, *_ = _ANSWER.unpack_from(memory)
            return Table(held, address, rows, team, memory)
        return None if otherwise is None else self.table([otherwise(tensor) for tensor in held], unit_dim)

    def _tabled(
        self, tensors: list[Tensor], dim: int, norm: int, team: int, norms: bytearray | None
    ) -> bytearray | None:
        """What native.c's ``describe`` gives; None where one of them is not fit for the table."""
        if not are_plain(tensors):
            return None
        try:
            memory: bytearray = self._describe(tensors, dim, norm, team, norms)
        except _NO_ADDRESS:
            return None
        return memory if _TAKEN.unpack_from(memory)[0] == len(tensors) else None

    def described(self, tensors: list[Tensor | None], addresses: Tensor) -> Any | None:
        """What plain tensors of any device are but for their addresses, which go into [k] int64; None if unfit."""
        words = (ctypes.c_int64 * (64 * len(tensors) + 1))()
        used = self._located(tensors, words, addresses, writes=True)
        return None if used < 0 else (ctypes.c_int64 * used).from_buffer_copy(words)

    def locate(self, description: Any, tensors: list[Tensor | None], addresses: Tensor) -> bool | None:
        """Put the addresses into [k] int64: whether any has changed; None where the tensors are not as described."""
        moved = self._located(tensors, description, addresses, writes=False)
        return None if moved < 0 else bool(moved)

    def _located(self, tensors: list[Tensor | None], words: Any, addresses: Tensor, *, writes: bool) -> int:
        try:
            found: int = self._locate(
                tensors, writes, ctypes.addressof(words), len(words), addresses.data_ptr(), None
            )
        except _NO_ADDRESS:
            return -1
        return found

    def norms(self, tensors: list[Tensor], norm_type: float) -> Read | None:
        """Norms of the tensors and of all, and their table; None if one is unfit.

        Few entries are read in the same call that looks where they lie; for more the interpreter's lock is released.
        """
        count, norm, team = len(tensors), NORMS[norm_type], self._team()
        norms: Any = bytearray(8 * count)
        memory = self._tabled(tensors, -1, norm, team, norms)
        if memory is None:
            return None
        _, _, address, total, is_read, are_apart, is_wide, _ = _ANSWER.unpack_from(memory)
        are_few = is_read != 0
        if not are_few:
            pointer = ctypes.addressof(ctypes.c_char.from_buffer(norms))
            is_read = 1 if self._read(address, count, norm, pointer, None, None, None, team) == 0 else -1
            total = self._total(pointer, count, norm)
        if is_read < 0:
            raise MemoryError(_NO_MEMORY)
        table = Table(tensors, address, count, team, memory, are_few, bool(is_wide)) if are_apart else None
        return Read(norms, total, table=table)

    def read(self, table: Table, norm_type: float, *, units: bool = False, peaks: bool = False) -> Read:
        """Read each tensor once: norms, and those of the units and the peaks where wanted."""
        count = len(table.tensors)
        norms = torch.empty(count, dtype=torch.float64, device="cpu")
        unit_norms = torch.empty(table.rows, dtype=torch.float64, device="cpu") if units else None
        extremes = torch.empty(count, 2, dtype=torch.float64, device="cpu") if peaks else None
        if self._read(
            table.address, count, NORMS[norm_type], norms.data_ptr(), _address(unit_norms), _address(extremes),
            None, table.team,
        ):  # fmt: skip
            raise MemoryError(_NO_MEMORY)
        return Read(norms, None, unit_norms, extremes)

    def scale(self, table: Table, factors: Tensor | list[float] | float) -> None:
        """Multiply all tensors by one number, each tensor by its own, or each unit by its own of a tensor, in place.

        Where a factor is 1 nothing is touched.
        """
        count, touched, share = len(table.tensors), table.tensors, _OF_ROW
        if isinstance(factors, float):
            share, factors = _OF_ALL, [factors]
        elif isinstance(factors, list):
            share = _OF_TENSOR
            touched = [tensor for tensor, own in zip(touched, factors, strict=True) if own != 1.0]
        if table.are_few and isinstance(factors, list):
            failed = self._scale_few(table.address, count, factors, table.team)
        else:
            numbers = (
                from_list(factors) if isinstance(factors, list) else factors.to(torch.float64).contiguous()
            )
            failed = self._scale(table.address, count, numbers.data_ptr(), share, table.team)
        if failed:
            raise MemoryError(_NO_MEMORY)
        torch.autograd.graph.increment_version(touched)

    def clamp(self, table: Table, low: float, high: float) -> None:
        """Clamp each entry into ``[low, high]`` in place; NaN stays."""
        if self._clamp(table.address, len(table.tensors), low, high, table.team):
            raise MemoryError(_NO_MEMORY)
        torch.autograd.graph.increment_version(table.tensors)

    def add(self, sums: Table, table: Table) -> None:
        """Add each tensor to the one of the same index in ``sums``, float32 or float64 and lying alike, in place."""
        for total, tensor in zip(sums.tensors, table.tensors, strict=True):
            assert total.dtype in (torch.float32, torch.float64), "sums are wide"
            assert (total.shape, total.stride()) == (tensor.shape, tensor.stride()), "they lie alike"
        if self._add(sums.address, table.address, len(table.tensors), table.team):
            raise MemoryError(_NO_MEMORY)
        torch.autograd.graph.increment_version(sums.tensors)

    def copied(self, table: Table) -> "Copied":
        """What the tensors hold now, in memory of its own."""
        count = len(table.tensors)
        size = sum(tensor.nbytes for tensor in table.tensors) + _ALIGNED * count
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        cells = (ctypes.c_char * (_CELL.size * count))()
        if self._copy(table.address, count, ctypes.addressof(cells), memory.data_ptr(), table.team):
            raise MemoryError(_NO_MEMORY)
        return Copied(memory, cells)

    def distances(self, table: Table, copied: "Copied") -> Tensor | None:
        """[k] the 2-norm of what k tensors are away from what was copied of them, entry by entry as they lie in memory.

        None where one has another dtype or size by now.
        """
        count = len(table.tensors)
        norms = torch.empty(count, dtype=torch.float64, device="cpu")
        cells = ctypes.addressof(copied.cells)
        done = self._read(table.address, count, NORMS[2.0], norms.data_ptr(), None, None, cells, table.team)
        if done < 0:
            raise MemoryError(_NO_MEMORY)
        return norms if done == 0 else None

    def _team(self) -> int:
        threads = torch.get_num_threads()
        if threads not in self._teams:
            self._teams[threads] = _Team(LEVELS.index(self.level) + 1, threads, self._parallel)
        return ctypes.addressof(self._teams[threads])


def scale(
    tensors: Sequence[Tensor] | Table, factors: Tensor | list[float] | float, unit_dim: int | None = None
) -> bool:
    """Multiply tensors by a number or one each, or units along ``unit_dim`` by a tensor; whether the kernels did it."""
    own = kernels()
    table = tensors if own is None or isinstance(tensors, Table) else own.table(tensors, unit_dim)
    if own is None or not isinstance(table, Table):
        return False
    own.scale(table, factors)
    return True


def clamp(tensors: Sequence[Tensor], low: float, high: float) -> bool:
    """Clamp each entry into ``[low, high]`` in place; whether the kernels did it."""
    own = kernels()
    table = None if own is None or any(map(Tensor.is_neg, tensors)) else own.table(tensors)
    if own is None or table is None:
        return False
    own.clamp(table, low, high)
    return True


def add(sums: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Add each tensor to its sum, which lies alike, in place; whether the kernels did it."""
    own = kernels()
    to, of = (None, None) if own is None else (own.table(sums), own.table(tensors))
    if own is None or to is None or of is None:
        return False
    own.add(to, of)
    return True


def kernels() -> Kernels | None:
    """The native kernels, or None where they are not in use."""
    return _found()[0]


def unavailable() -> str | None:
    """Why the native kernels are not in use; None where they are."""
    return _found()[1]


def remedy() -> str | None:
    """What one can do to have the native kernels used; None where they are, or nothing can be done."""
    return _found()[2]


@functools.cache
def _found() -> tuple[Kernels | None, str | None, str | None]:
    given = os.environ.get(VARIABLE, "")
    wanted = given.lower()
    try:
        if wanted in _OFF:
            raise UnavailableError(f"turned off by {VARIABLE}={given}", f"unset {VARIABLE}")
        if wanted not in {*_ON, *LEVELS}:
            raise UnavailableError(
                f"{VARIABLE}={given}: must be off or one of {', '.join(LEVELS)}", f"unset {VARIABLE}"
            )
        return Kernels(None if wanted in _ON else wanted), None, None
    except UnavailableError as error:
        return None, str(error), error.remedy


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
