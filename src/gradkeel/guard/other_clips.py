"""Who else clips, and who else must hear of a skip: other libraries' trainers, found on the call stack."""

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from gradkeel.errors import DoubleClippingWarning
from gradkeel.guard.stack import callers
from gradkeel.tensors import Seen


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
        self._seen: Seen | None = None
        # Weakly: torch's list of a parameter's hooks is out of the garbage collector's sight.
        self._parameter = None if parameter is None else TensorWeakRef(parameter)
        self._remove: weakref.finalize[[], Canary] | None = None
        if parameter is not None and parameter.requires_grad and parameter.is_leaf and not _is_distributed():
            # The parameter may outlive the guard, and then has to be rid of its hook.
            handle = parameter.register_post_accumulate_grad_hook(_weakly(self))
            self._remove = weakref.finalize(self, handle.remove)
            self._remove.atexit = False

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            self._seen = Seen(parameter.grad)

    def was_touched(self) -> bool:
        """Whether the gradient that backward left has been modified in place since; forgets it."""
        seen, self._seen = self._seen, None
        if seen is None or _is_distributed():
            return False
        parameter = None if self._parameter is None else self._parameter()
        return parameter is not None and seen.is_tensor(parameter.grad) and seen.unchanged() is None

    def remove(self) -> None:
        """Stop watching."""
        if self._remove is not None:
            self._remove()


def _weakly(canary: Canary) -> Callable[[Tensor], None]:
    reference = weakref.ref(canary)

    def note(parameter: Tensor) -> None:
        canary = reference()
        if canary is not None:
            canary._note(parameter)

    return note


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
    for owner in callers("transformers", "lightning", "pytorch_lightning"):
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
    for owner in callers("accelerate"):
        if type(owner).__module__ == "accelerate.optimizer":
            owner._accelerate_step_called = stepped  # looked at after the step of a loss scale
            owner._is_overflow = not stepped
