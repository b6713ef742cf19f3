"""The Transformers Trainer in one line: ``Trainer(..., callbacks=[GuardCallback("global-norm:1.0")])``.

Set ``TrainingArguments(max_grad_norm=0)`` with it, for the Trainer clips too by default.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradkeel.errors import MissingExtraError
from gradkeel.explain.autopsy import Autopsy
from gradkeel.guard import stack
from gradkeel.integrations.callback import Told, TrainerGuard

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtraError("transformers", "transformers", "gradkeel.integrations.transformers") from None


STATE_FILE = "gradkeel_guard.pt"
"""Where the guard's state lies, in each of the Trainer's checkpoints."""


class GuardCallback(TrainerGuard, TrainerCallback):  # type: ignore[misc]  # the type checker does not follow them
    """Attaches a guard to the Trainer's optimizer when training begins, and detaches it at the end.

    The guard's state is saved with each checkpoint and loaded by ``train(resume_from_checkpoint=...)``, and so a record
    goes on where the checkpoint was taken. A second ``train()``, and another attempt of ``auto_find_batch_size``, count
    steps from 1 again, as the Trainer does; what was recorded before stays in the record.

    The Trainer's logs, and with them its reporters, get ``grad_norm``, ``clip_coefficient``, ``clipped_share`` (of the
    steps so far) and ``skipped_steps``; the guard, and with it the record, gets the Trainer's loss.

    Whoever builds the optimizer himself needs no callback: ``attach`` to it, and pass it as ``optimizers=``.

    Args:
        policy: as in `gradkeel.attach`.
        autopsy: run a bad step again to find its cause, see `gradkeel.Autopsy`.
        arguments: the other arguments of `gradkeel.attach`; ``model`` is the Trainer's.

    Attributes:
        guard: the guard, once training has begun; its reports stay after the end.
        autopsy: the `gradkeel.Autopsy`, where one is wanted and training has begun; else None.

    Example:
        >>> arguments = TrainingArguments("out", max_grad_norm=0)
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[GuardCallback("global-norm:1.0")]).train()
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """Attach to the optimizer that the Trainer has made, and go on from the checkpoint that it resumes from."""
        trainer, saved = _training()
        if trainer is not None and not isinstance(model, nn.Module):
            model = trainer.model  # SetFit's Trainer tells callbacks of what holds it
        told = self._begin(optimizer, model, saved, state.global_step)
        if trainer is not None:
            self._listen(trainer, told)

    def _listen(self, trainer: Any, told: Told) -> None:
        """Hear of each loss, which callbacks are not told of, and of logs before those who report them."""
        step = trainer.training_step
        if self._has_autopsy:
            self.autopsy = Autopsy(told.guard, loss=partial(_loss_of, trainer, step))
        autopsy = self.autopsy

        def training_step(*arguments: Any, **named: Any) -> Any:
            with nullcontext() if autopsy is None else autopsy((arguments, named)):
                loss = step(*arguments, **named)
            told.loss(loss)
            return loss

        def measured_by_us(model: Any, grad_norm: Any = None) -> Any:
            trainer.accelerator.unscale_gradients()  # which is part of measuring
            return grad_norm

        stand_ins = {"training_step": training_step}
        if not trainer.args.max_grad_norm and hasattr(trainer, "_get_grad_norm"):
            # It measures by a clip to inf, which makes every gradient NaN where one is not finite.
            stand_ins["_get_grad_norm"] = measured_by_us
        own = {name: vars(trainer)[name] for name in stand_ins if name in vars(trainer)}
        vars(trainer).update(stand_ins)

        def unlisten() -> None:
            for name in stand_ins:
                delattr(trainer, name)
            vars(trainer).update(own)

        self._unlisten = unlisten
        handler = trainer.callback_handler
        handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Count the step; the host is not synced."""
        if self._told is not None:
            self._told.look()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Add the guard's numbers to the training's logs; syncs the host, as the Trainer's own loss does here."""
        if self._told is not None and self._told.steps and logs is not None and "learning_rate" in logs:
            numbers = {name: value.item() for name, value in self._told.numbers().items()}
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Save the guard's state beside what the Trainer has saved."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.guard is not None and args.should_save and folder.is_dir():
            torch.save(self.guard.state_dict(), folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Detach, and close the recorders."""
        self._end()


def _loss_of(
    trainer: Any, step: Callable[..., Any], given: tuple[Sequence[Any], Mapping[str, Any]]
) -> Tensor:
    """The loss that a training step of the Trainer would run backward on."""
    arguments, named = given
    accelerator, losses = trainer.accelerator, list[Tensor]()
    accelerator.backward = lambda loss, **_: losses.append(loss)
    try:
        step(*arguments, **named)
    finally:
        del accelerator.backward
    return losses[0] / accelerator.gradient_accumulation_steps


def _training() -> tuple[Any, dict[str, Any] | None]:
    """The Trainer, and the guard's state in the checkpoint that it resumes from, which callbacks are not told of."""
    for frame in stack.frames():
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "train" and module.startswith("transformers."):
            given = frame.f_locals.get("resume_from_checkpoint")
            path = Path(given, STATE_FILE) if isinstance(given, str) else None
            state = torch.load(path, weights_only=True) if path is not None and path.exists() else None
            return frame.f_locals.get("self"), state
    return None, None
