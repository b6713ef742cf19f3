"""The only code that writes to gradients: one multiplication by prescale x clip, and the clamp of the value scope."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import native, triton_host
from gradkeel.norms import Decision, GradientNorms
from gradkeel.tensors import entries_to_scale, shares_memory


@torch.no_grad()
def apply(
    parameters: Sequence[Tensor],
    decision: Decision,
    measured: GradientNorms,
    *,
    prescale: Tensor | float,
    unit_dim: int | None = None,
) -> None:
    """Carry a decision out on the gradients of a selection, in place.

    Args:
        parameters: n parameters; those without a gradient are passed over.
        decision: what the policy wants.
        measured: the norms that it was decided on; tells where nothing is to be done.
        prescale: [] what turns the stored gradients into the true ones.
        unit_dim: the dimension that counts units, where the decision has unit coefficients.

    On CPU a gradient whose coefficient is exactly 1 is not touched. On an accelerator the host is not synced.
    """
    _scale(parameters, factors(decision, measured, prescale))
    if decision.unit_coefficients is not None:
        assert unit_dim is not None, "unit coefficients come with the dimension that counts units"
        _scale_units(parameters, decision.unit_coefficients, measured.unit_counts, unit_dim)
    if decision.clamp is not None:
        _clamp(parameters, decision.clamp, _peaks_after(decision, measured))


def _peaks_after(decision: Decision, measured: GradientNorms) -> Tensor | None:
    """[n, 2] lowest and highest entries after the scaling that comes before the clamp; None where unknown."""
    if measured.peaks is None or decision.unit_coefficients is not None:
        return None
    return (
        measured.peaks
        if decision.coefficients is None
        else measured.peaks * decision.coefficients.reshape(-1, 1)
    )


def factors(decision: Decision, measured: GradientNorms, prescale: Tensor | float) -> Tensor | None:
    """[] or [n] one factor for each parameter: prescale x clip; None where it is 1 without looking."""
    if decision.coefficients is None:
        if isinstance(prescale, float):
            return None if prescale == 1.0 else measured.norms.new_full((), prescale)
        return prescale
    return decision.coefficients * prescale


def _scale(parameters: Sequence[Tensor], factor: Tensor | None) -> None:
    if factor is None:
        return
    if factor.device.type == "cpu":
        _scale_on_host(parameters, factor)
        return
    rows = [factor] * len(parameters) if factor.dim() == 0 else list(factor.unbind())
    chosen = [
        (gradient, row) for p, row in zip(parameters, rows, strict=True) if (gradient := _own(p)) is not None
    ]
    _scale_on_device([entries_to_scale(gradient) for gradient, _ in chosen], [row for _, row in chosen])


def _own(parameter: Tensor) -> Tensor | None:
    """The gradient, copied first if its entries share memory, as those of an expanded gradient do."""
    gradient = parameter.grad
    if gradient is not None and shares_memory(gradient):
        parameter.grad = gradient = gradient.clone(memory_format=torch.contiguous_format)
    return gradient


def _scale_on_device(entries: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by its factor, [] on some device, without the host knowing the factors."""
    kernels = triton_host.kernels()
    table = None if kernels is None else kernels.table(entries)
    if kernels is not None and table is not None:
        kernels.scale(table, torch.stack([factor.to(entries[0].device) for factor in factors]))
        torch.autograd.graph.increment_version(entries)
        return
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(entries):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    for (device, dtype), members in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        moved = {id(factors[i]): factors[i].to(device, wide) for i in members}
        chosen, numbers = [entries[i] for i in members], [moved[id(factors[i])] for i in members]
        if dtype == wide:
            torch._foreach_mul_(chosen, numbers[0] if len(moved) == 1 else numbers)
            continue
        for tensor, number in zip(chosen, numbers, strict=True):
            # A factor without a dimension would be rounded to the gradient's dtype first; with one it promotes.
            tensor.mul_(number.reshape(1))


def _scale_on_host(parameters: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient whose factor is not 1; the host knows the factors."""
    if factor.dim() == 0:
        rows: Sequence[int] = range(0 if float(factor) == 1.0 else len(parameters))
    else:
        rows = [i for i, value in enumerate(factor.tolist()) if value != 1.0]
    rows, gradients = _with_gradients(parameters, rows)
    numbers = (
        factor.expand(len(rows))
        if factor.dim() == 0
        else factor[torch.tensor(rows, dtype=torch.int64, device="cpu")]
    )
    if not rows or _scale_natively(gradients, numbers):
        return
    entries = [entries_to_scale(own) for i in rows if (own := _own(parameters[i])) is not None]
    if _scale_natively(entries, numbers):
        return
    pairs = list(zip(entries, numbers.tolist(), strict=True))
    wide = [(entry, number) for entry, number in pairs if entry.dtype in (torch.float32, torch.float64)]
    if wide:
        torch._foreach_mul_([entry for entry, _ in wide], [number for _, number in wide])
    for entry, number in pairs:
        if entry.dtype not in (torch.float32, torch.float64):
            # mul_ multiplies in a wider type and rounds once; foreach would round the number first.
            entry.mul_(number)


def _with_gradients(parameters: Sequence[Tensor], rows: Sequence[int]) -> tuple[Sequence[int], list[Tensor]]:
    """Those of the rows whose parameters have a gradient, and these."""
    gradients = [parameters[i].grad for i in rows]
    held = [gradient for gradient in gradients if gradient is not None]
    if len(held) == len(gradients):
        return rows, held
    return [i for i, gradient in zip(rows, gradients, strict=True) if gradient is not None], held


def _scale_natively(tensors: Sequence[Tensor], numbers: Tensor) -> bool:
    """Whether the native kernels could do it."""
    kernels = native.kernels()
    table = None if kernels is None else kernels.table(tensors)
    if kernels is None or table is None:
        return False
    kernels.scale(table, numbers)
    return True


def _scale_units(parameters: Sequence[Tensor], coefficients: Tensor, counts: Sequence[int], dim: int) -> None:
    on_host = coefficients.device.type == "cpu"
    touched = _touched(coefficients, counts) if on_host else range(len(parameters))
    split = coefficients.split(list(counts))
    parts = [(gradient, split[i]) for i in touched if (gradient := _own(parameters[i])) is not None]
    kernels = native.kernels() if on_host and parts else None
    table = None if kernels is None else kernels.table([gradient for gradient, _ in parts], dim)
    if kernels is not None and table is not None:
        kernels.scale(table, torch.cat([part for _, part in parts]), by_unit=True)
        return
    for gradient, part in parts:
        entries = entries_to_scale(gradient)
        wide = torch.promote_types(entries.dtype, torch.float32)
        entries.mul_(_over_units(part.to(entries.device, wide), gradient, entries.dim(), dim))


def _touched(coefficients: Tensor, counts: Sequence[int]) -> list[int]:
    """Which parameters have a unit whose coefficient is not 1."""
    before = torch.nn.functional.pad((coefficients != 1).cumsum(0), (1, 0))  # how many before each unit
    ends = torch.nn.functional.pad(torch.tensor(counts, device="cpu").cumsum(0), (1, 0))
    touched: list[int] = before[ends].diff().nonzero().flatten().tolist()
    return touched


def _over_units(factors: Tensor, gradient: Tensor, dims: int, dim: int) -> Tensor:
    """One factor for each unit, shaped to multiply the gradient's stored entries, which have ``dims`` dimensions."""
    if factors.numel() > 1 and gradient.layout == torch.sparse_coo:
        # Stored entries are one row for each stored index.
        sparse = gradient.sparse_dim()
        factors, dim = (factors[gradient._indices()[dim]], 0) if dim < sparse else (factors, dim - sparse + 1)
    shape = [1] * dims
    if factors.numel() > 1 or gradient.dim() > 1:
        shape[dim] = factors.numel()
    return factors.reshape(shape)


def _clamp(parameters: Sequence[Tensor], limits: tuple[float, float], extremes: Tensor | None) -> None:
    low, high = limits
    outside = [True] * len(parameters)
    if extremes is not None and extremes.device.type == "cpu":
        # Written so that a NaN counts as outside.
        outside = (~((extremes[:, 0] >= low) & (extremes[:, 1] <= high))).tolist()
    chosen = [
        (p, gradient)
        for p, must in zip(parameters, outside, strict=True)
        if must and (gradient := _own(p)) is not None
    ]
    gradients = [gradient for _, gradient in chosen]
    kernels = None if any(map(Tensor.is_neg, gradients)) else native.kernels()
    table = None if kernels is None else kernels.table(gradients)
    if kernels is not None and table is not None:
        kernels.clamp(table, low, high)
        return
    for parameter, gradient in chosen:
        once = gradient.coalesce() if gradient.layout == torch.sparse_coo else gradient
        entries_to_scale(once).clamp_(low, high)
        parameter.grad = once
