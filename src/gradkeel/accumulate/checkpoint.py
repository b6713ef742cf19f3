"""This module knows what belongs to an accumulator's checkpoint, and refuses what does not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradkeel.errors import CheckpointError
from gradkeel.guard.guard import Guard


def by_names(guard: Guard, held: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """Copy what is held for each parameter, under its name."""
    pairs = zip(guard.names, guard.parameters, strict=True)
    return {name: held[parameter].detach().clone() for name, parameter in pairs if parameter in held}


def saved_sums(guard: Guard, sums: Mapping[str, Mapping[Tensor, Tensor]]) -> dict[str, Any]:
    """Return what is kept apart from ``.grad``; by denominator, where there are several."""
    named = {per: by_names(guard, held) for per, held in sums.items()}
    is_one = len(named) <= 1
    return {"sums": next(iter(named.values()), {}) if is_one else {}, "apart": {} if is_one else named}


def check(
    state: Mapping[str, Any], mine: Mapping[str, Any], *, names: Sequence[str], has_wide_sums: bool
) -> None:
    """Raise `CheckpointError` unless a saved window fits this accumulator."""
    for key, value in mine.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"accumulator state has {key}={state.get(key)!r}, but this Accumulator {key}={value!r}; resume with "
                "the same, or start at a window's beginning without loading it"
            )
    parts = [state["gradients"], state["sums"], *state["apart"].values()]
    unknown = [name for part in parts for name in part if name not in set(names)]
    if unknown:
        raise CheckpointError(f"accumulator state knows parameters that are not here: {', '.join(unknown)}")
    if state["sums"] and not has_wide_sums:
        raise CheckpointError("accumulator state holds wide sums; make the Accumulator with accumulate_dtype")
