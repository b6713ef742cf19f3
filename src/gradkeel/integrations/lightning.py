"""The Lightning Trainer in one line: ``Trainer(..., callbacks=[GuardCallback("global-norm:1.0")])``.

Leave ``Trainer(gradient_clip_val=None)`` with it. It serves the Trainer of ``lightning`` and of ``pytorch_lightning``,
which some libraries build on, whichever is installed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gradkeel.errors import AttachError, MissingExtraError
from gradkeel.explain.autopsy import Autopsy
from gradkeel.guard.guard import Guard
from gradkeel.integrations.callback import TrainerGuard

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        raise MissingExtraError("lightning", "lightning", "gradkeel.integrations.lightning") from None


class GuardCallback(TrainerGuard, Callback):  # type: ignore[misc]  # lightning is not followed by the type checker
    """Attaches a guard to the module's optimizer when training begins, and detaches it at the end.

    The guard's state is part of Lightning's checkpoints, and loaded by ``fit(..., ckpt_path=...)``, so that a record
    goes on where the checkpoint was taken. A second ``fit()`` goes on too, as Lightning's own count of steps does.

    ``grad_norm``, ``clip_coefficient``, ``clipped_share`` (of the steps so far) and ``skipped_steps`` go to Lightning's
    loggers, without a sync of the host, and the loss to the guard and its record (not under a loss scale of fp16).

    A module with several optimizers attaches to each of them itself, in ``configure_optimizers``, and saves and loads
    its guards in ``on_save_checkpoint`` and ``on_train_start``.

    Args:
        policy: as in `gradkeel.attach`.
        autopsy: run a bad step again to find its cause, see `gradkeel.Autopsy`; ``training_step`` is called again, and
            what it logs then is dropped. Not for manual optimization.
        arguments: the other arguments of `gradkeel.attach`; ``model`` is the module.

    Attributes:
        guard: the guard, once training has begun; its reports stay after the end.
        autopsy: the `gradkeel.Autopsy`, where one is wanted and training has begun; else None.

    Raises:
        AttachError: when training begins, if the module has several optimizers.

    Example:
        >>> lightning.Trainer(callbacks=[GuardCallback("global-norm:1.0")]).fit(module, loader)  # doctest: +SKIP
    """

    _loaded: dict[str, Any] | None = None  # until there is an optimizer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizer that the module has made, and go on from the checkpoint that was loaded."""
        if len(trainer.optimizers) != 1:
            raise AttachError(
                f"GuardCallback: the module has {len(trainer.optimizers)} optimizers; attach to each of them in "
                "configure_optimizers instead"
            )
        told = self._begin(trainer.optimizers[0], pl_module, self._loaded, trainer.global_step)
        self._loaded = None
        if self._has_autopsy and pl_module.automatic_optimization:
            self._listen(trainer, pl_module, told.guard)

    def _listen(self, trainer: Any, module: Any, guard: Guard) -> None:
        """Hear of what each training step is given."""
        strategy = trainer.strategy
        step = strategy.training_step

        def loss_of(given: Sequence[Any]) -> Any:
            module.log = module.log_dict = lambda *_, **__: None
            try:
                output = step(*given)
            finally:
                del module.log, module.log_dict
            loss = output["loss"] if isinstance(output, Mapping) else output
            return loss / trainer.accumulate_grad_batches

        self.autopsy = autopsy = Autopsy(guard, loss=loss_of)

        def training_step(*given: Any) -> Any:
            with autopsy(given):
                return step(*given)

        strategy.training_step = training_step
        self._unlisten = lambda: delattr(strategy, "training_step")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Tell the guard the loss."""
        if self._told is not None and getattr(trainer.precision_plugin, "scaler", None) is None:
            self._told.loss(loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Log what the step came to, where one was made."""
        if self._told is not None and self._told.look():
            for name, value in self._told.numbers().items():
                pl_module.log(name, value.float())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, and close the recorders."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Likewise where training ends early."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into its checkpoints."""
        return {} if self.guard is None else {"guard": self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what Lightning found in a checkpoint, until there is an optimizer."""
        self._loaded = state_dict.get("guard")
