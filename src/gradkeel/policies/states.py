"""States that the host keeps in plain numbers, and states of several parts; both are read as mappings of tensors."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
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
    """One cell's last norms on the host: in the order of the ring, and sorted. Never changed, as no state is."""

    __slots__ = ("_ordered", "values")

    def __init__(self, values: list[float], ordered: list[float] | None = None) -> None:
        self.values = values
        self._ordered = ordered

    def ordered(self, number: int) -> list[float]:
        """Return the first ``number`` values, ascending."""
        if self._ordered is None or len(self._ordered) != number:
            self._ordered = sorted(self.values[:number])
        return self._ordered

    def entered(self, seen: int, value: float) -> "Ring":
        """Return the ring with one more value than the ``seen`` before; what was sorted stays so."""
        values, place = self.values.copy(), seen % len(self.values)
        ordered = self.ordered(min(seen, len(values))).copy()
        if seen >= len(values):
            del ordered[bisect_left(ordered, values[place])]
        insort(ordered, value)
        values[place] = value
        return Ring(values, ordered)


class PlainState(LazyState):
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

    def __iter__(self) -> Iterator[str]:
        return iter(self.dtypes)

    def __len__(self) -> int:
        return len(self.dtypes)


class JoinedState(LazyState):
    """The states of a policy's parts as one, each name under its part's prefix, such as ``0.seen``."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.parts = parts

    def __getitem__(self, key: str) -> Tensor:
        prefix, _, rest = key.partition(".")
        return self.parts[prefix][rest]

    def __iter__(self) -> Iterator[str]:
        return (f"{prefix}.{key}" for prefix, state in self.parts.items() for key in state)
