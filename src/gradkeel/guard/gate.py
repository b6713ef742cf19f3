"""A gate before an optimizer's own step: a hook cannot keep a step from running, and a skip must, for any optimizer.

torch wraps the step of each optimizer class in a function that runs the hooks around it, and keeps the step itself in
a cell of that function. The gate stands in this cell, so that hooks, profiler ranges, LR schedulers, GradScaler and
bound methods that somebody took earlier all lead through it. It opens at once for instances without a guard.
"""

import functools
from collections.abc import Callable
from types import CellType
from typing import Any, Protocol
from weakref import WeakSet

from torch.optim import Optimizer

ATTRIBUTE = "_gradkeel_gate"
_HOOKED = Optimizer.profile_hook_step(lambda _: None).__code__


class Keeper(Protocol):
    """Who decides whether an optimizer's own step is run."""

    def run(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``own``, or do not; returns what ``optimizer.step()`` returns."""


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether torch has set this optimizer up, so that there are hooks around its step."""
    return "_optimizer_step_pre_hooks" in vars(optimizer) and _cell(optimizer) is not None


def close(optimizer: Optimizer, keeper: Keeper) -> None:
    """From now on the optimizer's own step is up to ``keeper``."""
    cell = _cell(optimizer)
    assert cell is not None, "has_hooks() is asked first"
    if "guarded" not in vars(cell.cell_contents):
        cell.cell_contents = _gated(cell.cell_contents)
    vars(cell.cell_contents)["guarded"].add(optimizer)
    setattr(optimizer, ATTRIBUTE, keeper)


def remove(optimizer: Optimizer) -> None:
    """Take the gate away; the class gets its own step back with the last of its guarded instances."""
    vars(optimizer).pop(ATTRIBUTE, None)
    cell = _cell(optimizer)
    guarded = None if cell is None else vars(cell.cell_contents).get("guarded")
    if cell is not None and guarded is not None:
        guarded.discard(optimizer)
        if not guarded:
            cell.cell_contents = cell.cell_contents.__wrapped__


def _cell(optimizer: Optimizer) -> CellType | None:
    """Where torch's wrapper of the class's step keeps the step itself; None where there is no such wrapper."""
    step: Any = type(optimizer).step
    while step is not None and getattr(step, "__code__", None) is not _HOOKED:
        step = getattr(step, "__wrapped__", None)
    return None if step is None else step.__closure__[_HOOKED.co_freevars.index("func")]


def _gated(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def gate(*args: Any, **kwargs: Any) -> Any:
        keeper = getattr(args[0], ATTRIBUTE, None)
        return own(*args, **kwargs) if keeper is None else keeper.run(own, args, kwargs)

    vars(gate)["guarded"] = WeakSet[Optimizer]()
    return gate
