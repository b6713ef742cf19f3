"""Scaling and clamping where the host knows the factors: on CPU, and by numbers of the host's own."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.apply.device import over_units, own
from gradkeel.kernels import native
from gradkeel.tensors import entries_to_scale, limits_of

LEAST = torch.finfo(torch.float32).tiny
"""Below this a float32 factor loses digits, and at last becomes 0."""
# A power of two rounds nothing that is not 0 in the end.
_FIRST = 2.0**-100
_MANY = 4096
"""Numbers up to here are looked at faster one by one."""


def scale(
    parameters: Sequence[Tensor], factor: float | list[float], table: native.Table | None = None
) -> None:
    """Multiply each gradient whose factor, a number for all or one of n, is not 1; ``table``: where all of them lie."""
    if isinstance(factor, float):
        if factor == 1.0:
            return
        if 0.0 < factor < LEAST:
            scale(parameters, _FIRST, table)
            scale(parameters, factor / _FIRST, table)
            return
    elif any(0.0 < own < LEAST for own in factor):
        scale(parameters, [_FIRST if 0.0 < own < LEAST else 1.0 for own in factor], table)
        scale(parameters, [own / _FIRST if 0.0 < own < LEAST else own for own in factor], table)
        return
    if table is not None and native.scale(table, factor):
        return
    numbers = factor
    if not isinstance(factor, float):
        rows = [i for i, own in enumerate(factor) if own != 1.0 and parameters[i].grad is not None]
        parameters, numbers = [parameters[i] for i in rows], [factor[i] for i in rows]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or native.scale(gradients, numbers):
        return
    entries = [entries_to_scale(gradient) for p in parameters if (gradient := own(p)) is not None]
    if native.scale(entries, numbers):
        return
    each = [numbers] * len(entries) if isinstance(numbers, float) else numbers
    wide = [i for i, entry in enumerate(entries) if entry.dtype in (torch.float32, torch.float64)]
    if wide:
        torch._foreach_mul_([entries[i] for i in wide], [each[i] for i in wide])
    for entry, number in zip(entries, each, strict=True):
        if entry.dtype not in (torch.float32, torch.float64):
            # mul_ multiplies in a wider type and rounds once; foreach would round the number first.
            entry.mul_(number)


def scale_units(parameters: Sequence[Tensor], coefficients: Tensor, counts: Sequence[int], dim: int) -> None:
    """Multiply each unit along ``dim`` by its coefficient, [u] on CPU; gradients whose units all have 1 stay untouched.

    The coefficients stand parameter after parameter, so many for each as ``counts`` says, with a gradient or without.
    """
    least, most = (end.item() for end in coefficients.aminmax()) if coefficients.numel() else (1.0, 1.0)
    if least == most == 1.0:
        return
    if least < LEAST:
        is_tiny = (coefficients > 0) & (coefficients < LEAST)
        if bool(is_tiny.any()):
            first = torch.where(is_tiny, _FIRST, 1.0).to(coefficients)
            scale_units(parameters, first, counts, dim)
            coefficients = coefficients / first
    split = coefficients.split(list(counts))
    parts = [(own(parameters[i]), split[i]) for i in _touched(coefficients, counts)]
    held = [(gradient, part) for gradient, part in parts if gradient is not None]
    if not held or native.scale(
        [gradient for gradient, _ in held], torch.cat([part for _, part in held]), dim
    ):
        return
    for gradient, part in held:
        entries = entries_to_scale(gradient)
        wide = torch.promote_types(entries.dtype, torch.float32)
        entries.mul_(over_units(part.to(entries.device, wide), gradient, entries.dim(), dim))


def _touched(coefficients: Tensor, counts: Sequence[int]) -> list[int]:
    """Which parameters have a unit whose coefficient is not 1."""
    if coefficients.numel() <= _MANY:
        values, starts = coefficients.tolist(), itertools.accumulate(counts, initial=0)
        each = enumerate(zip(starts, counts, strict=False))
        return [i for i, (start, count) in each if values[start : start + count].count(1.0) != count]
    before = torch.nn.functional.pad((coefficients != 1).cumsum(0), (1, 0))  # how many before each unit
    ends = torch.nn.functional.pad(torch.tensor(counts, device="cpu").cumsum(0), (1, 0))
    touched: list[int] = before[ends].diff().nonzero().flatten().tolist()
    return touched


def clamp(parameters: Sequence[Tensor], limits: tuple[float, float], peaks: Tensor | None) -> None:
    """Clamp every entry into ``limits``; with ``peaks`` [n, 2] on CPU only gradients that have one outside."""
    low, high = limits
    outside = [True] * len(parameters)
    if peaks is not None and peaks.device.type == "cpu":
        # Written so that a NaN counts as outside.
        outside = (~((peaks[:, 0] >= low) & (peaks[:, 1] <= high))).tolist()
    chosen = [
        (p, gradient)
        for p, must in zip(parameters, outside, strict=True)
        if must and (gradient := own(p)) is not None
    ]
    if native.clamp([gradient for _, gradient in chosen], low, high):
        return
    for parameter, gradient in chosen:
        once = gradient.coalesce() if gradient.layout == torch.sparse_coo else gradient
        entries = entries_to_scale(once)
        entries.clamp_(*limits_of(entries.dtype, low, high))
        parameter.grad = once
