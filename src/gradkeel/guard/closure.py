"""The closure of one step: whatever the optimizer does around its evaluations is put back where the step is skipped."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradkeel.apply.skip import Snapshot
from gradkeel.errors import AttachError, NonFiniteGradientError, WindowError


class AbandonedStepError(BaseException):
    """Leaves an optimizer's own step from inside of its closure; nobody outside of the guard sees it.

    No `Exception`, for a step may catch those.
    """


class Closure:
    """Stands for the closure of one step, and has the guard look at the gradients after each evaluation.

    ``evaluate`` looks, and returns whether the step is to be made. With ``copies`` parameters and state are copied
    first, because the optimizer changes them before an evaluation, or may.

    Attributes:
        expects_gradient: a closure that leaves a loss to differentiate and no gradient is refused, until one has left
            a gradient.
        loss: what the first evaluation gave, which is what optimizers return.
        has_moved: whether parameters were changed before an evaluation.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        evaluate: Callable[[], bool],
        *,
        copies: bool,
        expects_gradient: bool,
    ) -> None:
        self.expects_gradient = expects_gradient
        self.loss: Any = None
        self.has_moved = False
        self._optimizer = optimizer
        self._closure = closure
        self._evaluate = evaluate
        self._copies = copies
        self._evaluations = 0
        self._is_refused = False
        self._snapshot = Snapshot(optimizer, values=copies)
        self._versions = self._seen()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self._optimizer.param_groups for p in group["params"])

    def _seen(self) -> list[int]:
        return [p._version for p in self._parameters()]

    def __call__(self) -> Any:
        """Evaluate, look, and leave the optimizer's step at once where it is not to be made.

        Raises:
            AttachError: a gradient is expected, and there is none beside the loss: the optimizer is one that calls
                ``backward()`` itself, after its closure.
            WindowError: the gradients are an accumulation window's, and the closure has computed others, or again.
        """
        try:
            return self._evaluated()
        except WindowError as error:
            self._is_refused |= self._copies  # what was moved before this evaluation is put back
            kind = type(self._optimizer).__name__
            raise WindowError(
                f"{kind}.step(closure): {error}. The gradients of an Accumulator's window are all there before the "
                "step, once, so the closure may only return the loss; for an optimizer that "
                "computes them anew in its step, as LBFGS does, have the closure call zero_grad() and backward() for "
                "every micro-batch, divided by their number, without an Accumulator"
            ) from error

    def _evaluated(self) -> Any:
        if not self.has_moved:
            self.has_moved = self._snapshot.has_moved() if self._copies else self._seen() != self._versions
        loss = self._closure()
        if not self._evaluations:
            self.loss = loss
        self._evaluations += 1
        self._is_refused = True
        is_left_to_step = (
            self.expects_gradient
            and isinstance(loss, Tensor)
            and loss.requires_grad
            and all(p.grad is None for p in self._parameters())
        )
        if not self._evaluate():
            if is_left_to_step:
                kind = type(self._optimizer).__name__
                raise AttachError(
                    f"{kind}.step(closure): the closure has computed a loss and no gradient. If {kind} calls backward "
                    "itself, after the closure, a guard cannot clip what it makes there: detach() the guard. Else call "
                    "loss.backward() in the closure, and see that the model still has the parameters that the "
                    "optimizer was built from"
                )
            raise AbandonedStepError
        self._is_refused = self.expects_gradient = False
        return loss

    def moves_last(self) -> bool:
        """Whether the step that was made, with its copies, has moved only after its one evaluation."""
        return self._copies and self._evaluations == 1 and not self.has_moved and self._snapshot.has_moved()

    def put_back(self) -> None:
        """Undo what the step has done, if it was the guard that ended it.

        Raises:
            NonFiniteGradientError: where it had changed parameters before an evaluation as it never had before, so
                that no copy of them was made.
        """
        if not self._is_refused:
            return
        self._snapshot.restore()
        if self.has_moved and not self._copies:
            raise NonFiniteGradientError(
                f"{type(self._optimizer).__name__} had moved parameters before the closure was evaluated, which it had "
                "not done in earlier steps, and the gradient there is one to skip: the parameters cannot be put back; "
                "restart from a checkpoint (from now on they are copied before each step)"
            )
