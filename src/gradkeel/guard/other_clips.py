"""Who else clips, and who else must hear of a skip: other libraries' trainers, found on the call stack."""

import warnings
import weakref

import torch
from torch import Tensor

from gradkeel.errors import DoubleClippingWarning
from gradkeel.guard.stack import callers
from gradkeel.ranks.group import is_running
from gradkeel.tensors import Seen


class _Note:
    """The gradient as backward left it.

    What hangs on a parameter's hooks must not hold the parameter: torch's list of them is out of the garbage
    collector's sight.
    """

    def __init__(self) -> None:
        self.seen: Seen | None = None

    def take(self, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            self.seen = Seen(parameter.grad)


class Canary:
    """Sees whether a gradient was changed between backward and step, on one parameter of a single process.

    A foreign clip multiplies gradients in place, which their version counter shows (``GradScaler.unscale_`` does
    not). Under distributed training the reducer writes to gradients too, so nothing is watched there.
    """

    def __init__(self, parameter: Tensor | None) -> None:
        self.is_new = True  # whether no step has been looked at yet
        self.is_settled = False  # whether who clips is known, so that there is nothing more to look for
        self._note = _Note()
        # Not weakly: torch does not move a parameter that has a weak reference, where moving means swapping.
        self._parameter = parameter
        self._remove: weakref.finalize[[], Canary] | None = None
        if parameter is not None and parameter.requires_grad and parameter.is_leaf and not is_running():
            # The parameter may outlive the guard, and then has to be rid of its hook.
            handle = parameter.register_post_accumulate_grad_hook(self._note.take)
            self._remove = weakref.finalize(self, handle.remove)
            self._remove.atexit = False

    def was_touched(self) -> bool:
        """Whether the gradient that backward left has been modified in place since; forgets it."""
        seen, self._note.seen = self._note.seen, None
        if seen is None or self._parameter is None or is_running():
            return False
        return seen.is_tensor(self._parameter.grad) and seen.unchanged() is None

    def remove(self) -> None:
        """Stop watching."""
        if self._remove is not None:
            self._remove()


def warn_of_other_clips(canary: Canary, *, clips: bool) -> None:
    """Warn, once, if somebody else clips as well; trainers are looked for on the first step, or after a touch.

    A guard that clips nothing, but only measures, has no advice to give.
    """
    touched = canary.was_touched()
    if canary.is_settled or not (touched or canary.is_new):
        return
    canary.is_new = False
    culprit, canary.is_settled = _trainer_that_clips()
    if touched and not canary.is_settled:
        culprit = (
            "gradients were modified between backward() and step(), by a clip or by your own code",
            "if it is a clip (clip_grad_norm_, accelerator.clip_grad_norm_, max_norm=...), remove it",
        )
    if culprit is None:
        return
    canary.is_settled = True
    who, fix = culprit
    rest = (
        f"; {fix}; the guard clips already, and measures what the other has left"
        if clips
        else "; this guard clips nothing, and its norms are of what that has left"
    )
    warnings.warn(who + rest, DoubleClippingWarning, stacklevel=2)


def _trainer_that_clips() -> tuple[tuple[str, str] | None, bool]:
    """Which trainer on the call stack clips, and how not to let it; and whether its setting settles the question.

    The Transformers Trainer multiplies every gradient by 1 where it is set not to clip.
    """
    for owner in callers("transformers", "lightning", "pytorch_lightning"):
        limit = getattr(getattr(owner, "args", None), "max_grad_norm", None)
        if limit is not None:
            words = ("the Transformers Trainer clips too", "set TrainingArguments(max_grad_norm=0)")
            return (words if limit > 0 else None), True
        if hasattr(owner, "gradient_clip_val"):
            words = ("the Lightning Trainer clips too", "leave Trainer(gradient_clip_val=None)")
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
