"""Writes rows into a record file, block by block, each flush one transaction; runs on the recorder's own thread."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from gradkeel.errors import RecordError
from gradkeel.record.downsample import summarize
from gradkeel.record.rows import Rows, Sample
from gradkeel.record.schema import (
    APPLICATION_ID,
    ROWS_PER_BLOCK,
    check,
    create,
    from_blobs,
    is_empty,
    series_of,
    to_blob,
)
from gradkeel.version import __version__

_WAIT_SECONDS = 60  # for a reader that holds the file where there is no write-ahead log


class RecordFile:
    """One run's record, open for writing; see docs/record.md for what is in it.

    Steps that are recorded again replace the old ones from the first such step on, so that a run which resumes from
    a checkpoint continues its record. One process writes to a file at a time; any number may read.

    Args:
        path: made, with its folders, if it is not there.

    Raises:
        RecordError: the file is something else, or another process is writing to it.
        OSError, sqlite3.Error: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        try:
            self._connection = _connect(self.path)
            self._positions = dict(self._connection.execute("SELECT name, position FROM parameters"))
            self._last_step = self._scalar("SELECT max(last_step) FROM blocks")
        except BaseException:
            self._unlock()
            raise
        self._has_session = False
        self._layout: object = None
        self._is_main = torch.empty(0, dtype=torch.bool)
        self._start_block()

    def __repr__(self) -> str:
        """Where it is."""
        return f"the record {self.path}"

    def write(self, rows: Rows) -> None:
        """Add rows, in one transaction; a failure closes the file."""
        with self._transaction():
            self._note_session(rows)
            if rows.steps[0] <= self._last_step:
                self._truncate(rows.steps[0])
            self._append({name: self._in_order(name, values, rows) for name, values in rows.series.items()})
            self._connection.executemany(
                "INSERT OR REPLACE INTO skips (step, kind, reason) VALUES (?, ?, ?)",
                [(step, why.value, words) for step, why, words in rows.skips],
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO weight_samples VALUES (?, ?, ?)",
                [(step, *self._sampled(sample)) for step, sample in rows.samples],
            )
        self._last_step = rows.steps[-1]

    def close(self) -> None:
        """Close the file; what was written is in it, and nothing beside it."""
        self._connection.close()
        self._unlock()

    # ---- transactions --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk may have ended it already
                self._connection.execute("ROLLBACK")
            self.close()  # what was committed before stays, and the file is free
            raise

    def _scalar(self, query: str) -> int:
        return self._connection.execute(query).fetchone()[0] or 0

    def _unlock(self) -> None:
        with contextlib.suppress(OSError):
            _lock_path(self.path).unlink()
        self._lock.close()

    # ---- what is recorded ----------------------------------------------------------------------------------------

    def _note_session(self, rows: Rows) -> None:
        """Write down who writes, and the parameters, once and whenever these change."""
        layout = tuple((s.label, s.policy, s.measured.names) for s in rows.selections)
        if layout == self._layout:
            return
        known = {s.measured.names[i]: (s, i) for s in rows.selections for i in range(len(s.measured.names))}
        ordered = [name for name in rows.subject.names if name in known]
        ordered += [name for name in known if name not in set(ordered)]
        if rows.steps[0] <= self._scalar("SELECT min(first_step) FROM blocks"):
            self._connection.execute("DELETE FROM parameters")  # nothing of the old run will be left
            self._positions = {}
        for name in ordered:
            position = self._positions.setdefault(name, len(self._positions))
            selection, i = known[name]
            measured = selection.measured
            size = measured.sizes[i] if measured.sizes else 0
            shape = rows.subject.shapes.get(name, (size,))
            self._connection.execute(
                "INSERT OR REPLACE INTO parameters VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    position,
                    name,
                    json.dumps(shape),
                    size,
                    selection.label,
                    selection.policy,
                    measured.groups[i],
                ),
            )
        selections = self._connection.execute("SELECT selection FROM parameters ORDER BY position")
        self._is_main = torch.tensor([selection == "main" for (selection,) in selections], dtype=torch.bool)
        self._note_rank(rows)
        if not self._has_session:
            self._insert_session(rows)
        if self._width != len(self._positions):
            self._start_block()
        self._layout = layout

    def _note_rank(self, rows: Rows) -> None:
        """Write down whose file this is, and from which step on its samples are of which pieces."""
        subject = rows.subject
        told = {
            "rank": str(subject.rank),
            "ranks": str(subject.ranks),
            "pieces": json.dumps(subject.pieces),
        }
        before = dict(self._connection.execute("SELECT key, value FROM meta"))
        if rows.steps[0] < int(before.get("pieces_since", 0)) or told.items() - before.items():
            told["pieces_since"] = str(rows.steps[0])
        self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", told.items())

    def _insert_session(self, rows: Rows) -> None:
        main = rows.selections[0]
        self._connection.execute(
            "INSERT INTO sessions VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                datetime.now(UTC).isoformat(timespec="seconds"),
                rows.steps[0],
                rows.subject.policy or main.policy,
                main.measured.norm_type,
                rows.subject.optimizer,
                rows.subject.nonfinite,
                __version__,
                torch.__version__,
            ),
        )
        self._has_session = True

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _start_block(self) -> None:
        """From now on rows go into a new block."""
        self._block = self._scalar("SELECT max(block) FROM blocks") + 1
        self._width = len(self._positions)
        self._open: dict[str, Tensor] = {}

    def _in_order(self, name: str, values: Tensor, rows: Rows) -> Tensor:
        """The values with their columns in the file's order."""
        series = series_of(name)
        values = values.to(series.dtype)
        if not series.is_wide:
            return values
        return self._placed(values, rows.names, series.fill)

    def _placed(self, values: Tensor, names: list[str] | tuple[str, ...], fill: float) -> Tensor:
        columns = [self._positions[name] for name in names]
        if columns == list(range(self._width)):
            return values
        result = torch.full((values.shape[0], self._width, *values.shape[2:]), fill, dtype=values.dtype)
        result[:, columns] = values
        return result

    def _sampled(self, sample: Sample) -> tuple[bytes, bytes]:
        names = [name for name in sample.names if name in self._positions]
        known = [i for i, name in enumerate(sample.names) if name in self._positions]
        values = torch.stack([sample.weights, sample.updates]).to(torch.float64)[:, known]
        weights, updates = self._placed(values, names, float("nan"))
        return to_blob(weights), b"" if bool(updates.isnan().all()) else to_blob(updates)

    def _append(self, new: dict[str, Tensor]) -> None:
        """Add rows to the open block; write it, and as many full ones as there are."""
        old = self._open
        counts = len(old.get("step", ())), len(new["step"])
        merged = {
            name: torch.cat([_or_fill(name, old, new, counts[0]), _or_fill(name, new, old, counts[1])])
            for name in dict.fromkeys((*old, *new))
        }
        rows = sum(counts)
        for first in range(0, rows, ROWS_PER_BLOCK):
            self._open = {name: values[first : first + ROWS_PER_BLOCK] for name, values in merged.items()}
            self._write_block()
            if first + ROWS_PER_BLOCK <= rows:
                self._block += 1
                self._open = {}

    def _write_block(self) -> None:
        """Write the open block, in place of what it held before."""
        steps = self._open["step"]
        self._connection.execute(
            "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?)",
            (self._block, int(steps[0]), int(steps[-1]), len(steps), self._width),
        )
        series = {name: values for name, values in self._open.items() if not self._is_implied(name)}
        series["summary"] = summarize(self._open["norms"])
        self._connection.executemany(
            "INSERT OR REPLACE INTO series VALUES (?, ?, ?)",
            [(name, self._block, to_blob(values)) for name, values in series.items()],
        )

    def _is_implied(self, name: str) -> bool:
        """Whether readers know these values without being told."""
        values = self._open[name]
        if name == "present":
            return bool(values.all())
        if name == "coefficients":
            main = self._is_main[: self._width]
            return bool((values == torch.where(main, self._open["coefficient"].unsqueeze(1), 1.0)).all())
        return False

    def _truncate(self, step: int) -> None:
        """Forget this step and all after it: they are recorded again."""
        execute = self._connection.execute
        split = execute(
            "SELECT block, width FROM blocks WHERE first_step < ? AND last_step >= ?", (step, step)
        ).fetchone()
        execute("DELETE FROM series WHERE block IN (SELECT block FROM blocks WHERE first_step >= ?)", (step,))
        execute("DELETE FROM blocks WHERE first_step >= ?", (step,))
        execute("DELETE FROM skips WHERE step >= ?", (step,))
        execute("DELETE FROM weight_samples WHERE step >= ?", (step,))
        if not self._scalar("SELECT count(*) FROM blocks"):
            execute("DELETE FROM sessions WHERE session < (SELECT max(session) FROM sessions)")
        if split is not None:
            self._cut(split[0], split[1], step)
        self._start_block()

    def _cut(self, block: int, width: int, step: int) -> None:
        """Shorten a block to the rows before ``step``."""
        data = dict(self._connection.execute("SELECT name, data FROM series WHERE block = ?", (block,)))
        del data["summary"]
        steps = from_blobs([data["step"]], torch.int64)
        rows = int((steps < step).sum())
        self._block, self._width = block, width
        self._open = {
            name: from_blobs([blob], series_of(name).dtype).reshape(
                len(steps), *((width,) if series_of(name).is_wide else ()), *((2,) if name == "peaks" else ())
            )[:rows]
            for name, blob in data.items()
        }
        self._write_block()


def _or_fill(name: str, series: dict[str, Tensor], other: dict[str, Tensor], rows: int) -> Tensor:
    """The series, or ``rows`` rows of what stands for one that was not recorded."""
    if name in series:
        return series[name]
    return torch.full((rows, *other[name].shape[1:]), series_of(name).fill, dtype=other[name].dtype)


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + "-lock")


def _lock(path: Path) -> sqlite3.Connection:
    """Hold the file for this process: a lock of SQLite's on an empty file beside it, which ends with the process."""
    lock = sqlite3.connect(_lock_path(path), timeout=0, isolation_level=None, check_same_thread=False)
    try:
        lock.execute("PRAGMA journal_mode=MEMORY")
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if "locked" in str(error):
            raise RecordError(
                f"{path} is being written by another process or recorder; give each run a record of its own"
            ) from None
        raise
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        if is_empty(connection, path):
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        check(connection, path, may_be_empty=True)
        # Readers do not stop the writer, and a killed process leaves whole transactions. Where the file system
        # cannot share memory, as network ones, SQLite answers with the journal that it falls back to.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        create(connection)
    except BaseException:
        connection.close()
        raise
    return connection
