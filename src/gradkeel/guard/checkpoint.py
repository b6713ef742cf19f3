"""What a guard's saved state must have in common with the guard that it is loaded into."""

import operator
from collections.abc import Collection, Mapping
from typing import Any, SupportsIndex

from torch import Tensor

from gradkeel.errors import CheckpointError
from gradkeel.norms import State

_PARTS = {
    "step": SupportsIndex,
    "consecutive_skips": SupportsIndex,
    "policies": Mapping,
    "parameters": Mapping,
    "states": Mapping,
}


def check_mapping(owner: str, state: object) -> None:
    """Raise `CheckpointError` unless what ``owner.load_state_dict`` was given may be a state."""
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{owner}.load_state_dict(state=...): state must be what {owner}.state_dict() gave, not "
            f"{type(state).__name__}"
        )


def check_parts(owner: str, state: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless a state has these parts, each of its kind."""
    for key, kind in parts.items():
        if not _is(state.get(key), kind):
            raise CheckpointError(
                f"{owner}.load_state_dict(state=...): {key!r} in it must be as {owner}.state_dict() gives it, not "
                f"{type(state[key]).__name__ if key in state else 'missing'}"
            )


def _is(value: Any, kind: Any) -> bool:
    if kind is not SupportsIndex:
        return isinstance(value, kind)
    try:
        operator.index(value)  # an array or a tensor may be one whole number, or not
    except TypeError:
        return False
    return True


def check_state(
    state: Mapping[str, Any],
    *,
    version: int,
    policies: Mapping[str, str],
    parameters: Mapping[str, int],
    states: Mapping[str, State],
    finite: Collection[str],
) -> None:
    """Raise `CheckpointError` unless a guard's saved state belongs to these policies, parameters and groups.

    A policy that remembers nothing may be another one than before: with a lower bound, for instance. ``states`` are
    those that the policies start with: what is finite there stays finite, of those whose labels are in ``finite``.
    """
    check_mapping("guard", state)
    if state.get("version") != version:
        raise CheckpointError(f"state has version {state.get('version')!r}; this gradkeel reads {version}")
    check_parts("guard", state, _PARTS)
    check_parts("guard", state["states"], dict.fromkeys(state["states"], Mapping))
    for values in state["states"].values():
        check_parts("guard", values, dict.fromkeys(values, Tensor))
    remembering = [
        label for label in {**state["states"], **states} if state["states"].get(label) or states.get(label)
    ]
    if any(state["policies"].get(label) != policies.get(label) for label in remembering):
        raise CheckpointError(
            f"state belongs to the policies {state['policies']}, but this guard has {policies}; attach with the same "
            "policies and groups, or do not load it, so that statistics begin anew"
        )
    if state["parameters"] != parameters:
        raise CheckpointError(
            f"state belongs to so many parameters: {state['parameters']}, but this guard has {parameters}; attach to "
            "the same parameters with the same exclude"
        )
    for label, own in states.items():
        saved = state["states"].get(label, {})
        for key in own.keys() & saved.keys():
            if saved[key].shape != own[key].shape:
                raise CheckpointError(
                    f"state of {label!r} holds {key!r} of the shape {list(saved[key].shape)}, and this guard's has "
                    f"{list(own[key].shape)}; attach to the same parameter groups, or do not load it, so that "
                    "statistics begin anew"
                )
            # Coefficients that follow from it would not be numbers, and gradients neither.
            if label in finite and own[key].isfinite().all() and not saved[key].isfinite().all():
                raise CheckpointError(
                    f"state of {label!r} holds {key!r} with a NaN or inf, which no norm has left there; load another "
                    "checkpoint, or do not load it, so that statistics begin anew"
                )
