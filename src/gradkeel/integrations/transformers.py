"""The Transformers Trainer in one line: ``Trainer(..., callbacks=[GuardCallback("global-norm:1.0")])``.

Set ``TrainingArguments(max_grad_norm=0)`` with it, for the Trainer clips too by default.
"""

from typing import Any

from gradkeel.attach import attach
from gradkeel.errors import MissingExtraError
from gradkeel.guard.guard import Guard
from gradkeel.policies import Policy

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtraError("transformers", "transformers", "gradkeel.integrations.transformers") from None


class GuardCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Attaches a guard to the Trainer's optimizer when training begins, and detaches it at the end.

    Whoever builds the optimizer himself needs no callback: ``attach`` to it, and pass it as ``optimizers=``.

    Args:
        policy: as in `gradkeel.attach`.
        arguments: the other arguments of `gradkeel.attach`; ``model`` is the Trainer's.

    Attributes:
        guard: the guard, once training has begun; its reports stay after the end.

    Example:
        >>> arguments = TrainingArguments("out", max_grad_norm=0)
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[GuardCallback("global-norm:1.0")]).train()
    """

    def __init__(self, policy: Policy | str | None, **arguments: Any) -> None:
        self._policy = policy
        self._arguments = arguments
        self.guard: Guard | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """Attach to the optimizer that the Trainer has made."""
        self.guard = attach(optimizer, self._policy, model=model, **self._arguments)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Detach, and close the recorders."""
        if self.guard is not None:
            self.guard.detach()
