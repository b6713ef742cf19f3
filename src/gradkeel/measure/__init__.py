"""Reads each gradient once and returns norms of the true gradients; nothing else reads gradients."""

import torch
from torch import Tensor

from gradkeel.measure.placement import entries_by_position, entries_to_read
from gradkeel.measure.powers import peaks, tensor_norms, unit_count, unit_norms, wide_dtype
from gradkeel.norms import GradientNorms, Needs, combine
from gradkeel.selection import Selection

__all__ = ["measure", "measure_total", "wide_dtype"]


@torch.no_grad()
def measure(
    selection: Selection,
    needs: Needs,
    *,
    device: torch.device,
    prescale: Tensor | float = 1.0,
    step: int = 1,
    loss: Tensor | None = None,
) -> tuple[GradientNorms, tuple[bool, ...]]:
    """Norms of a selection's gradients times ``prescale``, and which of its parameters had a gradient.

    Args:
        selection: n parameters; one without a gradient gets the norm 0.
        needs: norm type, and whether weights, units or peaks are wanted too.
        device: where the norms are put together.
        prescale: [] what turns the stored gradients into the true ones, above 0.
        step: number of the step, from 1.
        loss: [] loss of the step, if known.

    Does not sync the host on an accelerator.
    """
    gradients = [parameter.grad for parameter in selection.parameters]
    present = tuple(gradient is not None for gradient in gradients)
    entries = [entries_to_read(gradient) for gradient in gradients if gradient is not None]
    norms = _spread(tensor_norms(entries, needs.norm_type, device), present) * prescale
    weights = units = unit_weights = extremes = None
    counts: tuple[int, ...] = ()
    unit_sizes: tuple[int, ...] = ()
    if needs.weights:
        weights = tensor_norms([entries_to_read(p) for p in selection.parameters], needs.norm_type, device)
    if needs.unit_dim is not None:
        counts = tuple(unit_count(p.shape, needs.unit_dim) for p in selection.parameters)
        unit_sizes = tuple(p.numel() // max(1, k) for p, k in zip(selection.parameters, counts, strict=True))
        units = _units(gradients, counts, needs, device) * prescale
        if needs.weights:
            unit_weights = _units(list(selection.parameters), counts, needs, device)
    if needs.peaks:
        extremes = _spread(peaks(entries, device), present) * prescale
    measured = GradientNorms(
        names=selection.names,
        norms=norms,
        total=combine(norms, needs.norm_type),
        norm_type=needs.norm_type,
        groups=selection.groups,
        step=step,
        sizes=tuple(p.numel() for p in selection.parameters),
        weights=weights,
        units=units,
        unit_weights=unit_weights,
        unit_counts=counts,
        unit_sizes=unit_sizes,
        peaks=extremes,
        loss=loss,
    )
    return measured, present


def measure_total(gradients: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """[] float64 norm of all these tensors taken together."""
    return combine(tensor_norms([entries_to_read(g) for g in gradients], norm_type, device), norm_type)


def _spread(values: Tensor, present: tuple[bool, ...]) -> Tensor:
    if all(present):
        return values
    # Stacked rather than written by index: an index would have to travel to the device, which syncs.
    rows = iter(values.unbind())
    zero = values.new_zeros(values.shape[1:])
    return torch.stack([next(rows) if here else zero for here in present])


def _units(tensors: list[Tensor | None], counts: tuple[int, ...], needs: Needs, device: torch.device) -> Tensor:
    assert needs.unit_dim is not None
    parts = [
        torch.zeros(count, dtype=wide_dtype(device), device=device)
        if tensor is None
        else unit_norms(entries_by_position(tensor), count, needs.unit_dim, needs.norm_type).to(device)
        for tensor, count in zip(tensors, counts, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=wide_dtype(device), device=device)
