"""Which of several nested optimizers is guarded: the one whose gradients are those that backward left."""

from typing import Any

from torch.optim import Optimizer

from gradkeel.errors import AttachError

# Their wrappers pass gradients on as they are, and call the inner optimizer's step.
_TRANSPARENT = {"accelerate", "lightning", "pytorch_lightning", "lightning_fabric"}


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Accelerate's or Lightning's wrapper, or the optimizer itself.

    An optimizer that holds another one may change gradients or weights around the inner step, so it is guarded itself.

    Raises:
        AttachError: for an optimizer that has no step hooks, since it never called ``Optimizer.__init__``.
        TypeError: for what is no optimizer and holds none.
    """
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer) and (
        not isinstance(optimizer, Optimizer) or _is_transparent(optimizer)
    ):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach(optimizer={type(optimizer).__name__}): optimizer must be a torch.optim.Optimizer or a wrapper "
            "that holds one as .optimizer"
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise AttachError(_without_hooks(optimizer))
    return optimizer


def _is_transparent(optimizer: Optimizer) -> bool:
    return any(kind.__module__.partition(".")[0] in _TRANSPARENT for kind in type(optimizer).__mro__)


def _without_hooks(optimizer: Optimizer) -> str:
    name = type(optimizer).__name__
    held = next(((key, own) for key, own in vars(optimizer).items() if isinstance(own, Optimizer)), None)
    fix = "call super().__init__() in it"
    if held is not None:
        fix = (
            f"attach to the {type(held[1]).__name__} that it holds as .{held[0]}, whose gradients are those that "
            f"{name} has left, or {fix}"
        )
    return (
        f"attach(optimizer={name}): {name} never called Optimizer.__init__, so it has no step hooks by which it could "
        f"be guarded; {fix}"
    )
