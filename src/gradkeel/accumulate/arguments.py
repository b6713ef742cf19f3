"""What an accumulator may be made of."""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import nn

from gradkeel.errors import check_kind
from gradkeel.guard.guard import Guard

Reduction = Literal["sum", "mean"]
ITEM = "item"


def check_arguments(
    guard: Guard,
    steps: int,
    model: nn.Module | None,
    reduction: Reduction,
    per: Sequence[str],
    accumulate_dtype: torch.dtype | None,
    *,
    noise_scale: bool,
) -> None:
    """Raise `ValueError` or `TypeError` for what `Accumulator` cannot do with."""
    check_kind(guard, Guard, "Accumulator(guard=...)", "guard must be what attach() returns")
    check_kind(model, nn.Module | None, "Accumulator(model=...)", "model must be a torch.nn.Module")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"Accumulator(steps={steps!r}): steps must be an int, at least 1")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"Accumulator(reduction={reduction!r}): reduction must be 'sum' or 'mean'")
    rule = "accumulate_dtype must be a torch.dtype such as torch.float32, or None"
    check_kind(accumulate_dtype, torch.dtype | None, "Accumulator(accumulate_dtype=...)", rule)
    if accumulate_dtype is not None and not accumulate_dtype.is_floating_point:
        raise ValueError(f"Accumulator(accumulate_dtype={accumulate_dtype}): must be floating, or None")
    if not _are_names(per):
        raise ValueError(f"Accumulator(per={per!r}): must be different names, as ('token', 'sequence')")
    if noise_scale and len(per) > 1:
        raise ValueError("Accumulator(noise_scale=True, per=...): the noise scale needs one denominator")


def _are_names(per: object) -> bool:
    if (
        not isinstance(per, Collection)
        or isinstance(per, str)
        or not all(isinstance(name, str) for name in per)
    ):
        return False
    return 0 < len(per) == len(set(per))


def check_loader(loader: object) -> None:
    """Raise `TypeError` for what cannot be gone through."""
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(
            "accumulate(loader=...): loader must be an iterable of batches, such as a DataLoader, not "
            f"{type(loader).__name__}"
        )
