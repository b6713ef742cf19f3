"""What a guard's saved state must have in common with the guard that it is loaded into."""

from collections.abc import Mapping
from typing import Any

from gradkeel.errors import CheckpointError
from gradkeel.norms import State


def check_state(
    state: Mapping[str, Any],
    *,
    version: int,
    policies: Mapping[str, str],
    parameters: Mapping[str, int],
    states: Mapping[str, State],
) -> None:
    """Raise `CheckpointError` unless a guard's saved state belongs to these policies, parameters and groups.

    A policy that remembers nothing may be another one than before: with a lower bound, for instance. ``states`` are
    those that the policies start with: what is finite there stays finite.
    """
    if state.get("version") != version:
        raise CheckpointError(f"state has version {state.get('version')!r}; this gradkeel reads {version}")
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
            if bool(own[key].isfinite().all()) and not bool(saved[key].isfinite().all()):
                raise CheckpointError(
                    f"state of {label!r} holds {key!r} with a NaN or inf, which no norm has left there; load another "
                    "checkpoint, or do not load it, so that statistics begin anew"
                )
