"""The optimizer's side of a guard: step hooks, closures, marks that must leave no trace, who else clips or listens."""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradkeel.errors import AttachError, DoubleClippingWarning, RecordWarning, UnguardedCopyWarning
from gradkeel.measure.placement import entries_to_read
from gradkeel.step_report import Recorder, StepReport

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


def _outside_of_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    why = {"reason": "gradkeel measures and decides outside of the graph; compile without fullgraph=True"}
    takes_it = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.7 on
    return torch.compiler.disable(hook, **why if takes_it else {})


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
        self._is_inside = False  # of a step; stays True after one that raised
        self._has_nested = False
        self._kept_flag = vars(optimizer).get(_AMP_FLAG)
        self._handles = [
            optimizer.register_step_pre_hook(_outside_of_graphs(self._before)),
            optimizer.register_step_post_hook(_outside_of_graphs(self._after)),
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
        self._has_nested = self._is_inside and _is_called_by_own_step(optimizer)
        if self._has_nested:
            return None
        self._is_inside = True
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
        if self._has_nested and _is_called_by_own_step(optimizer):
            return
        self._is_inside = self._has_nested = False
        self._finish()

    def _getstate(self) -> dict[str, Any]:
        warnings.warn(
            "a copy or pickle of this optimizer carries no gradkeel guard and would train unclipped; attach a guard "
            "to the copy",
            UnguardedCopyWarning,
            stacklevel=3,
        )
        return type(self._optimizer).__getstate__(self._optimizer)


def _is_called_by_own_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` is on the call stack: a subclass's, which calls its parent's.

    torch runs the hooks for each of the two.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # The rest of a compiled function has another name, which contains the function's.
        code = frame.f_code
        if "step" in code.co_name and "self" in code.co_varnames and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


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
        # Weakly: torch's list of a parameter's hooks is out of the garbage collector's sight.
        self._parameter = None if parameter is None else TensorWeakRef(parameter)
        self._handle = None
        if parameter is not None and parameter.requires_grad and parameter.is_leaf and not _is_distributed():
            self._handle = parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            self._seen = (TensorWeakRef(parameter.grad), parameter.grad._version)

    def was_touched(self) -> bool:
        """Whether the gradient that backward left has been modified in place since; forgets it."""
        seen, self._seen = self._seen, None
        parameter: Tensor | None = None if self._parameter is None else self._parameter()
        gradient = None if parameter is None else parameter.grad
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
    for owner in _callers("transformers", "lightning", "pytorch_lightning"):
        limit = getattr(getattr(owner, "args", None), "max_grad_norm", None)
        if limit is not None:
            words = "the Transformers Trainer clips too; set TrainingArguments(max_grad_norm=0)"
            return (words if limit > 0 else None), True
        if hasattr(owner, "gradient_clip_val"):
            words = "the Lightning Trainer clips too; leave Trainer(gradient_clip_val=None)"
            return (words, True) if owner.gradient_clip_val else (None, False)
    return None, False


def tell_accelerate(*, stepped: bool) -> None:
    """Make Accelerate's wrapper, if one is stepping, say truly whether the step was skipped.

    Its schedulers and the Transformers Trainer ask it; by itself it takes a step that was called for one that was
    made.
    """
    for owner in _callers("accelerate"):
        if type(owner).__module__ == "accelerate.optimizer":
            owner._accelerate_step_called = stepped  # looked at after the step of a loss scale
            owner._is_overflow = not stepped


def tell(recorders: list[Recorder], event: str, report: StepReport) -> None:
    """Call each recorder's method of this name; one that raises is dropped with a warning, for training goes on.

    Of several ranks the one that recorded would otherwise not make the step that the others make.
    """
    for recorder in tuple(recorders):
        try:
            getattr(recorder, event, _nobody)(report)
        except Exception as error:  # noqa: BLE001  # whatever a disk or a tracker does
            recorders.remove(recorder)
            warnings.warn(
                f"recording stopped at step {report.step}: {recorder!r} raised {error!r}; training goes on",
                RecordWarning,
            )


def _nobody(report: StepReport) -> None:
    """Stands for what a recorder need not have."""


def _callers(*packages: str) -> Iterator[Any]:
    """The objects whose methods, defined in one of these packages, are on the call stack, outermost first.

    Before Python 3.13 a frame whose variables were read keeps all of them alive until it ends. So nobody else's are
    read, and of a trainer's own those of its entry point first, which hold no batch.
    """
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in packages and "self" in frame.f_code.co_varnames:
            found.append(frame)
        frame = frame.f_back
    for caller in reversed(found):
        yield caller.f_locals.get("self")


def only_creates_state(optimizer: Optimizer, parameters: Sequence[Tensor], *, alone: bool) -> bool:
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
    return alone or _is_called_by_checkpoint()


def _is_called_by_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False
