"""Who touched the gradients: the one way to see a zero_grad or a foreign clip in the middle of a window."""

from collections.abc import Callable, Sequence

from torch import Tensor

from gradkeel.errors import WindowError


class GradientWatch:
    """Sees whether anybody else wrote to gradients, by their identity and version counter; reads no gradient.

    ``GradScaler.unscale_`` does not count: it leaves the version as it is.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._parameters = parameters
        self._seen: list[tuple[int, int]] | None = None

    def note(self) -> None:
        """Remember the gradients as they are now."""
        self._seen = self._now()

    def forget(self) -> None:
        """Remember nothing."""
        self._seen = None

    def _now(self) -> list[tuple[int, int]]:
        return [(0, 0) if p.grad is None else (id(p.grad), p.grad._version) for p in self._parameters()]

    def change(self) -> str | None:
        """What happened to the gradients since ``note``: "cleared", "modified", or None."""
        if self._seen is None:
            return None
        now = self._now()
        if now == self._seen:
            return None
        gone = any(old != (0, 0) and new == (0, 0) for old, new in zip(self._seen, now, strict=False))
        return "cleared" if gone else "modified"

    def refuse_changes(self, when: str) -> None:
        """Raise `WindowError` if anybody else wrote to gradients since ``note``."""
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
        """Whether some gradient is still there just as it was noted."""
        return any(
            new != (0, 0) and new == old for old, new in zip(self._seen or [], self._now(), strict=False)
        )
