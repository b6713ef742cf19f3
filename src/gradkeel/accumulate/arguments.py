"""What an accumulator may be made of."""

from collections.abc import Sequence
from typing import Literal

import torch

from gradkeel.guard.guard import Guard

Reduction = Literal["sum", "mean"]
ITEM = "item"


def check_arguments(
    guard: Guard,
    steps: int,
    reduction: Reduction,
    per: Sequence[str],
    accumulate_dtype: torch.dtype | None,
    *,
    noise_scale: bool,
) -> None:
    """Raise `ValueError` or `TypeError` for what `Accumulator` cannot do with."""
    if not isinstance(guard, Guard):
        raise TypeError(f"Accumulator(guard={type(guard).__name__}): guard must be what attach() returns")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"Accumulator(steps={steps!r}): steps must be an int, at least 1")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"Accumulator(reduction={reduction!r}): reduction must be 'sum' or 'mean'")
    if accumulate_dtype is not None and not accumulate_dtype.is_floating_point:
        raise ValueError(f"Accumulator(accumulate_dtype={accumulate_dtype}): must be floating, or None")
    if isinstance(per, str) or not per or len(set(per)) < len(per):
        raise ValueError(f"Accumulator(per={per!r}): must be different names, as ('token', 'sequence')")
    if noise_scale and len(per) > 1:
        raise ValueError("Accumulator(noise_scale=True, per=...): the noise scale needs one denominator")
