"""Gradient norms in TensorBoard and Weights & Biases, beside or instead of a record file.

>>> record = gk.Recorder("run.keel", sinks=[TensorBoard("runs/1")])                    # doctest: +SKIP
>>> guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model, record=record)  # doctest: +SKIP

Both get their numbers from the recorder's thread, a batch of steps at a time, so they do not slow training down.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradkeel.errors import MissingExtraError
from gradkeel.record import Rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

PARAMETERS_EVERY = 100


class TensorBoard:
    """Writes every step's numbers as scalars under ``gradkeel/``, and each parameter's norm now and then.

    Args:
        writer: a ``SummaryWriter`` of yours, which stays open, or the folder for one.
        parameters_every: each parameter's norm is written at every so many-th step; None leaves them out.

    Raises:
        MissingExtraError: a folder is given, and tensorboard is not installed.
    """

    def __init__(
        self,
        writer: "SummaryWriter | str | os.PathLike[str]",
        *,
        parameters_every: int | None = PARAMETERS_EVERY,
    ) -> None:
        self._owns = isinstance(writer, str | os.PathLike)
        self._writer = _summary_writer(writer) if isinstance(writer, str | os.PathLike) else writer
        self._every = parameters_every

    def __repr__(self) -> str:
        """Where it writes."""
        return f"TensorBoard({self._writer.log_dir!r})"

    def write(self, rows: Rows) -> None:
        """Write consecutive steps."""
        for i, (step, numbers) in enumerate(rows.numbers()):
            time = float(rows.series["time"][i])
            for name, value in numbers.items():
                self._writer.add_scalar(f"gradkeel/{name}", value, step, time)
        for step, norms in _parameter_norms(rows, self._every):
            for name, norm in norms.items():
                self._writer.add_scalar(f"gradkeel_norms/{name}", norm, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer, if it was made here."""
        if self._owns:
            self._writer.close()


class WeightsAndBiases:
    """Logs every step's numbers under ``gradkeel/``, with ``gradkeel/step`` as their x axis.

    They arrive in batches, so they cannot carry W&B's own step: log your own numbers without ``step=`` too, or with
    ``define_metric`` as here, for W&B refuses steps that go back.

    Args:
        run: what ``wandb.init()`` returned; it is yours to finish, after ``guard.detach()``.
        parameters_every: each parameter's norm is logged at every so many-th step; None leaves them out.
    """

    def __init__(self, run: "Run", *, parameters_every: int | None = PARAMETERS_EVERY) -> None:
        self._run = run
        self._every = parameters_every
        for pattern in ("gradkeel/*", "gradkeel_norms/*"):
            run.define_metric(pattern, step_metric="gradkeel/step")

    def __repr__(self) -> str:
        """Which run."""
        return f"WeightsAndBiases({self._run.name!r})"

    def write(self, rows: Rows) -> None:
        """Log consecutive steps."""
        norms = dict(_parameter_norms(rows, self._every))
        for step, numbers in rows.numbers():
            own = {f"gradkeel/{name}": value for name, value in numbers.items()}
            own |= {f"gradkeel_norms/{name}": norm for name, norm in norms.get(step, {}).items()}
            self._run.log({"gradkeel/step": step, **own})

    def close(self) -> None:
        """Leave the run to whoever began it."""


def _parameter_norms(rows: Rows, every: int | None) -> Iterator[tuple[int, dict[str, float]]]:
    """Each parameter's norm at the steps that are multiples of ``every``, and at the first."""
    for i, step in enumerate(rows.steps):
        if every is not None and (step % every == 0 or step == 1):
            yield step, dict(zip(rows.names, rows.series["norms"][i].tolist(), strict=True))


def _summary_writer(folder: str | os.PathLike[str]) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "tensorboard", "tensorboard", "gradkeel.integrations.trackers.TensorBoard"
        ) from None
    return SummaryWriter(os.fspath(folder))
