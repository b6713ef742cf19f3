"""What gradients are multiplied by besides clipping: 1 / loss scale, 1 / window weight, read before measuring.

The attributes by which ``torch.amp.GradScaler`` talks to an optimizer, ``grad_scale`` and ``found_inf``, come in and
go out here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkeel.measure import wide_dtype

_ATTRIBUTES = ("grad_scale", "found_inf")


@dataclass(frozen=True, slots=True, eq=False)
class LossScale:
    """What a GradScaler set on the optimizer for the step under way."""

    present: bool = False  # whether a scaler drives this step
    # [] what gradients must be divided by, or None where they are unscaled already
    scale: Tensor | None = None
    found_inf: Tensor | None = None  # [] above 0 where the scaler saw a non-finite gradient


_NONE = LossScale()


def take_loss_scale(optimizer: Optimizer, own: Mapping[str, Tensor]) -> LossScale:
    """Take the scaler's attributes off the optimizer (non-fused optimizers refuse to run with them).

    ``own`` are those that gradkeel itself set for a step that then raised, and so left behind. A scaler multiplies its
    scale into the one it finds, or, after an explicit ``unscale_``, passes it on as it is.
    """
    if not own and vars(optimizer).keys().isdisjoint(_ATTRIBUTES):
        return _NONE
    given = {name: vars(optimizer)[name] for name in _ATTRIBUTES if name in vars(optimizer)}
    remove_attributes(optimizer)
    given = {name: value for name, value in given.items() if value is not own.get(name, given)}
    scale = given.get("grad_scale")
    if scale is not None and "grad_scale" in own:
        scale = scale / own["grad_scale"].to(scale.device)
    found_inf = given.get("found_inf")
    # Where no parameter had a gradient the scaler passes the number 0.
    return LossScale(bool(given), scale, found_inf if isinstance(found_inf, Tensor) else None)


def put_back(optimizer: Optimizer, loss_scale: LossScale) -> None:
    """Give the scaler its attributes back, which it deletes after the step."""
    remove_attributes(optimizer)
    if loss_scale.present:
        set_attribute(optimizer, "grad_scale", loss_scale.scale)
        set_attribute(optimizer, "found_inf", loss_scale.found_inf)


def set_attribute(optimizer: Optimizer, name: str, value: Any) -> None:
    """Set an attribute that torch reads by name."""
    setattr(optimizer, name, value)


def remove_attributes(optimizer: Optimizer) -> None:
    """Delete ``grad_scale`` and ``found_inf``; None would not be enough for GradScaler."""
    for name in _ATTRIBUTES:
        if name in vars(optimizer):
            delattr(optimizer, name)


def prescale(loss_scale: LossScale, window: Tensor | float, device: torch.device) -> Tensor | float:
    """[] the one factor that turns the stored gradients into the true ones: ``window / loss scale``."""
    if loss_scale.scale is None:
        return window
    inverse = 1.0 / loss_scale.scale.to(device, wide_dtype(device))
    return inverse * window
