"""Which of several nested optimizers is guarded: the one whose gradients are those that backward left."""

from typing import Any

from torch.optim import Optimizer

from gradkeel.errors import AttachError
from gradkeel.guard import gate

# Their wrappers pass gradients on as they are, and call the inner optimizer's step.
_TRANSPARENT = {"accelerate", "lightning", "pytorch_lightning", "lightning_fabric"}


def unwrap(optimizer: Any) -> Optimizer:
    """The optimizer to be guarded: itself, or the one inside a wrapper such as Accelerate's or Lightning's.

    A wrapper with step hooks of its own is an optimizer that may change gradients or parameters itself, as Lookahead
    does, and is guarded as a whole.

    Raises:
        AttachError: for an optimizer without step hooks that may do so; the one inside is named.
        TypeError: for what is no optimizer and holds none.
    """
    outer = optimizer
    while not (isinstance(optimizer, Optimizer) and gate.has_hooks(optimizer)):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer) or not _passes_on(optimizer, inner):
            raise _no_optimizer(outer)
        optimizer = inner
    return optimizer


def _passes_on(wrapper: Any, inner: Optimizer) -> bool:
    """Whether a wrapper leaves gradients as they are."""
    if any(kind.__module__.partition(".")[0] in _TRANSPARENT for kind in type(wrapper).__mro__):
        return True
    own = vars(wrapper).get("state") if hasattr(wrapper, "__dict__") else None
    return not isinstance(wrapper, Optimizer) and (own is None or own is getattr(inner, "state", None))


def _no_optimizer(outer: Any) -> Exception:
    own = vars(outer) if hasattr(outer, "__dict__") else {}
    inner = next((name for name, value in own.items() if isinstance(value, Optimizer)), None)
    fix = (
        ""
        if inner is None
        else f"; attach to its .{inner}, which guards all but what the wrapper itself does in a step"
    )
    words = f"attach(optimizer={type(outer).__name__}): "
    if isinstance(outer, Optimizer):
        return AttachError(
            f"{words}torch calls no hooks around its step (it never called torch.optim.Optimizer.__init__, or its step "
            f"is no method of its class){fix}"
        )
    return TypeError(
        f"{words}optimizer must be a torch.optim.Optimizer or a wrapper that holds one as .optimizer"
        + (
            fix
            or "; before a step that is not torch's, call gradkeel.clip_grad_norm_(parameters, bound) yourself"
        )
    )
