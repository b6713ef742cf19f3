"""Steps that wait to be written, and the thread that writes them."""

import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from gradkeel.guard.report import StepReport
from gradkeel.record.kept import STEP, Kept, Sample
from gradkeel.record.rows import Batch, Rows, Subject

MOST_WAITING = 2**18
"""Steps that may wait for a slow disk: each is some kilobytes of memory."""

CLOSE_SECONDS, AGAIN_SECONDS = 60.0, 5.0
"""How long the first close waits for the thread, and another, after Ctrl-C has ended that."""

FORK_SECONDS = 1.0
"""How long a fork waits for each record's write to end: a lock of SQLite's that is held then is held for ever in the
new process, where whatever else uses SQLite would wait for it."""

MOST_KEPT = 8192
"""Steps that wait to be sent together: a batch has its price, which fast steps share."""


class Sink(Protocol):
    """Where rows are written: a file, a tracker. Called on the recorder's own thread, so it may take its time.

    An exception ends this sink, with one `RecordWarning`, and nothing else.
    """

    def write(self, rows: Rows) -> None:
        """Write consecutive steps."""

    def close(self) -> None:
        """Nothing more comes."""


class Outbox:
    """Collects steps on the training thread and writes them on its own.

    It outlives the recorder that fills it, so that steps which nobody closed for are written at the process's end.

    Attributes:
        subject: what is recorded; put on each batch.
        problems: what went wrong, in sentences, for the training thread to warn of.
        is_left_behind: this is a forked process, which has not been told that the thread is in the other one.
    """

    def __init__(self, sinks: Sequence[Sink], flush_seconds: float, problems: list[str]) -> None:
        self.subject = Subject()
        self.problems = problems
        self.is_left_behind = False
        self._kept: Kept | None = None
        self._lock = threading.RLock()  # of what is kept, for anybody may flush
        self._writing = threading.RLock()  # no process is forked meanwhile, unless a sink does
        self._flush_seconds = flush_seconds
        self._sent_at = time.time()
        self._sinks = list(sinks)
        # With what is to be called there. Of C: what is of Python may stay locked where Ctrl-C ends it.
        self._waiting: queue.SimpleQueue[Batch | Callable[[], None] | None] = queue.SimpleQueue()
        self._sent = self._taken = 0  # steps; each is counted by one thread
        self._is_working = True
        self._patience = CLOSE_SECONDS
        self._ended = threading.Lock()
        self._ended.acquire()
        self._thread = threading.Thread(target=self._work, name="gradkeel-record", daemon=True)
        self._thread.start()
        _outboxes.add(self)

    @property
    def is_open(self) -> bool:
        """Whether anybody still writes; never in a forked process, which has no such thread."""
        return self._is_working and bool(self._sinks)

    def add(self, report: StepReport, rate: Tensor | float | None, sample: Sample | None) -> None:
        """Take a step, of the layout of those that wait, and its learning rate; send what has waited long enough."""
        with self._lock:
            kept = self._kept
            if kept is not None and report.step <= kept.steps[-1][STEP]:
                self._send()
                kept = None
            now = time.time()
            if kept is None:
                kept = Kept(report)
            step = kept.taken(report, now, rate, sample)
            if self._kept is None and kept.steps:  # a signal's handler has flushed meanwhile
                kept = Kept(report)
            kept.steps.append(step)
            self._kept = kept  # never without a step, should the first one fail
            # Also where the clock was set back.
            if not 0 <= now - self._sent_at < self._flush_seconds or len(kept) >= MOST_KEPT:
                self._send()

    def send(self) -> None:
        """Stack what waits and hand it to the thread."""
        with self._lock:
            self._send()

    def _send(self) -> None:
        self._sent_at = time.time()
        kept = self._kept
        if kept is None:
            return
        try:
            batch = Batch(kept, self.subject)
        except Exception:
            self._kept = None
            raise
        waiting = self._sent - self._taken
        if waiting + len(batch) > MOST_WAITING:
            self._kept = None
            self._stopped(f"{self._sinks[0]!r} does not keep up with {waiting} steps waiting")
            self._sinks.clear()
            return
        self._kept = None  # not before, for Ctrl-C would lose them
        self._waiting.put(batch)
        self._sent += len(batch)

    def wait(self) -> None:
        """Wait until everything sent so far is written; a sink, which is called for that, does not wait for itself."""
        if self.is_open and not self._is_own_thread():
            self.send()
            self.wait_for_sent()

    def wait_for_sent(self) -> None:
        """Wait until what has been sent is written; what waits to be sent goes on waiting."""
        written = threading.Lock()
        written.acquire()
        self._waiting.put(written.release)
        while not written.acquire(timeout=1.0) and self._is_working:
            pass

    def close(self) -> None:
        """Write what is left, and end the thread."""
        if not self._is_working:
            return
        self.send()
        self._waiting.put(None)
        if self._is_own_thread():  # a sink closes, or garbage is collected here
            return
        patience, self._patience = self._patience, min(self._patience, AGAIN_SECONDS)
        if self._ended.acquire(timeout=patience):
            self._ended.release()

    def _is_own_thread(self) -> bool:
        return threading.get_ident() == self._thread.ident

    def _work(self) -> None:
        try:
            while (batch := self._waiting.get()) is not None:
                if callable(batch):
                    batch()
                    continue
                self._taken += len(batch)
                with self._writing:
                    self._write(batch)
            with self._writing:
                self._close_sinks()
        finally:
            self._is_working = False
            self._ended.release()

    def _write(self, batch: Batch) -> None:
        try:
            rows = batch.rows()
        except Exception as error:  # noqa: BLE001 - a policy of one's own may have decided on anything
            self._stopped(f"its steps cannot be put together: {error!r}")
            self._close_sinks()
            self._sinks.clear()
            return
        for sink in list(self._sinks):
            self._call(sink, sink.write, rows)

    def _close_sinks(self) -> None:
        for sink in list(self._sinks):
            self._call(sink, sink.close)

    def _call(self, sink: Sink, action: Callable[..., None], *arguments: Rows) -> None:
        try:
            action(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever a disk or a tracker does, training goes on
            self._stopped(f"{sink!r}: {error}")
            self._sinks.remove(sink)

    def _stopped(self, why: str) -> None:
        self.problems.append(f"recording stopped: {why}; training goes on")


_outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()


def _pause() -> None:
    for outbox in list(_outboxes):
        if outbox._is_working:
            outbox._writing.acquire(timeout=FORK_SECONDS)


def _go_on() -> None:
    for outbox in list(_outboxes):
        with contextlib.suppress(RuntimeError):  # it was not waited for to the end
            outbox._writing.release()


def _forked() -> None:
    """The thread has stayed behind."""
    _go_on()
    for outbox in _outboxes:
        outbox.is_left_behind |= outbox._is_working
        outbox._is_working = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_pause, after_in_parent=_go_on, after_in_child=_forked)
