"""States that the host keeps in plain numbers, and states of several parts; both are read as mappings of tensors."""

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from struct import pack
from typing import Any

import torch
from torch import Tensor

from gradkeel.norms import from_list


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are made when somebody asks for them."""

    __slots__ = ()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and save the tensors that it stands for, so that ``weights_only`` loads it."""
        return OrderedDict, (), None, None, iter(self.items())

    def __repr__(self) -> str:
        return repr(dict(self))


def ascending(values: list[float]) -> list[float]:
    """Return the values in order, NaN after all others, as torch sorts them."""
    ordered = sorted(values)
    if math.isnan(sum(ordered)):
        ordered = sorted(values, key=lambda value: (value != value, value))
    return ordered


class Ring:
    """One cell's last norms on the host: in the order of the ring, and sorted. As every state it never changes."""

    __slots__ = ("_ordered", "values")

    def __init__(self, values: list[float], ordered: list[float] | None = None) -> None:
        self.values, self._ordered = values, ordered

    def ordered(self, number: int) -> list[float]:
        """Return the first ``number`` values, ascending."""
        if self._ordered is None or len(self._ordered) != number:
            self._ordered = ascending(self.values[:number])
        return self._ordered

    def entered(self, seen: int, value: float) -> "Ring":
        """Return the ring with one more value than the ``seen`` before.

        Raises:
            TypeError: for what is no real number, such as a root of one below zero.
        """
        place, size, value = seen % len(self.values), len(self.values), float(value)
        values, ordered = self.values.copy(), self.ordered(min(seen, size)).copy()
        if seen >= size:
            gone = values[place]
            del ordered[bisect_left(ordered, gone) if gone == gone else -1]  # NaN is the last
        ordered.insert(bisect_left(ordered, value) if value == value else len(ordered), value)
        values[place] = value
        return Ring(values, ordered)


class NumberState(LazyState):
    """A state in numbers, each name's of the dtype that its tensor is to have."""

    __slots__ = ()

    dtypes: Mapping[str, torch.dtype]

    def __iter__(self) -> Iterator[str]:
        return iter(self.dtypes)

    def __len__(self) -> int:
        return len(self.dtypes)


class PlainState(NumberState):
    """The state of a few cells in plain numbers."""

    def __init__(self, cells: Sequence[tuple[Any, ...]], dtypes: Mapping[str, torch.dtype]) -> None:
        # what each cell keeps, in the order of ``dtypes``: whole and real numbers, and rings
        self.cells = cells
        self.dtypes = dtypes  # of the tensors that stand for them, by name

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "PlainState":
        """Return the state cell by cell, read from tensors unless it is plain already."""
        if isinstance(state, cls):
            return state
        rows = [tensor.tolist() for tensor in state.values()]
        cells = [
            tuple(Ring(value) if isinstance(value, list) else value for value in cell)
            for cell in zip(*rows, strict=True)
        ]
        return cls(cells, {key: tensor.dtype for key, tensor in state.items()})

    def __getitem__(self, key: str) -> Tensor:
        """Make [k] or [k, window] the tensor of this name anew."""
        dtype, place = self.dtypes[key], list(self.dtypes).index(key)
        found = [cell[place] for cell in self.cells]
        if not isinstance(found[0], Ring):
            return from_list(found, dtype)
        entries = list(chain.from_iterable(ring.values for ring in found))
        return from_list(entries, dtype).reshape(len(found), -1)


@dataclass(frozen=True, slots=True)
class CellLayout:
    """What of a `CompiledState` stays as it is."""

    dtypes: Mapping[str, torch.dtype]  # of the tensors that stand for the numbers, by name
    cells: int  # how many there are
    ring: int | None  # which of the names is of a ring, if one is
    window: int  # how many values each ring has; 0 where there is none


class CompiledState(NumberState):
    """The state of k cells in plain numbers, as a compiled formula takes and leaves them.

    As every state it never changes, but its rings are in memory that the states of all steps share, for to copy them
    would take longer than the rest of a step: what later states have entered is taken back where somebody looks. After
    as many steps as a ring is long a copy costs little, and who holds an old state does not hold all later ones.

    Attributes:
        layout: what stays as it is.
        numbers: float64: verdicts [k] and bounds [k] of the last step, and [k] what each name stands for, but for the
            ring; where there is one, [k, 2] which of its places was written in this step, from 1, and what was there.
        rings: float64 [k, 1 + 2 * window], how many of each ring are sorted, its values, and these sorted; as the last
            of the states has them.
        age: how many states have had these rings before.
    """

    __slots__ = ("_later", "age", "layout", "numbers", "rings")

    def __init__(self, layout: CellLayout, numbers: bytearray, rings: bytearray, age: int = 0) -> None:
        self.layout, self.numbers, self.rings, self.age = layout, numbers, rings, age
        self._later: CompiledState | None = None  # the state of the next step, if it has these rings

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:  # type: ignore[override]
        """Of the tensors that stand for the numbers, by name."""
        return self.layout.dtypes

    @classmethod
    def of(cls, state: Mapping[str, Tensor], cells: int, ring: int | None) -> "CompiledState | None":
        """Return the state of so many cells as such numbers, read from tensors unless it is so already; None if unfit.

        The tensors are [k], and [k, window] that of the ``ring``, by its place among the names.
        """
        if type(state) is CompiledState and (state.layout.cells, state.layout.ring) == (cells, ring):
            return state
        tensors, window = list(state.values()), 0
        if ring is not None:
            window = tensors[ring].shape[-1] if tensors[ring].dim() else 0
        shapes = [(cells, window) if i == ring else (cells,) for i in range(len(tensors))]
        if [tensor.shape for tensor in tensors] != shapes or (ring is not None and not window):
            return None
        numbers, rings = bytearray(16 * cells), bytearray()
        for i, tensor in enumerate(tensors):
            if i != ring:
                numbers += _packed(tensor)
        if ring is not None:
            numbers += bytearray(16 * cells)
            own = tensors[ring]
            rings += _packed(torch.cat([own.new_full((cells, 1), -1.0), own, own], dim=1).flatten())
        dtypes = {key: tensor.dtype for key, tensor in zip(state, tensors, strict=True)}
        return cls(CellLayout(dtypes, cells, ring, window), numbers, rings)

    def following(self) -> "CompiledState":
        """Return the state of the next step, whose numbers are still to be written, and norms to enter its rings."""
        if self._later is not None:
            self.rings, self._later = self._own_rings(), None
        numbers, rings = bytearray(len(self.numbers)), self.rings
        if self.age >= self.layout.window:  # also where there are no rings
            return CompiledState(self.layout, numbers, rings.copy())
        # Kept before anything enters, so that an interrupt in between does no harm.
        self._later = after = CompiledState(self.layout, numbers, rings, self.age + 1)
        return after

    def _own_rings(self) -> bytearray:
        """The rings as they were in this state."""
        later, last = list[CompiledState](), self
        while last._later is not None:
            last = last._later
            later.append(last)
        if not later:
            return self.rings
        rings = bytearray(last.rings)
        cells, row = self.layout.cells, 1 + 2 * self.layout.window
        values = torch.frombuffer(rings, dtype=torch.float64).view(cells, row)
        for state in reversed(later):
            written = torch.frombuffer(state.numbers, dtype=torch.float64)[-2 * cells :].view(cells, 2)
            own = written[:, 0].nonzero().flatten()
            values[own, written[own, 0].long()] = written[own, 1]
            values[own, 0] = -1.0  # what is sorted no longer is what is there
        return rings

    def __getitem__(self, key: str) -> Tensor:
        """Make [k] or [k, window] the tensor of this name anew."""
        layout = self.layout
        place, cells = list(layout.dtypes).index(key), layout.cells
        if place == layout.ring:
            rings = torch.frombuffer(self._own_rings(), dtype=torch.float64).view(cells, -1)
            own = rings[:, 1 : 1 + layout.window]
        else:
            row = 2 + place - (layout.ring is not None and place > layout.ring)
            own = torch.frombuffer(self.numbers, dtype=torch.float64).narrow(0, cells * row, cells)
        return own.to(layout.dtypes[key], copy=True, memory_format=torch.contiguous_format)


def _packed(numbers: Tensor) -> bytes:
    return pack(f"{numbers.shape[0]}d", *numbers.tolist())


class JoinedState(LazyState):
    """The states of a policy's parts as one, each name under its part's prefix, such as ``0.seen``."""

    __slots__ = ("parts",)

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.parts = parts

    def __getitem__(self, key: str) -> Tensor:
        prefix, _, rest = key.partition(".")
        return self.parts[prefix][rest]

    def __iter__(self) -> Iterator[str]:
        return (f"{prefix}.{key}" for prefix, state in self.parts.items() for key in state)
