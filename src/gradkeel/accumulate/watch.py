"""This module sees who touched the gradients: a zero_grad or a foreign clip in the middle of a window."""

from collections.abc import Callable, Sequence

from torch import Tensor

from gradkeel.errors import WindowError
from gradkeel.tensors import Seen


class GradientWatch:
    """Sees whether anybody else wrote to gradients, by their identity and version counter; reads no gradient."""

    def __init__(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._parameters = parameters
        self._seen: list[tuple[Tensor, Seen | None]] = []

    def note(self) -> None:
        """Remember the gradients as they are now."""
        self._seen = [(p, None if p.grad is None else Seen(p.grad)) for p in self._parameters()]

    def change(self) -> str | None:
        """Tell what happened to the gradients since ``note``: "cleared", "modified", or None."""
        changed = [p.grad for p, seen in self._seen if not _is_as(seen, p.grad)]
        if not changed:
            return None
        return "cleared" if any(gradient is None for gradient in changed) else "modified"

    def refuse_changes(self, when: str) -> None:
        """Raise `WindowError` if anybody else wrote to gradients, or changed the optimizer's, since ``note``."""
        if self._seen and {id(p) for p, _ in self._seen} != set(map(id, self._parameters())):
            raise WindowError(
                f"the optimizer's parameters have changed in the middle of the window, {when}; change its parameter "
                "groups only after optimizer.step(), or call accumulate.drop() to discard the window"
            )
        change = self.change()
        if change == "cleared":
            raise WindowError(
                f"gradients were cleared in the middle of the window, {when}; call optimizer.zero_grad() only after "
                "optimizer.step(), or accumulate.drop() to discard a window"
            )
        if change == "modified":
            raise WindowError(
                f"gradients were modified by somebody else in the middle of the window, {when}; if it is a clip, "
                "remove it (the guard clips the whole window, once), and call backward() only through micro.backward()"
            )

    def any_unchanged(self) -> bool:
        """Tell whether some gradient is still there just as it was noted."""
        return any(p.grad is not None and _is_as(seen, p.grad) for p, seen in self._seen)


def _is_as(seen: Seen | None, gradient: Tensor | None) -> bool:
    """Tell whether a gradient is just as it was noted: there and unchanged, or not there."""
    if seen is None or gradient is None:
        return seen is None and gradient is None
    return seen.is_tensor(gradient) and seen.unchanged() is not None
