"""The closure of one step: whatever the optimizer does around its evaluations is put back where the step is skipped."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from gradkeel.apply.skip import Snapshot
from gradkeel.errors import NonFiniteGradientError


class AbandonedStepError(BaseException):
    """Leaves an optimizer's own step from inside of its closure; nobody outside of the guard sees it.

    No `Exception`, for a step may catch those.
    """


class Closure:
    """Stands for the closure of one step, and has the guard look at the gradients after each evaluation.

    Args:
        optimizer: whose step it is.
        closure: the user's.
        evaluate: looks at the gradients; returns whether the step is to be made.
        moves: whether the optimizer is known to change parameters before an evaluation; None where it is not known,
            and True where it is: parameters and state are copied then.

    Attributes:
        loss: what the first evaluation gave, which is what optimizers return.
        moves: as above, with what this step has shown.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        evaluate: Callable[[], bool],
        *,
        moves: bool | None,
    ) -> None:
        self.loss: Any = None
        self.moves = moves
        self._optimizer = optimizer
        self._closure = closure
        self._evaluate = evaluate
        self._evaluations = 0
        self._is_refused = False
        self._is_lost = False
        self._snapshot = Snapshot(optimizer, values=moves is not False)
        self._versions = self._seen() if moves is False else None

    def _seen(self) -> list[int]:
        return [p._version for group in self._optimizer.param_groups for p in group["params"]]

    def __call__(self) -> Any:
        """Evaluate, look, and leave the optimizer's step at once where it is not to be made."""
        if self._versions is not None:
            self._is_lost = self._seen() != self._versions
            self.moves = self._is_lost
        elif self.moves is None and self._snapshot.has_moved():
            self.moves = True
        loss = self._closure()
        if not self._evaluations:
            self.loss = loss
        self._evaluations += 1
        self._is_refused = True
        if not self._evaluate():
            raise AbandonedStepError
        self._is_refused = False
        return loss

    def ended(self) -> None:
        """The step was made: if it moved only after its one evaluation, nothing need be copied for the next."""
        if self.moves is None and self._evaluations == 1 and self._snapshot.has_moved():
            self.moves = False

    def put_back(self) -> None:
        """Undo what the step has done, if it was the guard that ended it.

        Raises:
            NonFiniteGradientError: where it had changed parameters before an evaluation as it never had before, so
                that no copy of them was made.
        """
        if not self._is_refused:
            return
        self._snapshot.restore()
        if self._is_lost:
            raise NonFiniteGradientError(
                f"{type(self._optimizer).__name__} had moved parameters before the closure was evaluated, which it had "
                "not done in earlier steps, and the gradient there is one to skip: the parameters cannot be put back; "
                "restart from a checkpoint (from now on they are copied before each step)"
            )
