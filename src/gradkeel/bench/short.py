"""The short form of the benchmarks takes the user's own machine, and the user's own model."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gradkeel.bench.contenders import clips, steps
from gradkeel.bench.stopwatch import AGAIN, Race, Table, race
from gradkeel.bench.workload import READ, SHAPES, Gradients, Shapes
from gradkeel.compare.task import BUILTIN, Task, TaskError, load_task, named_object, unknown
from gradkeel.language import say


def shapes_of(model: str) -> Shapes:
    """Return the shapes of a model's parameters.

    It is a name in ``SHAPES``, a built-in task's, or ``package.module:name`` of a module, a `Task`, or a function that
    returns one of these; else a `TaskError` is raised.
    """
    if model in SHAPES:
        return SHAPES[model]
    if model in BUILTIN:
        return _shapes(load_task(model).model())
    if ":" not in model:
        raise unknown("model", model, [*SHAPES, *BUILTIN])
    made = named_object("model", model, nn.Module, Task)
    if isinstance(made, Task):
        made = made.model()
    if not isinstance(made, nn.Module):
        raise TaskError(
            f"model {model!r} gives a {type(made).__name__}; make it a torch.nn.Module, or a function that returns one"
        )
    return _shapes(made)


def _shapes(model: nn.Module) -> Shapes:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name = type(model).__name__
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in parameters):
        raise TaskError(
            f"{name} has parameters without a shape yet; run its forward once before you return it"
        )
    shapes = [tuple(parameter.shape) for parameter in parameters]
    if not any(map(math.prod, shapes)):
        raise TaskError(f"{name} has no parameters that need gradients, so nothing to clip")
    return shapes


def bench(gradients: Gradients, *, rounds: int, seconds: float | None = None) -> list[Table]:
    """Clip by the global norm, alone and with fused AdamW's step, below and above the bound: four times a `race`."""
    timed = functools.partial(
        race, rounds=rounds, seconds=seconds, synchronize=synchronizer(gradients.device)
    )
    tables = []
    for factor, titles in (
        (2.0, (say("clip, norm below the bound"), say("clip and AdamW step, norm below the bound"))),
        (1 / 3, (say("clip, norm above the bound"), say("clip and AdamW step, norm above the bound"))),
    ):
        bound = factor * gradients.norm
        tables += [
            Table(titles[0], timed(clips(gradients, bound))),
            Table(titles[1], timed(steps(gradients, bound))),
        ]
    return tables


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until the device has done its work."""
    return (lambda: None) if device.type == "cpu" else lambda: torch.accelerator.synchronize(device)


def document(model: str, machine: str, gradients: Gradients, tables: Sequence[Table]) -> dict[str, Any]:
    """Return the result as JSON has it: times in milliseconds, ratios as quartiles."""
    return {
        "version": 1,
        "model": model,
        "machine": machine,
        "dtype": str(gradients.true[0].dtype).removeprefix("torch."),
        "tensors": len(gradients.true),
        "entries": gradients.entries,
        "tables": [{"title": table.title, **_race(table.race)} for table in tables],
    }


def _race(found: Race) -> dict[str, Any]:
    names = [name for name in found.seconds if not name.endswith(AGAIN)]
    return {
        "baseline": found.baseline,
        "rounds": len(found.seconds[found.baseline]),
        "control": list(found.control),
        "contenders": {
            name: {
                "ms": found.time(name).median * 1e3,
                "ratio": list(found.ratio(name)),
                "to_read": found.ratio(name, READ).median if READ in found.seconds else None,
                "error": found.errors.get(name),
            }
            for name in names
        },
    }
