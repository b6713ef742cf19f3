"""Gradient norms in TensorBoard, Weights & Biases and MLflow, beside or instead of a record file.

>>> record = gk.Recorder("run.keel", sinks=[TensorBoard("runs/1")])                    # doctest: +SKIP
>>> guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model, record=record)  # doctest: +SKIP

All get their numbers from the recorder's thread, a batch of steps at a time, so they do not slow training down: each
step's under ``gradkeel/``, and now and then each parameter's norm under ``gradkeel_norms/``, with a histogram of their
decimal logarithms, ``gradkeel/log10_norms``, where the tracker has histograms.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gradkeel.errors import MissingExtraError
from gradkeel.record import Rows

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

PARAMETERS_EVERY = 100
HISTOGRAM = "gradkeel/log10_norms"
RIDING = 256
"""How many steps wait at most for rows of the user's, where he logs with ``step=``; the others are left out."""


class TensorBoard:
    """Writes every step's numbers as scalars, and each parameter's norm and their histogram now and then.

    Args:
        writer: a ``SummaryWriter`` of yours, which stays open, or the folder for one.
        parameters_every: parameters' norms are written at every so many-th step; None leaves them out.

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
        if isinstance(writer, str | os.PathLike):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                what = "gradkeel.integrations.trackers.TensorBoard"
                raise MissingExtraError("tensorboard", "tensorboard", what) from None
            writer = SummaryWriter(os.fspath(writer))
        self._writer, self._every = writer, parameters_every

    def __repr__(self) -> str:
        return f"TensorBoard({self._writer.log_dir!r})"

    def write(self, rows: Rows) -> None:
        """Write consecutive steps."""
        for step, time, numbers, logs in _points(rows, self._every):
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step, time)
            if logs:
                import numpy as np

                self._writer.add_histogram(HISTOGRAM, np.array(logs), step, walltime=time)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer, if it was made here."""
        if self._owns:
            self._writer.close()


class WeightsAndBiases:
    """Logs every step's numbers with ``gradkeel/step`` as their x axis; no point of your own is ever dropped for them.

    W&B drops what is logged for a step that is over, and each row of its own begins a step. So where you log with
    ``step=``, gradkeel's numbers ride along in your rows, one step in each, some of them left out where you log more
    seldom; where you log without, they have rows of their own. Until you have logged something, the last 10,000 wait;
    they are sent by ``guard.detach()`` at the latest. Log either way, not both.

    Args:
        run: what ``wandb.init()`` returned; it is yours to finish, after ``guard.detach()``.
        parameters_every: parameters' norms are logged at every so many-th step; None leaves them out.
    """

    def __init__(self, run: "Run", *, parameters_every: int | None = PARAMETERS_EVERY) -> None:
        import wandb

        self._run, self._every = run, parameters_every
        self._waiting: deque[dict[str, Any]] = deque(maxlen=10_000)
        self._gives_steps: bool | None = None  # not known until the user logs something
        for pattern in ("gradkeel/*", "gradkeel_norms/*"):
            run.define_metric(pattern, step_metric="gradkeel/step")
        self._log, self._is_global = run.log, wandb.run is run
        self._route(self._users)

    def __repr__(self) -> str:
        return f"WeightsAndBiases({self._run.name!r})"

    def write(self, rows: Rows) -> None:
        """Log consecutive steps, or let them wait for a row of the user's."""
        import wandb

        for step, _, numbers, logs in _points(rows, self._every):
            histogram = {HISTOGRAM: wandb.Histogram(logs)} if logs else {}
            self._waiting.append({"gradkeel/step": step, **numbers, **histogram})
        if self._gives_steps is False:
            self._send()
        while self._gives_steps and len(self._waiting) > RIDING:
            self._waiting.popleft()

    def close(self) -> None:
        """Log what still waits, and leave the run to whoever began it."""
        if not self._gives_steps:
            self._send()
        elif self._waiting:
            self._log(self._waiting.pop(), commit=False)
        self._route(self._log)

    def _next(self) -> dict[str, Any] | None:
        try:
            return self._waiting.popleft()
        except IndexError:  # the other thread may have taken the last one
            return None

    def _send(self) -> None:
        while (row := self._next()) is not None:
            self._log(row)

    def _users(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Log what the user does, and with it what waits for a row of his."""
        self._gives_steps = self._gives_steps or step is not None
        if self._gives_steps and isinstance(data, Mapping):
            data = {**(self._next() or {}), **data}
        self._log(data, step=step, commit=commit)

    def _route(self, log: Any) -> None:
        """Let the run's ``log``, and wandb's, be this one."""
        import wandb

        self._run.log = log
        if self._is_global:
            wandb.log = log


class MLflow:
    """Logs every step's numbers as metrics of an MLflow run, with the steps and times that they had.

    Args:
        run: what ``mlflow.start_run()`` returned; it is yours to end, after ``guard.detach()``.
        parameters_every: parameters' norms are logged at every so many-th step; None leaves them out.
    """

    def __init__(self, run: "MlflowRun", *, parameters_every: int | None = PARAMETERS_EVERY) -> None:
        from mlflow import MlflowClient

        self._client, self._run, self._every = MlflowClient(), run.info.run_id, parameters_every

    def __repr__(self) -> str:
        return f"MLflow({self._run!r})"

    def write(self, rows: Rows) -> None:
        """Log consecutive steps."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(time * 1000), step)
            for step, time, numbers, _ in _points(rows, self._every)
            for name, value in numbers.items()
        ]
        for start in range(0, len(metrics), 1000):  # as many as a request may hold
            self._client.log_batch(self._run, metrics[start : start + 1000])

    def close(self) -> None:
        """Leave the run to whoever began it."""


def _points(rows: Rows, every: int | None) -> Iterator[tuple[int, float, dict[str, float], list[float]]]:
    """Each step, its time and numbers, and at multiples of ``every`` and the first, the norms and their logs."""
    for i, (step, numbers) in enumerate(rows.numbers()):
        told, logs = {f"gradkeel/{name}": value for name, value in numbers.items()}, []
        if every is not None and (step % every == 0 or step == 1):
            norms = rows.series["norms"][i].tolist()
            told |= {f"gradkeel_norms/{name}": norm for name, norm in zip(rows.names, norms, strict=True)}
            logs = [math.log10(norm) for norm in norms if 0 < norm < math.inf]
        yield step, float(rows.series["time"][i]), told, logs
