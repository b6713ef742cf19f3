"""How a guard goes on from a trainer's checkpoint."""

import warnings
from collections.abc import Mapping
from typing import Any

from gradkeel.errors import CheckpointError, GradkeelWarning
from gradkeel.guard.guard import Guard


def go_on(guard: Guard, state: Mapping[str, Any] | None, step: int) -> None:
    """Load the guard's state out of a checkpoint; without one that fits, go on counting from the trainer's step."""
    if state is not None:
        try:
            guard.load_state_dict(state)
        except CheckpointError as error:
            warnings.warn(
                f"the checkpoint's guard does not fit, so its policies' statistics begin anew: {error}",
                GradkeelWarning,
                stacklevel=2,
            )
        else:
            return
    guard.load_state_dict({**guard.state_dict(), "step": step})
