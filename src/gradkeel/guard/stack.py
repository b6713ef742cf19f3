"""Who is on the call stack: the one place that walks it."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


def frames() -> Iterator[FrameType]:
    """The callers' frames, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_inside(function: str) -> bool:
    """Whether a function of this name is running."""
    return any(frame.f_code.co_name == function for frame in frames())


def scaler() -> Any:
    """The GradScaler that is making a step; None where there is none."""
    inside = (frame for frame in frames() if frame.f_globals.get("__name__") == "torch.amp.grad_scaler")
    return next((frame.f_locals["self"] for frame in inside if "self" in frame.f_code.co_varnames), None)


def callers(*packages: str) -> Iterator[Any]:
    """The objects whose methods, defined in one of these packages, are on the call stack, outermost first.

    Before Python 3.13 a frame whose variables were read keeps all of them alive until it ends. So nobody else's are
    read, and of a trainer's own those of its entry point first, which hold no batch.
    """
    found = [
        frame
        for frame in frames()
        if frame.f_globals.get("__name__", "").partition(".")[0] in packages
        and "self" in frame.f_code.co_varnames
    ]
    for frame in reversed(found):
        yield frame.f_locals.get("self")
