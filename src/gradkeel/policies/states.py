"""States that the host keeps in plain numbers, and states of several parts; both are read as mappings of tensors."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from struct import pack
from typing import Any

import torch
from torch import Tensor

from gradkeel.norms import from_list

HOST = torch.device("cpu")


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are made when somebody asks for them."""

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and save the tensors that it stands for, so that ``weights_only`` loads it."""
        return OrderedDict, (), None, None, iter(self.items())

    def __repr__(self) -> str:
        return repr(dict(self))


class Ring:
    """One cell's last norms on the host: in the order of the ring, and sorted. As every state it never changes.

    To copy them all for each new one would take longer than all else. So a ring with one more value, once it is asked
    for its values, takes the lists of the one before over, which makes its own anew should it be asked again. Once in
    each round they are copied, so that an old ring that somebody keeps holds on to no more than a round of later ones.
    """

    __slots__ = ("_change", "_later", "_ordered", "_values", "size")

    def __init__(self, values: list[float] | None, change: "tuple[Ring, int, float] | None" = None) -> None:
        self.size: int = change[0].size if values is None and change is not None else len(values or ())
        self._values = values
        self._ordered: list[float] | None = None
        self._change = change  # the ring before, how many it has seen, and the new value
        # Who took the lists, and what it has put over which value.
        self._later: tuple[Ring, int, float] | None = None

    @property
    def values(self) -> list[float]:
        """The values in the order of the ring."""
        if self._change is not None:
            self._take_over(*self._change)
        if self._values is None:
            self._values = self._made_anew()
        return self._values

    def ordered(self, number: int) -> list[float]:
        """Return the first ``number`` values, ascending."""
        if self._change is not None:
            self._take_over(*self._change)
        if self._ordered is None or len(self._ordered) != number:
            self._ordered = sorted(self.values[:number])
        return self._ordered

    def entered(self, seen: int, value: float) -> "Ring":
        """Return the ring with one more value than the ``seen`` before.

        Raises:
            TypeError: for what is no real number, such as a root of one below zero.
        """
        if self._change is not None:  # so that there is never more than one change to make
            self._take_over(*self._change)
        return Ring(None, (self, seen, float(value)))

    def _take_over(self, before: "Ring", seen: int, value: float) -> None:
        size = self.size
        ordered, values = before.ordered(min(seen, size)), before.values
        place = seen % size
        was = values[place]
        if place == 0:
            values, ordered = values.copy(), ordered.copy()
        else:
            before._values, before._ordered, before._later = None, None, (self, place, was)
        if seen >= size:
            del ordered[bisect_left(ordered, was)]
        insort(ordered, value)
        values[place] = value
        self._values, self._ordered, self._change = values, ordered, None

    def _made_anew(self) -> list[float]:
        changes, ring = [], self
        while ring._later is not None:
            ring, place, was = ring._later
            changes.append((place, was))
        assert ring._values is not None, "the last of them has the lists"
        values = ring._values.copy()
        for place, was in reversed(changes):
            values[place] = was
        self._later = None
        return values


class NumberState(LazyState):
    """A state in numbers, each name's of the dtype that its tensor is to have."""

    dtypes: Mapping[str, torch.dtype]

    def __iter__(self) -> Iterator[str]:
        return iter(self.dtypes)

    def __len__(self) -> int:
        return len(self.dtypes)


class PlainState(NumberState):
    """The state of a few cells in plain numbers.

    Attributes:
        cells: what each cell keeps, in the order of ``dtypes``: whole and real numbers, and rings.
        dtypes: of the tensors that stand for them, by name.
    """

    def __init__(self, cells: Sequence[tuple[Any, ...]], dtypes: Mapping[str, torch.dtype]) -> None:
        self.cells = cells
        self.dtypes = dtypes

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
class Layout:
    """What of a `CompiledState` stays as it is.

    Attributes:
        dtypes: of the tensors that stand for the numbers, by name.
        cells: how many there are.
        ring: which of the names is of a ring, if one is.
        window: how many values each ring has; 0 where there is none.
    """

    dtypes: Mapping[str, torch.dtype]
    cells: int
    ring: int | None
    window: int


class CompiledState(NumberState):
    """The state of k cells in plain numbers, as a compiled formula takes and leaves them.

    Attributes:
        layout: what stays as it is.
        numbers: float64: verdicts [k] and bounds [k] of the last step, and [k] what each name stands for, but for the
            ring: of that [k, 1 + 2 * window], how many of it are sorted, its values, and these sorted.
    """

    def __init__(self, layout: Layout, numbers: bytearray) -> None:
        self.layout, self.numbers = layout, numbers

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:  # type: ignore[override]
        """Of the tensors that stand for the numbers, by name."""
        return self.layout.dtypes

    @classmethod
    def of(cls, state: Mapping[str, Tensor], cells: int, ring: int | None) -> "CompiledState | None":
        """Return the state as such numbers, read from tensors unless it is so already; None if these do not fit.

        Args:
            state: [k] each name, and [k, window] that of the ring.
            cells: k.
            ring: which of the names is of a ring.
        """
        if type(state) is CompiledState and (state.layout.cells, state.layout.ring) == (cells, ring):
            return state
        tensors, window = list(state.values()), 0
        if ring is not None:
            window = tensors[ring].shape[-1] if tensors[ring].dim() else 0
        shapes = [(cells, window) if i == ring else (cells,) for i in range(len(tensors))]
        if [tensor.shape for tensor in tensors] != shapes or (ring is not None and not window):
            return None
        columns = [tensor for i, tensor in enumerate(tensors) if i != ring]
        if ring is not None:
            unsorted = tensors[ring].new_full((cells, 1), -1.0)
            columns.append(torch.cat([unsorted, tensors[ring], tensors[ring]], dim=1).flatten())
        numbers = bytearray(16 * cells)
        for column in columns:
            numbers += pack(f"{column.shape[0]}d", *column.tolist())
        dtypes = {key: tensor.dtype for key, tensor in zip(state, tensors, strict=True)}
        return cls(Layout(dtypes, cells, ring, window), numbers)

    def __getitem__(self, key: str) -> Tensor:
        """Make [k] or [k, window] the tensor of this name anew."""
        layout, numbers = self.layout, torch.frombuffer(self.numbers, dtype=torch.float64)
        place, cells = list(layout.dtypes).index(key), layout.cells
        if place == layout.ring:
            rings = numbers[cells * (1 + len(layout.dtypes)) :].reshape(cells, -1)
            own = rings[:, 1 : 1 + layout.window]
        else:
            row = 2 + place - (layout.ring is not None and place > layout.ring)
            own = numbers.narrow(0, cells * row, cells)
        return own.to(layout.dtypes[key], copy=True, memory_format=torch.contiguous_format)


class JoinedState(LazyState):
    """The states of a policy's parts as one, each name under its part's prefix, such as ``0.seen``."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.parts = parts

    def __getitem__(self, key: str) -> Tensor:
        prefix, _, rest = key.partition(".")
        return self.parts[prefix][rest]

    def __iter__(self) -> Iterator[str]:
        return (f"{prefix}.{key}" for prefix, state in self.parts.items() for key in state)
