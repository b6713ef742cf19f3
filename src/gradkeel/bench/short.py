"""The short form of the benchmarks: the user's own machine, and the user's own model."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gradkeel.bench.contenders import guard_alone, guarded_step, own_clip, torch_clip, torch_clip_and_step
from gradkeel.bench.stopwatch import AGAIN, Contender, Race, Table, race
from gradkeel.bench.workload import READ, SHAPES, Gradients, Shapes
from gradkeel.lab.task import BUILTIN, Task, TaskError, load_task, named_object
from gradkeel.policies import ClipByGlobalNorm


def shapes_of(model: str) -> Shapes:
    """The shapes of a model's parameters.

    Args:
        model: a name in ``SHAPES``, a built-in task's, or ``package.module:name`` of a module, a `Task`, or a function
            that returns one of these.

    Raises:
        TaskError: for an unknown name, or something that is neither.
    """
    if model in SHAPES:
        return SHAPES[model]
    if model in BUILTIN:
        return _shapes(load_task(model).model())
    if ":" not in model:
        known = [*SHAPES, *BUILTIN]
        near = difflib.get_close_matches(model, known, n=1)
        hint = f"; did you mean {near[0]!r}? " if near else ". "
        raise TaskError(
            f"unknown model {model!r}{hint}Known models: {', '.join(known)}. "
            "One of your own is named by its module and a function that returns it: mypkg.mymodule:make_model"
        )
    made = named_object(model, word="model")
    if callable(made) and not isinstance(made, nn.Module):
        try:
            inspect.signature(made).bind()
        except TypeError as error:
            raise TaskError(
                f"model {model!r}: it must be called without arguments, but has a {error}"
            ) from None
        except ValueError:
            pass  # a built-in, whose signature is not known
        made = made()
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
    """Clip by the global norm, alone and with fused AdamW's step, below and above the bound.

    Args:
        gradients: what is clipped.
        rounds: how often each contender is timed.
        seconds: none of the four races begins a further round after so long, once there are 5.
    """
    timed = functools.partial(
        race, rounds=rounds, seconds=seconds, synchronize=synchronizer(gradients.device)
    )
    tables = []
    for factor, words in ((2.0, "below"), (1 / 3, "above")):
        bound = factor * gradients.norm
        tables += [
            Table(f"clip, norm {words} the bound", timed(clips(gradients, bound))),
            Table(f"clip and AdamW step, norm {words} the bound", timed(steps(gradients, bound))),
        ]
    return tables


def clips(gradients: Gradients, bound: float) -> list[Contender]:
    """What clips by itself, and the limit."""
    guard = guard_alone(gradients, ClipByGlobalNorm(bound))
    return [torch_clip(gradients, bound), own_clip(gradients, bound), guard, gradients.read()]


def steps(gradients: Gradients, bound: float) -> list[Contender]:
    """Clip and step, and the step without clipping."""
    torchs, own, plain = (
        torch.optim.AdamW(gradients.parameters, lr=1e-9, fused=gradients.device.type in {"cpu", "cuda"})
        for _ in range(3)
    )
    return [
        torch_clip_and_step(gradients, bound, torchs),
        guarded_step(gradients, ClipByGlobalNorm(bound), own),
        Contender("step without clipping", plain.step, gradients.refill),
    ]


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done its work."""
    return (lambda: None) if device.type == "cpu" else lambda: torch.accelerator.synchronize(device)


def document(model: str, machine: str, gradients: Gradients, tables: Sequence[Table]) -> dict[str, Any]:
    """The result, as JSON has it: times in milliseconds, ratios as quartiles."""
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
        "control": _list(found, found.baseline + AGAIN),
        "contenders": {
            name: {
                "ms": found.time(name).median * 1e3,
                "ratio": _list(found, name),
                "to_read": found.ratio(name, READ).median if READ in found.seconds else None,
                "error": found.errors.get(name),
            }
            for name in names
        },
    }


def _list(found: Race, name: str) -> list[float]:
    ratio = found.ratio(name)
    return [ratio.low, ratio.median, ratio.high]
