"""The recorder: what the guard tells of each step, kept as it is until the writing thread takes it."""

import contextlib
import os
import sqlite3
import warnings
import weakref
from collections.abc import Iterable, Sequence
from multiprocessing.util import Finalize
from numbers import Real
from pathlib import Path

from torch import Tensor, distributed

from gradkeel.errors import RecordWarning, check_kind
from gradkeel.guard.guard import Guard
from gradkeel.guard.report import StepReport
from gradkeel.kernels.arrival import is_capturing
from gradkeel.ranks.group import is_running
from gradkeel.record.lag import second_moment_lag
from gradkeel.record.outbox import Outbox, Sink
from gradkeel.record.rows import Subject, layout
from gradkeel.record.sampling import BeforeUpdate, Sampling
from gradkeel.record.schema import rank_path
from gradkeel.record.writer import RecordFile
from gradkeel.selection import learning_rate

TAKEN_OVER = "another guard of this process records to"
"""In the warning of a recorder whose path another one has taken."""


class Recorder:
    """Records every step of a guarded run: to a file, to trackers, or to both.

    Pass it (or just the path) to ``gradkeel.attach(..., record=...)``. A step costs the training thread some
    ten microseconds: its tensors are kept where they are, stacked after a second or 8,192 steps, copied to the host
    without waiting, and written by a thread. Nothing that goes wrong there reaches the training: recording stops with
    one `RecordWarning`. ``kill -9`` loses the steps that wait or are being written, and never harms the file.

    Besides what the guard measures anyway, the parameters' own 2-norms and those of their updates are recorded: at
    each of the first 100 steps, then at every 50th, and after a jump of the learning rate and, on the CPU, of the
    gradient norm. For an update the weights are copied. Of Adam-like optimizers the scalar ``second_moment_lag`` says
    then how many times the gradients are as large as the second moment remembers.

    In a distributed run every rank may have a recorder; only rank 0's writes, and what it writes are the norms of whole
    parameters, over all ranks. Where parameters are sharded, weights and updates are then not recorded. With
    ``per_rank=True`` every rank writes, rank 1 to ``run.rank1.keel`` and so on: its own clock and scalars, and the
    norms of its parts of weights and updates, which the reader puts together.

    Args:
        path: the record file, by convention ``*.keel``. Steps that are recorded again take the place of those that it
            holds, which stay in it: ``Reader(path, superseded=True)``. Where another recorder of this process has
            the file, this one takes it over. None writes no file.
        sinks: who else is to be told, such as ``gradkeel.integrations.trackers.TensorBoard("runs/1")``.
        flush_seconds: steps wait in memory for at most so long while training goes on, or until there are 8,192.
        per_rank: give each rank of a distributed run a file of its own; the same on all ranks.

    Attributes:
        path: as given.
        rank: of this process; 0 where there is one.
        guard: whose steps are recorded; None before, and once it is closed.

    Raises:
        TypeError: neither a path nor a sink is given, or the path is something else.
        ValueError: the path is empty, or has a NUL.

    Example:
        >>> guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model,
        ...                   record=gk.Recorder("run.keel"))                            # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        sinks: Sequence[Sink] = (),
        flush_seconds: float = 1.0,
        per_rank: bool = False,
    ) -> None:
        self._sinks = _checked_sinks(sinks)
        rule = "flush_seconds must be a number of seconds"
        check_kind(flush_seconds, Real, "Recorder(flush_seconds=...)", rule)
        if path is None and not self._sinks:
            raise TypeError("Recorder(path=None): give a path, or at least one sink")
        self.path = None if path is None else check_path(path, "Recorder(path=...)")
        self._flush_seconds, self._per_rank = flush_seconds, per_rank
        self.rank, self._ranks = 0, 1
        if is_running():
            self.rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        self.guard: Guard | None = None
        self._layout: object = None  # of the steps that wait
        self._names: tuple[str, ...] = ()
        self._sampling = Sampling()
        self._rate: Tensor | float | None = None  # of the step under way
        self._before: BeforeUpdate | None = None
        self._before_step = 0
        self._problems: list[str] = []
        self._file: RecordFile | None = None
        self._outbox: Outbox | None = None
        self._open()

    def _open(self) -> None:
        self._is_closed = False
        if self.rank and not self._per_rank:
            return
        opened: list[Sink] = list(self._sinks) if self.rank == 0 else []
        if self.path is not None:
            path = rank_path(self.path, self.rank)
            try:
                for other in list(_recorders):
                    other._hand_over(path)
                self._file = RecordFile(path, self._problems.append)
                opened.insert(0, self._file)
            except (OSError, RuntimeError, ValueError, sqlite3.Error) as error:
                _warn(f"cannot record to {os.fspath(path)}: {error}; training goes on without a record")
        if opened:
            self._outbox = Outbox(opened, self._flush_seconds, self._problems)
            self._finalizer = weakref.finalize(self, Outbox.close, self._outbox)
            Finalize(self, self._finalizer, exitpriority=0)  # multiprocessing's forks end without atexit
            _recorders.add(self)

    def _hand_over(self, path: Path) -> None:
        """Write what waits and let go, if ``path`` is what this recorder writes to."""
        if (
            self._file is not None
            and self._outbox is not None
            and self._outbox.is_open
            and self._file.is_at(path)
        ):
            self.close()
            self._problems.append(
                f"recording stopped: {TAKEN_OVER} {self.path} now; give each optimizer a "
                "record of its own; training goes on"
            )

    def bind(self, guard: Guard) -> None:
        """Learn from the guard what is recorded: names, shapes, policy, optimizer; opens what was closed."""
        if self._is_closed:
            self.close()  # to the end: Ctrl-C may have come between
            self._open()
        self.guard, self._layout, self._names = guard, None, ()

    def before_step(self, report: StepReport) -> None:
        """Look at the weights, at steps at which they are measured, and copy them where the update is to be."""
        guard, step = self.guard, report.step
        if guard is None or self._outbox is None:
            return
        self._rate = rate = learning_rate(guard.optimizers[0].param_groups[0])
        if step == self._before_step:
            return  # a closure may be evaluated several times within a step, and a step may be tried again
        norm: Tensor | float | None = report.selections[0].measured.known_total
        if isinstance(norm, Tensor):
            if not norm.is_cpu and is_capturing(norm.device):
                return  # nothing is run now, and what a replay does is not seen
            norm = float(norm) if norm.is_cpu else None
        self._before_step, self._before = step, None
        weights, updates = self._sampling.next(step, norm, None if isinstance(rate, Tensor) else rate)
        # Where parameters are sharded, this rank's weights are not the whole.
        if weights and (self._per_rank or not guard.is_sharded):
            lag = None
            if not guard.is_sharded:
                # An optimizer may keep anything under these names, and the record does without a figure.
                with contextlib.suppress(Exception):
                    lag = second_moment_lag(guard.optimizers, report, guard.parameters)
            device = report.selections[0].measured.norms.device
            self._before = BeforeUpdate(guard.names, guard.parameters, device, lag, updates=updates)

    def record(self, report: StepReport) -> None:
        """Take note of a step; does not sync the host."""
        if self._problems:
            self._warn_of_problems()
        sample, outbox = None, self._outbox
        if self._before is not None:
            sample, self._before = self._before.sample(), None
        self._before_step = 0
        if outbox is None or not outbox.is_open:
            if outbox is not None and outbox.is_left_behind:
                outbox.is_left_behind = False
                _warn(
                    f"this process was forked from the one that records to {self.path or 'sinks'}, and its steps are "
                    "not recorded: attach in each worker, with a record of its own (record=f'run{worker}.keel'); "
                    "training goes on"
                )
            return
        selections = report.selections
        measured = selections[0].measured
        norm, names = measured.known_total, measured.names
        if isinstance(norm, Tensor) and not norm.is_cpu and is_capturing(norm.device):
            return
        if names is not self._names or not names:  # whatever changes makes new ones
            own = layout(selections)
            if own != self._layout:
                outbox.send()
                outbox.subject = self._subject()
                self._layout = own
            self._names = names  # last, for Ctrl-C may come at any moment
        outbox.add(report, self._rate, sample)

    def flush(self) -> None:
        """Wait until every step so far is written."""
        if self._outbox is not None:
            self._outbox.wait()
            self._warn_of_problems()

    def close(self) -> None:
        """Write what is left and close file and sinks; called by ``guard.detach()`` and when the process ends."""
        self._is_closed = True
        self.guard = self._before = None
        if self._outbox is not None:
            self._outbox.close()
            self._finalizer.detach()  # not before: what Ctrl-C leaves is written at the process's end
            self._warn_of_problems()
        self._file = self._outbox = None

    def _subject(self) -> Subject:
        guard = self.guard
        if guard is None:
            return Subject()
        named = dict(zip(guard.names, guard.parameters, strict=True))
        order = list(named)
        if guard.model is not None:
            position = {id(p): i for i, p in enumerate(guard.model.parameters())}
            order.sort(key=lambda name: position.get(id(named[name]), len(position)))
        return Subject(
            names=tuple(order),
            shapes={name: tuple(parameter.shape) for name, parameter in named.items()},
            policy=guard.policy_spec,
            optimizer=" + ".join(type(optimizer).__name__ for optimizer in guard.optimizers),
            nonfinite=guard.nonfinite,
            rank=self.rank if self._per_rank else 0,
            ranks=self._ranks if self._per_rank else 1,
            pieces=guard.pieces if self._per_rank else None,
        )

    def _warn_of_problems(self) -> None:
        while self._problems:
            _warn(self._problems.pop(0))


_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()
"""All recorders of this process, so that one can take a file over from another."""


def _checked_sinks(sinks: object) -> list[Sink]:
    rule = "sinks must be a list of what has write(rows) and close(), such as TensorBoard('runs/1')"
    check_kind(sinks, Iterable, "Recorder(sinks=...)", rule)
    found: list[Sink] = list(sinks)  # type: ignore[call-overload]  # as check_kind has seen
    for sink in found:
        if not (callable(getattr(sink, "write", None)) and callable(getattr(sink, "close", None))):
            raise TypeError(f"Recorder(sinks=...): {rule}, and {sink!r} has not")
    return found


def check_path(path: object, argument: str) -> str:
    """A path as a string, or an error that names the argument."""
    given = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(given, str):
        raise TypeError(f"{argument}: a record is a path such as 'runs/exp1.keel', not {path!r}")
    if not given.strip() or "\0" in given:
        raise ValueError(f"{argument}: {given!r} is no path; give one such as 'runs/exp1.keel'")
    return given


def _warn(message: str) -> None:
    warnings.warn(message, RecordWarning, stacklevel=3)
