"""Where the tensors lie that the Triton kernels work on: what never changes from step to step, and their addresses."""

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradkeel.kernels.addresses import Addresses, Slots, active_slots
from gradkeel.kernels.arrival import is_capturing
from gradkeel.tensors import are_plain, is_dense

PIECE = 32_768
"""Entries that one program works on."""

DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}

_KEPT = 16
_SPARE = 4


class Kind(NamedTuple):
    """What a layout knows of a tensor: its number of entries, its dtype, and its units where it is cut into these."""

    size: int
    dtype: torch.dtype
    units: int | None = None

    @property
    def alignment(self) -> int:
        """Bytes to which the beginnings of its pieces are aligned within it, 16 at most."""
        length = self.size // max(1, self.units or 1)
        return 16 if (self.units or 1) == 1 else _alignment([length * self.dtype.itemsize])


def kinds_of(
    tensors: Sequence[Tensor | None], device: torch.device, unit_dim: int | None = None
) -> list[Kind | None] | None:
    """The tensors' kinds, None for None; None if one, or its units, are not dense floats of this device."""
    if not are_plain(tensor for tensor in tensors if tensor is not None):
        return None
    kinds: list[Kind | None] = []
    for tensor in tensors:
        if tensor is None:
            kinds.append(None)
            continue
        if tensor.layout != torch.strided or tensor.device != device or tensor.dtype not in DTYPES:
            return None
        if tensor.is_neg() or not is_dense(tensor):
            return None
        size, units = tensor.numel(), None
        if unit_dim is not None:
            units = 1 if tensor.dim() <= 1 else tensor.shape[unit_dim]
            if units > 1 and size and tensor.stride(unit_dim) != size // units:
                return None  # its units do not lie one after the other
        kinds.append(Kind(size, tensor.dtype, units))
    return kinds


class Run(NamedTuple):
    """Pieces of one dtype, the first of them and how many, and the bytes to which they are aligned in their tensors."""

    dtype: torch.dtype
    alignment: int
    first: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How k tensors are cut into pieces, and where they lie."""

    tensors: int  # how many of each
    pieces: int
    units: int
    # [pieces, 4] int64 address's index, first byte, number of entries, index of the factor; run after run
    table: Tensor
    spans: Tensor  # [k, 2] int64 each tensor's first piece and number of pieces
    unit_spans: Tensor | None  # [u, 2] int64 the same of units, where they are cut into these
    runs: tuple[Run, ...]  # what is launched together
    unit_counts: tuple[int, ...]  # how many units each tensor has, where they are cut into these
    longest: int  # the largest number of pieces that one tensor has
    longest_unit: int  # likewise of one unit
    has_gaps: bool  # whether any unit has no piece
    addresses: Tensor  # int64, one for each index that the table has; 0 for a tensor that is not there
    alignment: int  # bytes to which all of them are aligned, 16 at most

    @property
    def has_float64(self) -> bool:
        """Whether any tensor is float64."""
        return any(run.dtype == torch.float64 for run in self.runs)


class Layouts:
    """The layouts of one device that were used last."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._plans: list[_Plan] = []
        self._captured: list[object] = []

    def of(self, tensors: Sequence[Tensor | None], kinds: Sequence[Kind | None]) -> Layout | None:
        """Where these tensors lie now; None while a graph is captured, if such tensors were never seen before.

        A tensor that is not there keeps its place, once it has been seen: gradients may come and go.
        """
        found = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        slots = active_slots()
        if slots is not None:
            return self._in_slots(slots, kinds, found)
        if is_capturing(self._device):
            return self._in_graph(kinds, found)
        return self._plan_of(kinds).sent(found)

    def _plan_of(self, kinds: Sequence[Kind | None]) -> "_Plan":
        """A plan for the current stream, made if need be: then in place of one that lacks only some of the tensors."""
        stream = _stream(self._device)
        plan = next((plan for plan in self._plans if plan.stream == stream and plan.covers(kinds)), None)
        if plan is not None:
            if plan is not self._plans[0]:
                self._plans.remove(plan)
                self._plans.insert(0, plan)
            return plan
        known = next((plan for plan in self._plans if plan.stream == stream and plan.agrees(kinds)), None)
        if known is not None:
            kinds = [own or other for own, other in zip(kinds, known.kinds, strict=True)]
            self._plans.remove(known)
        plan = _Plan(kinds, self._device, stream)
        self._plans = [plan, *self._plans[: _KEPT - 1]]
        return plan

    def _in_slots(self, slots: Slots, kinds: Sequence[Kind | None], found: list[int]) -> Layout | None:
        """The addresses in the slots' own buffer, where the table looks for them."""
        places = slots.of(found)
        key = (tuple(kinds), places)
        layout: Layout | None = slots.layouts.get(key)
        if layout is None:
            if is_capturing(self._device):
                slots.missed = True  # it was not there at the rehearsal
                return None
            layout = _made(kinds, self._device, slots.buffer, places, _alignment(found))
            slots.layouts[key] = layout
            self._plan_of(kinds)  # for graphs of the user's, which have no slots
        return layout

    def _in_graph(self, kinds: Sequence[Kind | None], found: list[int]) -> Layout | None:
        """The addresses in a buffer of their own, for the graph must not read those of a later step."""
        for plan in self._plans:
            if plan.covers(kinds) and plan.spare:
                pinned = plan.spare.pop()
                # A replay reads them again.
                self._captured.append((plan, pinned))
                pinned.copy_(torch.tensor(found, dtype=torch.int64, device="cpu"))
                return plan.at(pinned.to(self._device, non_blocking=True), _alignment(found))
        return None


class _Plan:
    """A layout and the buffers through which its addresses travel.

    Attributes:
        kinds: of the tensors; None for one that was never there.
        stream: the one stream on which it may be used, for another would not wait for addresses on their way.
        spare: pinned buffers for graphs that are captured.
    """

    def __init__(self, kinds: Sequence[Kind | None], device: torch.device, stream: int) -> None:
        self.kinds, self.stream = list(kinds), stream
        count = len(kinds)
        self._addresses = Addresses(count, device)
        self._last: list[int] = []
        self._layout = _made(kinds, device, self._addresses.buffer, range(count), 16)
        self.spare = list(
            torch.zeros(
                _SPARE, count, dtype=torch.int64, pin_memory=device.type != "cpu", device="cpu"
            ).unbind()
        )

    def covers(self, kinds: Sequence[Kind | None]) -> bool:
        """Whether it has a place for each of the tensors that are there."""
        return self.kinds == kinds or (
            len(self.kinds) == len(kinds)
            and all(kind is None or kind == own for kind, own in zip(kinds, self.kinds, strict=True))
        )

    def agrees(self, kinds: Sequence[Kind | None]) -> bool:
        """Whether there is no tensor of which the two know different things."""
        return len(self.kinds) == len(kinds) and all(
            kind is None or own is None or kind == own for kind, own in zip(kinds, self.kinds, strict=True)
        )

    def sent(self, found: list[int]) -> Layout:
        """The layout with these addresses, which travel only if one is another than before; does not sync the host."""
        if found != self._last:
            self._addresses.send(torch.tensor(found, dtype=torch.int64, device="cpu"))
            self._last = found
            self._layout = self.at(self._addresses.buffer, _alignment(found))
        return self._layout

    def at(self, addresses: Tensor, alignment: int) -> Layout:
        """The same layout with addresses in this buffer."""
        return replace(self._layout, addresses=addresses, alignment=alignment)


def _made(
    kinds: Sequence[Kind | None],
    device: torch.device,
    addresses: Tensor,
    places: Sequence[int],
    alignment: int,
) -> Layout:
    """The layout of tensors of these kinds whose addresses stand at these places of the buffer."""
    known = [(i, kind) for i, kind in enumerate(kinds) if kind is not None]
    by_unit = any(kind.units is not None for _, kind in known)
    counts = tuple(0 if kind is None else kind.units or 0 for kind in kinds)
    firsts = list(itertools.accumulate(counts, initial=0)) if by_unit else list(range(len(kinds)))
    parts, runs, done = [torch.zeros(0, 4, dtype=torch.int64, device="cpu")], [], 0
    spans = torch.zeros(len(kinds), 2, dtype=torch.int64, device="cpu")
    for dtype, own in dict.fromkeys((kind.dtype, kind.alignment) for _, kind in known):
        start = done
        for i, kind in known:
            if (kind.dtype, kind.alignment) == (dtype, own):
                rows = _pieces(places[i], kind, firsts[i])
                spans[i] = torch.tensor([done, len(rows)], device="cpu")
                parts.append(rows)
                done += len(rows)
        if done > start:
            runs.append(Run(dtype, own, start, done - start))
    table = torch.cat(parts)
    unit_spans = _unit_spans(table, sum(counts)) if by_unit else None
    by_unit_pieces = set() if unit_spans is None else set(unit_spans[:, 1].tolist())
    return Layout(
        tensors=len(kinds),
        pieces=len(table),
        units=sum(counts),
        table=_moved(table, device),
        spans=_moved(spans, device),
        unit_spans=None if unit_spans is None else _moved(unit_spans, device),
        runs=tuple(runs),
        unit_counts=counts,
        longest=int(spans[:, 1].max()) if len(kinds) else 0,
        longest_unit=max(by_unit_pieces, default=0),
        has_gaps=0 in by_unit_pieces,
        addresses=addresses,
        alignment=alignment,
    )


def _pieces(place: int, kind: Kind, first: int) -> Tensor:
    """[pieces, 4] rows of one tensor: each unit, or the whole, in pieces of at most ``PIECE`` entries."""
    units = 1 if kind.units is None else kind.units
    length = kind.size // max(1, units)
    within = torch.arange(0, length, PIECE, device="cpu")
    begins = (torch.arange(units, device="cpu").unsqueeze(1) * length + within).flatten()
    sizes = (length - within).clamp(max=PIECE).repeat(units)
    factors = first + torch.arange(units, device="cpu").repeat_interleave(len(within))
    return torch.stack([torch.full_like(begins, place), begins * kind.dtype.itemsize, sizes, factors], dim=1)


def _unit_spans(table: Tensor, units: int) -> Tensor:
    """[units, 2] first piece and number of pieces of each unit; those of one lie one after the other."""
    spans = torch.zeros(units, 2, dtype=torch.int64, device="cpu")
    owners = table[:, 3]
    spans[:, 1].index_add_(0, owners, torch.ones_like(owners))
    spans[:, 0].fill_(len(table)).scatter_reduce_(0, owners, torch.arange(len(table), device="cpu"), "amin")
    return spans


def _moved(values: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, so that the host need not wait.
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def _alignment(numbers: Sequence[int]) -> int:
    together = functools.reduce(operator.or_, numbers, 0)
    return next((width for width in (16, 8, 4, 2) if together % width == 0), 1)


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else int(torch.accelerator.current_stream(device).stream_id)
