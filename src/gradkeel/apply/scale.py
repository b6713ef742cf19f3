"""The only code that writes to gradients: one multiplication by prescale x clip, and the clamp of the value scope."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.measure.placement import entries_to_scale
from gradkeel.norms import Decision, GradientNorms


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
    return measured.peaks if decision.coefficients is None else measured.peaks * decision.coefficients.reshape(-1, 1)


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
        values = factor.expand(len(parameters)).tolist()
        chosen = [
            (p.grad, v) for p, v in zip(parameters, values, strict=True) if p.grad is not None and v != 1.0
        ]
        if chosen:
            # Python numbers are multiplied in the kernel's own wider type and rounded once, bfloat16 included.
            torch._foreach_mul_([entries_to_scale(g) for g, _ in chosen], [v for _, v in chosen])
        return
    rows = [factor] * len(parameters) if factor.dim() == 0 else list(factor.unbind())
    for parameter, row in zip(parameters, rows, strict=True):
        if parameter.grad is not None:
            _multiply(entries_to_scale(parameter.grad), row)


def _multiply(entries: Tensor, factor: Tensor) -> None:
    # A 0-dim device tensor would be rounded to the gradient's dtype first; with a dimension it promotes.
    entries.mul_(
        factor.to(entries.device, torch.float64 if entries.dtype == torch.float64 else torch.float32).reshape(
            1
        )
    )


def _scale_units(parameters: Sequence[Tensor], coefficients: Tensor, counts: Sequence[int], dim: int) -> None:
    for parameter, part in zip(parameters, coefficients.split(list(counts)), strict=True):
        if parameter.grad is None or (part.device.type == "cpu" and bool((part == 1).all())):
            continue
        entries = entries_to_scale(parameter.grad)
        wide = torch.promote_types(entries.dtype, torch.float32)
        entries.mul_(_over_units(part.to(entries.device, wide), parameter.grad, entries.dim(), dim))


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
    for parameter, must in zip(parameters, outside, strict=True):
        if parameter.grad is None or not must:
            continue
        if parameter.grad.layout == torch.sparse_coo:
            parameter.grad = parameter.grad.coalesce()
        entries_to_scale(parameter.grad).clamp_(low, high)
