"""Many small tensors in one piece of memory, so that what a step came to is kept by one copy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_BYTES = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in a row: in how many words of 8 bytes, from which on."""

    shape: torch.Size
    dtype: torch.dtype
    first: int

    @property
    def size(self) -> int:
        """Its number of entries, a word each."""
        return math.prod(self.shape)


def packed(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Place]]:
    """[w] float64 words with each entry of the tensors, and where each tensor stands; does not sync the host.

    Floats are kept as float64, the rest as int64 bit patterns: exact.
    """
    words, places, first = [], [], 0
    for tensor in tensors:
        wide = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)
        words.append(wide.reshape(-1).view(torch.float64))
        places.append(Place(tensor.shape, tensor.dtype, first))
        first += places[-1].size
    return torch.cat(words), places


def read(words: Tensor, place: Place) -> Tensor:
    """The tensor at a place: a view where its dtype is float64, int64 or bool, else a copy."""
    shape, strides = place.shape, _strides(place.shape)
    if place.dtype == torch.bool:  # the first byte of a word, for hosts and devices are little-endian
        bits = words.view(torch.bool)
        first = bits.storage_offset() + _BYTES * place.first
        return bits.as_strided(shape, [_BYTES * stride for stride in strides], first)
    wide = words if place.dtype.is_floating_point else words.view(torch.int64)
    return wide.as_strided(shape, strides, wide.storage_offset() + place.first).to(place.dtype)


@lru_cache(maxsize=256)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= max(1, length)
    return tuple(strides[::-1])
