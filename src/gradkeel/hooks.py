"""The optimizer's side of a guard: step hooks, closures, marks that must leave no trace, and who else clips."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradkeel.errors import AttachError, DoubleClippingWarning, UnguardedCopyWarning
from gradkeel.measure.placement import entries_to_read

MARK = "_gradkeel_guard"
_AMP_FLAG = "_step_supports_amp_scaling"


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Accelerate's or Lightning's wrapper, or the optimizer itself."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach(optimizer={type(optimizer).__name__}): optimizer must be a torch.optim.Optimizer or a wrapper "
            "that holds one as .optimizer"
        )
    return optimizer


class Hooks:
    """Calls a guard around ``optimizer.step()``, and after each evaluation of the closure where there is one.

    Args:
        optimizer: the torch optimizer.
        guard: left on the optimizer as a mark, so that a second guard can be refused.
        begin: called first in each step.
        evaluate: called once the gradients of the step are there: at once, or after each evaluation of the closure.
        finish: called after the step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        guard: object,
        begin: Callable[[], None],
        evaluate: Callable[[], None],
        finish: Callable[[], None],
    ) -> None:
        self._optimizer = optimizer
        self._begin = begin
        self._evaluate = evaluate
        self._finish = finish
        self._kept_flag = vars(optimizer).get(_AMP_FLAG)
        why = "gradkeel measures and decides outside of the graph; compile without fullgraph=True"
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before, reason=why)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after, reason=why)),
        ]
        # Makes GradScaler call step() on every step, with its scale and verdict as attributes.
        setattr(optimizer, _AMP_FLAG, True)
        setattr(optimizer, MARK, guard)
        # Copying and pickling both go through __getstate__, and both lose hooks.
        optimizer.__getstate__ = self._getstate  # type: ignore[method-assign]  # looked up on the instance

    def remove(self) -> None:
        """Leave no hook and no attribute behind."""
        for handle in self._handles:
            handle.remove()
        for name in (MARK, "__getstate__"):
            vars(self._optimizer).pop(name, None)
        if self._kept_flag is None:
            vars(self._optimizer).pop(_AMP_FLAG, None)
        else:
            setattr(self._optimizer, _AMP_FLAG, self._kept_flag)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._current_graph_task_id() != -1:
            raise AttachError(
                "optimizer.step() was called inside backward(): accumulation, global norms and skipping need the "
                "whole gradient first; step after backward(), or detach() the guard"
            )
        self._begin()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._evaluate()
            return None

        def evaluated() -> Any:
            loss = closure()
            self._evaluate()
            return loss

        if len(args) > 1:
            return (args[0], evaluated, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluated}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._finish()

    def _getstate(self) -> dict[str, Any]:
        warnings.warn(
            "a copy or pickle of this optimizer carries no gradkeel guard and would train unclipped; attach a guard "
            "to the copy",
            UnguardedCopyWarning,
            stacklevel=3,
        )
        return type(self._optimizer).__getstate__(self._optimizer)


class Canary:
    """Sees whether a gradient was changed between backward and step, on one parameter of a single process.

    A foreign clip multiplies gradients in place, which their version counter shows (``GradScaler.unscale_`` does
    not). Under distributed training the reducer writes to gradients too, so nothing is watched there.

    Attributes:
        is_new: whether no step has been looked at yet.
        is_settled: whether who clips is known, so that there is nothing more to look for.
    """

    def __init__(self, parameter: Tensor | None) -> None:
        self.is_new = True
        self.is_settled = False
        self._seen: tuple[TensorWeakRef, int] | None = None
        self._parameter = parameter
        self._handle = None
        if parameter is not None and parameter.requires_grad and parameter.is_leaf and not _is_distributed():
            self._handle = parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            self._seen = (TensorWeakRef(parameter.grad), parameter.grad._version)

    def was_touched(self) -> bool:
        """Whether the gradient that backward left has been modified in place since; forgets it."""
        seen, self._seen = self._seen, None
        gradient = self._parameter.grad if self._parameter is not None else None
        if seen is None or gradient is None or gradient is not seen[0]() or _is_distributed():
            return False
        return gradient._version != seen[1]

    def remove(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def warn_of_other_clips(canary: Canary) -> None:
    """Warn, once, if somebody else clips as well; trainers are looked for on the first step, or after a touch."""
    touched = canary.was_touched()
    if canary.is_settled or not (touched or canary.is_new):
        return
    canary.is_new = False
    culprit, canary.is_settled = _trainer_that_clips()
    if touched and not canary.is_settled:
        culprit = (
            "gradients were modified between backward() and step(), by another clip or by your own code; if it is a "
            "clip (clip_grad_norm_, accelerator.clip_grad_norm_, max_norm=...), remove it"
        )
    if culprit is not None:
        canary.is_settled = True
        warnings.warn(
            f"{culprit}; the guard clips already, and measures what the other has left",
            DoubleClippingWarning,
            stacklevel=2,
        )


def _trainer_that_clips() -> tuple[str | None, bool]:
    """Which trainer on the call stack is set to clip too, in words, and whether its setting settles the question.

    The Transformers Trainer multiplies every gradient by 1 where it is set not to clip.
    """
    for owner in _callers():
        packages = {base.__module__.partition(".")[0] for base in type(owner).__mro__}
        limit = getattr(getattr(owner, "args", None), "max_grad_norm", None)
        if "transformers" in packages and limit is not None:
            words = "the Transformers Trainer clips too; set TrainingArguments(max_grad_norm=0)"
            return (words if limit > 0 else None), True
        if packages & {"lightning", "pytorch_lightning"}:
            trainer = getattr(owner, "trainer", None) or owner
            if getattr(trainer, "gradient_clip_val", None):
                return "the Lightning Trainer clips too; leave Trainer(gradient_clip_val=None)", True
    return None, False


def tell_accelerate(*, stepped: bool) -> None:
    """Make Accelerate's wrapper, if one is stepping, say truly whether the step was skipped.

    Its schedulers and the Transformers Trainer ask it; by itself it takes a step that was called for one that was
    made.
    """
    for owner in _callers():
        if type(owner).__module__ == "accelerate.optimizer":
            owner._accelerate_step_called = stepped  # looked at after the step of a loss scale
            owner._is_overflow = not stepped


def _callers() -> Iterator[Any]:
    """The objects whose methods are on the call stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back


def only_creates_state(optimizer: Optimizer, parameters: Sequence[Tensor], *, is_sharded: bool) -> bool:
    """Whether this step only makes the optimizer create its state: no state yet, every lr 0, every gradient 0.

    ``torch.distributed.checkpoint.state_dict`` makes such steps. They must run, and nobody needs to hear of them.
    """
    groups = optimizer.param_groups
    if any(isinstance(g["lr"], Tensor) and g["lr"].device.type != "cpu" for g in groups if "lr" in g):
        return False
    if any(optimizer.state.values()) or not all("lr" in g and float(g["lr"]) == 0.0 for g in groups):
        return False
    if any(p.grad is not None and bool(entries_to_read(p.grad).any()) for p in parameters):
        return False
    # A rank's own zeros tell nothing of the others' gradients; who calls is the same on all of them.
    return not is_sharded or _is_called_by_checkpoint()


def _is_called_by_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False
