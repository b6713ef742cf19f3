"""Several optimizers of one model: the step that comes first decides for all of them, the others follow it."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from gradkeel.errors import AttachError
from gradkeel.guard import other_clips
from gradkeel.guard.hooks import Calls, Hooks


class Turns:
    """One round of steps, one of each optimizer, in any order, as one step of the guard.

    They must step once each, on gradients that are all there before the first of them steps. ``is_staged`` tells
    whether there is a verdict; there is none where a step only creates state. `Calls.begin` is told which comes first.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], guard: object, calls: Calls, is_staged: Callable[[], bool]
    ) -> None:
        self._optimizers = optimizers
        self._begin, self._evaluate, self._fail, self._finish = calls
        self._is_staged = is_staged
        self._stepped: list[int] = []
        self._has_failed = False  # a step of this round, which may be made again or given up
        self._is_evaluated = False
        self._is_made = True
        self._seen: list[list[tuple[Tensor | None, int]]] = []
        self.hooks = [Hooks(optimizer, guard, self._calls(i)) for i, optimizer in enumerate(optimizers)]

    def _calls(self, index: int) -> Calls:
        begin, evaluate = partial(self._begun, index), partial(self._evaluated, index)
        return Calls(begin, evaluate, self._failed, partial(self._ended, index))

    def _begun(self, index: int) -> None:
        """An optimizer begins its step.

        Raises:
            AttachError: if it has stepped in this round, and another has not.
        """
        self._is_evaluated = False
        if self._has_failed and self._stepped and (index in self._stepped or not self._is_as_seen(index)):
            self._stepped.clear()  # another round: the last one was given up
        if index in self._stepped:
            waiting = " and ".join(
                self._name(i) for i in range(len(self._optimizers)) if i not in self._stepped
            )
            self._stepped.clear()
            raise AttachError(
                f"{self._name(index)} steps again, and {waiting} has not stepped yet: optimizers under one guard step "
                "once each, one after the other; for steps of their own attach a guard to each"
            )
        if not self._stepped:
            self._begin(index)
        self._has_failed = False

    def _failed(self) -> None:
        self._has_failed = True
        self._fail()

    def _evaluated(self, index: int) -> bool:
        """The gradients are there: decide, or see that they are as the first step left them.

        Raises:
            AttachError: if they are others than those on which the first step decided, or a loss scale was taken out of
                some and not of others.
        """
        if self._stepped or self._is_evaluated:
            if self._is_evaluated or not self._is_as_seen(index):
                self._stepped.clear()
                raise AttachError(
                    f"the gradients of {self._name(index)} have changed since the optimizers' common step was decided: "
                    "under one guard all gradients must be there before the first of them steps, and zero_grad() comes "
                    "after the last; for a backward() or a closure of their own attach a guard to each"
                )
            scales = [self.hooks[i].loss_scale.scale for i in (index, self._stepped[0])]
            if (scales[0] is None) != (scales[1] is None):
                self._stepped.clear()
                raise AttachError(
                    "scaler.unscale_() was called for some of the optimizers under one guard, and not for the others: "
                    "call it for all, or for none"
                )
            return self._is_made
        self._is_made = self._evaluate()
        self._is_evaluated = True
        self._seen = [self._look(i) for i in range(len(self._optimizers))]
        return self._is_made

    def _ended(self, index: int) -> None:
        """An optimizer has stepped, or been kept from it."""
        self._has_failed = False
        if self._stepped or self._is_staged():
            self._stepped.append(index)
        if len(self._stepped) == len(self._optimizers):
            self._stepped.clear()
            self._seen = []
        if self._stepped:
            other_clips.tell_accelerate(stepped=self._is_made)
        else:
            self._finish()

    def _look(self, index: int) -> list[tuple[Tensor | None, int]]:
        """Each gradient, with the version that torch counts up when somebody writes to it."""
        gradients = [p.grad for group in self._optimizers[index].param_groups for p in group["params"]]
        return [(g, 0 if g is None else g._version) for g in gradients]

    def _is_as_seen(self, index: int) -> bool:
        now, seen = self._look(index), self._seen[index]  # of more parameters, where a group was added
        return len(now) == len(seen) and all(
            one is other and version == before
            for (one, version), (other, before) in zip(now, seen, strict=True)
        )

    def _name(self, index: int) -> str:
        """The optimizer's class, with its number where there are several of this class."""
        kinds = [type(optimizer).__name__ for optimizer in self._optimizers]
        return kinds[index] if kinds.count(kinds[index]) == 1 else f"{kinds[index]} (number {index})"
