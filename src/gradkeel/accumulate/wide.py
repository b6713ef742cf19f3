"""Sums of gradients that are kept apart from ``.grad``: in a wider dtype, or for a denominator of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.apply.skip import is_kept
from gradkeel.kernels import native
from gradkeel.tensors import local_part

CHUNK = 262_144
"""Entries that are widened at a time: small enough for the cache, and adding float32 to float32 is vectorised."""


class WideSums:
    """Sums of gradients, at least as wide as ``dtype``, kept apart from ``.grad`` until the window closes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def take(self, parameters: Sequence[Tensor]) -> None:
        """Add every gradient to its sum and clear it, as a skip does."""
        sums, gradients, kept = list[Tensor](), list[Tensor](), list[Tensor]()
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if keeps := is_kept(parameter, gradient):
                kept.append(gradient)
            else:
                parameter.grad = None
            if gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            if parameter not in self.sums:
                # A gradient that is wide enough and nobody else's is taken as it is.
                dtype = torch.promote_types(gradient.dtype, self._dtype)
                self.sums[parameter] = gradient.to(dtype, copy=keeps)
            else:
                sums.append(self.sums[parameter])
                gradients.append(gradient)
        add_(sums, gradients)
        for gradient in kept:
            gradient.zero_()

    @torch.no_grad()
    def pour(self) -> None:
        """Put every sum into ``.grad``, in the gradient's own dtype, and forget it."""
        for parameter, total in self.sums.items():
            if parameter.grad is None:
                parameter.grad = total.to(parameter.dtype)
            else:  # its memory is kept
                parameter.grad.copy_(total)
        self.sums.clear()

    @torch.no_grad()
    def absorb(self, others: Sequence["WideSums"], factors: Sequence[Tensor]) -> None:
        """Multiply these sums by the first factor, add the others times theirs, and clear those."""
        for one, factor in zip((self, *others), factors, strict=True):
            for total in map(local_part, one.sums.values()):
                total.mul_(factor.to(total.device))
        for other in others:
            both = [parameter for parameter in other.sums if parameter in self.sums]
            add_([self.sums[p] for p in both], [other.sums[p] for p in both])
            self.sums = other.sums | self.sums
            other.sums = {}


def add_(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Do ``sum += gradient`` for each pair, whose gradient may be narrower than its sum."""
    if all(map(_lie_alike, sums, gradients)) and native.add(sums, gradients):
        return
    for total, gradient in zip(sums, gradients, strict=True):
        if total.dtype == gradient.dtype or total.device.type != "cpu" or not total.is_contiguous():
            total.add_(gradient)
            continue
        # By chunks: `add_` of mixed dtypes is not vectorised on CPU.
        flat, narrow = total.view(-1), gradient.reshape(-1)
        scratch = torch.empty(min(CHUNK, flat.numel()), dtype=total.dtype, device="cpu")
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            part.add_(scratch[: part.numel()].copy_(narrow[start : start + CHUNK]))


def _lie_alike(total: Tensor, gradient: Tensor) -> bool:
    """Tell whether the kernel may add them entry by entry, as they lie in memory."""
    return (
        total.dtype in (torch.float32, torch.float64)
        and total.shape == gradient.shape
        and total.stride() == gradient.stride()
        and not total.is_neg()
        and not gradient.is_neg()
    )
