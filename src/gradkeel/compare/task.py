"""What a task is, and how a name on the command line becomes one."""

import difflib
import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradkeel.errors import GradkeelError

BUILTIN = {
    "char-lstm": "gradkeel.compare.tasks.char_lstm:CharLSTM",
    "exploding-linear": "gradkeel.compare.tasks.exploding_linear:ExplodingLinear",
    "simple-mlp": "gradkeel.compare.tasks.simple_mlp:SimpleMLP",
    "simple-mlp-adam": "gradkeel.compare.tasks.simple_mlp:SimpleMLPAdam",
    "tiny-transformer": "gradkeel.compare.tasks.tiny_transformer:TinyTransformer",
}


class TaskError(GradkeelError, ValueError):
    """A task that cannot be found, is no task, or cannot be run as asked."""


class Task(ABC):
    """Something to train: subclass it, and give ``model``, ``batches`` and ``loss``; the rest has defaults.

    Every run builds its own model: ``torch.manual_seed(seed)`` is called right before ``model()``, and
    ``batches(seed)`` draws from a generator of its own, so that all policies start from the same weights and see
    the same batches in the same order.

    Attributes:
        name: what tables and pages call it.
        policies: specs to compare unless ``--policy`` is given.
        learning_rates: those to try unless ``--lr`` is given.
        steps: optimizer steps in a run.
        seeds: how many seeds.
        batch_size: for ``batches`` to use; ``--batch-size`` sets it.
        target_loss: the table counts the steps to it; None takes the final loss of the last-ranked policy that trains.

    Example: ``examples/own_task.py``, run by ``gradkeel compare examples.own_task:make_task``.
    """

    name: str = ""
    policies: tuple[str, ...] = ("none", "global-norm:1.0")
    learning_rates: tuple[float, ...] = (0.1,)
    steps: int = 100
    seeds: int = 3
    batch_size: int = 16
    target_loss: float | None = None

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model, initialized from torch's global generator."""

    @abstractmethod
    def batches(self, seed: int) -> Iterable[Any]:
        """The batches in the order that ``seed`` gives; when they end they are started anew."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """[] the mean loss over the items of ``batch``."""

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer to guard: plain SGD unless overridden."""
        return torch.optim.SGD(model.parameters(), lr=lr)

    def weight(self, batch: Any) -> float:
        """How many items (or tokens) the mean in ``loss`` was taken over; used when batches are accumulated."""
        return 1.0

    def validation_loss(self, model: nn.Module) -> float | None:
        """The loss on data that ``batches`` never yields; None ranks policies by their training loss."""
        return None


def endless(task: Task, seed: int) -> Iterator[Any]:
    """The task's batches, started anew whenever they end."""
    while True:
        empty = True
        for batch in task.batches(seed):
            empty = False
            yield batch
        if empty:
            raise TaskError(
                f"task {task.name!r}: batches({seed}) yielded nothing; it must yield at least one batch"
            )


def loss_of(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """[] the task's loss.

    Raises:
        TaskError: it is not one number.
    """
    loss = task.loss(model, batch)
    if loss.numel() != 1:
        raise TaskError(
            f"task {task.name!r}: loss() gave a tensor of shape {tuple(loss.shape)}; it must give the mean over the "
            "batch, one number"
        )
    return loss.reshape(())


def load_task(target: str) -> Task:
    """The task that ``target`` names: a built-in one, or ``package.module:make_task``.

    Args:
        target: a name in ``BUILTIN``, or a module and the name of a Task subclass, of a Task, or of a function that
            returns one. The current directory can be imported from.

    Raises:
        TaskError: for an unknown name, a module or attribute that is not there, or something that is no task.
    """
    if target not in BUILTIN and ":" not in target:
        raise unknown("task", target, list(BUILTIN))
    attribute = target.partition(":")[2]
    task = named_object("task", BUILTIN.get(target, target), Task)
    if not isinstance(task, Task):
        raise TaskError(
            f"task {target!r} gives a {type(task).__name__}, which is not a gradkeel.compare.Task; "
            f"make {attribute} a subclass of Task, or a function that returns one"
        )
    task.name = task.name or target
    return task


def unknown(word: str, name: str, known: Sequence[str]) -> TaskError:
    """The error for a name that is not among those that are known."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}? " if near else ". "
    return TaskError(
        f"unknown {word} {name!r}{hint}Known {word}s: {', '.join(known)}. "
        f"One of your own is named by its module and a function that returns it: mypkg.mymodule:make_{word}"
    )


def named_object(word: str, target: str, *kinds: type) -> Any:
    """What ``package.module:name`` names, or makes where it is called; the current directory can be imported from.

    Whatever is of these ``kinds`` is taken as it is; ``word`` is what messages call it.

    Raises:
        TaskError: there is no such module, nothing of that name in it, or it cannot be called without arguments.
    """
    module_name, _, attribute = target.partition(":")
    made = getattr(_module(f"{word} {target!r}", module_name), attribute, None) if attribute else None
    if made is None:
        raise TaskError(
            f"{word} {target!r}: module {module_name!r} has no {attribute!r}; write {module_name}:make_{word}"
        )
    if isinstance(made, kinds) or not callable(made):
        return made
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise TaskError(
            f"{word} {target!r}: it must be callable without arguments, but has a {error}"
        ) from None
    except ValueError:
        pass  # a built-in, whose signature is not known
    return made()


def _module(asked: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if name != missing and not name.startswith(f"{missing}."):
            raise TaskError(
                f"{asked}: its module {name!r} needs {missing!r}, which is not installed"
            ) from None
        raise TaskError(
            f"{asked}: there is no module {missing!r} here ({here}) or on Python's path; "
            "run from the directory that holds it, or install it"
        ) from None
    except ValueError:
        raise TaskError(f"{asked}: {name!r} is not a module's name; write mypkg.mymodule:name") from None
