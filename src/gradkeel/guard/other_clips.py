"""Who else clips, and who else must hear of a skip: other libraries' trainers, found on the call stack."""

import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from gradkeel.errors import DoubleClippingWarning


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
