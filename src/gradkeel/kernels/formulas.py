"""Formulas followed by the native kernels: some operations on the numbers of each of many cells, in one call."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import native
from gradkeel.norms import Lines, compilers

# By name, with the C code's numbers for them (enum code).
_CODES = {
    "add": 0, "sub": 1, "mul": 2, "truediv": 3, "divide": 3, "and": 4, "or": 5, "lt": 6, "le": 7, "gt": 8, "ge": 9,
    "eq": 10, "ne": 11, "neg": 12, "abs": 13, "invert": 14, "where": 15, "maximum": 16, "minimum": 17, "is_norm": 18,
    "is_number": 19, "real": 20, "sqrt": 21, "log": 22, "exp": 23, "expm1": 24, "window": 25, "length": 26,
    "quantile": 27, "mean": 28, "deviation": 29, "logs": 30, "distances": 31,
}  # fmt: skip
_MOST_NUMBERS = 256  # MOST_NUMBERS of native.c


class _Line(ctypes.Structure):
    """struct line of native.c."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("code", "a", "b", "c"))


class _Formula(ctypes.Structure):
    """struct formula of native.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("shared", "own", "constants", "lines", "results")),
        ("constant", ctypes.POINTER(ctypes.c_double)),
        ("line", ctypes.POINTER(_Line)),
        ("found", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_int32) for name in ("has_ring", "condition", "seen", "value")),
    )


class Followed:
    """A formula as the library reads it; called with the numbers of k cells."""

    def __init__(self, lines: Lines, kernels: native.Kernels) -> None:
        rows: list[tuple[int, ...]] = []
        for name, *places in lines.operations:
            given = [0, *places] if name == "window" else places  # of the one ring
            rows.append((_CODES[name], *given, *(0,) * (3 - len(given))))
        constants = (ctypes.c_double * len(lines.constants))(*lines.constants)
        operations, found = (
            (_Line * len(rows))(*(_Line(*row) for row in rows)),
            (ctypes.c_int32 * len(lines.found))(*lines.found),
        )
        sizes = lines.shared, lines.own, len(constants), len(rows), len(found)
        entry = (1, *lines.entry) if lines.entry else (0, 0, 0, 0)
        self._held = _Formula(*sizes, constants, operations, found, *entry)
        self._address, self._follow = ctypes.addressof(self._held), kernels.follow

    def __call__(
        self,
        shared: list[float],
        norms: Tensor | bytearray | list[float],
        looks: Sequence[Tensor],
        after: bytearray,
        *before: bytearray | int,
    ) -> tuple[list[float], list[float]]:
        """Return the first two results, [k] each.

        Args:
            shared: numbers that all cells share.
            norms: [k] float64 on CPU, or memory of them; or the one cell's, as a number.
            looks: [k] of whatever else the formula looks at.
            after: all results are written there, [results, k] float64, and where there are rings, [k, 2] which place of
                each a norm has entered, from 1, or 0, and what was there.
            before: what was written the last time, if something is remembered; and the rings, [k, 1 + 2 * window], how
                many of it are sorted, its values, and these sorted, which norms enter; and how long they are.
        """
        cells: int = 1
        at: int | bytearray = 0
        if isinstance(norms, bytearray):
            cells, at = len(norms) // 8, norms
        elif isinstance(norms, list):
            shared += norms
        else:
            cells, at = norms.shape[0], norms.data_ptr()
        look = torch.cat(list(looks)).to(torch.float64) if looks else None
        places = 0 if look is None else look.data_ptr()
        found: tuple[list[float], list[float]] = self._follow(
            self._address, cells, shared, at, places, len(looks), after, *before
        )
        return found


def compiled(lines: Lines) -> Followed | None:
    """Return the formula for the kernels; None where they are not in use, have no such operation, or too few places."""
    kernels = native.kernels()
    numbers = lines.shared + lines.own + len(lines.constants) + len(lines.operations)
    if kernels is None or numbers > _MOST_NUMBERS or any(line[0] not in _CODES for line in lines.operations):
        return None
    return Followed(lines, kernels)


compilers.append(compiled)
