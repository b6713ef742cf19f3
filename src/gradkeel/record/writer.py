"""Writes rows into a record file, block by block, each flush one transaction; runs on the recorder's own thread."""

import contextlib
import itertools
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import RecordError
from gradkeel.record.downsample import summarize
from gradkeel.record.kept import Sample
from gradkeel.record.lock import FileLock
from gradkeel.record.rows import Rows, layout
from gradkeel.record.schema import (
    APPLICATION_ID,
    ROWS_PER_BLOCK,
    check,
    create,
    from_blobs,
    is_empty,
    placed,
    series_of,
    to_blob,
)
from gradkeel.version import __version__

_MAYBE_IMPLIED = ("present", "coefficients")
_VARIABLES = 999
"""Of one statement, which any SQLite takes."""
_BYTES = 2**20
"""Of blobs in one statement, for SQLite copies what is bound to it."""
_WAIT_SECONDS = 60  # for a reader that holds the file where there is no write-ahead log


class RecordFile:
    """One run's record, open for writing; see docs/record.md for what is in it.

    Nothing is ever taken out of it. Steps that are recorded again supersede the old ones from the first such step on:
    these stay, marked, and a new session begins. One recorder writes to a file at a time; any number may read. A file
    that is moved or deleted while it is open is said once, and recording goes on under the path that was given.
    Folders are made; ``say`` is told what whoever trains should know.

    Raises:
        RecordError: the file is something else, or another recorder is writing to it.
        OSError, sqlite3.Error: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], say: Callable[[str], None] = lambda words: None) -> None:
        self.path, self._say = Path(path), say
        self._open()

    def _open(self) -> None:
        self._real = self.path.resolve()
        self._real.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._real)
        try:
            self._connection = _connect(self._real)
            self._positions = dict(
                self._connection.execute("SELECT name, position FROM parameters WHERE superseded_by = 0")
            )
            self._last_step = self._scalar("SELECT max(last_step) FROM blocks WHERE superseded_by = 0")
        except BaseException:
            self._lock.release()
            raise
        self._session = 0  # none yet
        self._layout: object = None
        self._is_main = self._read_main()
        self._start_block()

    def __repr__(self) -> str:
        return f"the record {self.path}"

    def write(self, rows: Rows) -> None:
        """Add rows, in one transaction; a failure closes the file."""
        if not self._lock.is_at(self._real):
            self._follow()
        with self._transaction():
            first = rows.steps[0]
            goes_back = first <= self._last_step
            if not self._session or goes_back:
                self._start_session(rows)
            elif self._session != self._scalar("SELECT max(session) FROM sessions"):
                raise RecordError("another recorder writes to it now; give each run a record of its own")
            if goes_back:
                self._supersede(first)
            self._note_parameters(rows)
            columns = [self._positions[name] for name in rows.names]
            self._append(
                {name: self._in_order(name, values, columns) for name, values in rows.series.items()}
            )
            self._insert(
                "INSERT INTO skips (step, kind, reason, session)",
                [(step, why.value, words, self._session) for step, why, words in rows.skips],
            )
            self._insert(
                "INSERT INTO weight_samples (step, weights, updates, session)",
                [(step, *blobs, self._session) for step, blobs in self._sampled(rows.samples)],
            )
        self._last_step = rows.steps[-1]

    def close(self) -> None:
        """Close the file; what was written is in it, and nothing beside it."""
        self._connection.close()
        self._lock.release()  # after the connection, whose own locks end with any descriptor of the file

    def is_at(self, path: Path) -> bool:
        """Whether ``path``, under whatever name, is the file that this writes to."""
        return self._lock.is_at(path)

    def _follow(self) -> None:
        """Go on under the path that was given, where the file that was open has been moved or deleted."""
        words = "was moved; recording goes on in a new file there"
        rescued, is_free = None, not self._real.exists()
        try:
            if self._lock.is_deleted() and is_free:
                words = "was deleted; all of it is written there again, and recording goes on"
                self._real.parent.mkdir(parents=True, exist_ok=True)
                rescued = self._real.with_name(f"{self._real.name}-rescued")
                with contextlib.closing(sqlite3.connect(rescued)) as copy:
                    self._connection.backup(copy)
            # Closing leaves it out of a moved file.
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self.close()
        if is_free:
            for suffix in ("-wal", "-shm"):  # of the file that was here
                self._real.with_name(self._real.name + suffix).unlink(missing_ok=True)
        if rescued is not None:
            rescued.rename(self._real)
        self._open()
        self._say(f"the record {self.path} {words}")

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

    def _insert(self, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert rows, many by one statement: at the end of each the interpreter's lock changes hands."""
        if not rows:
            return
        largest = max(sum([len(value) for value in row if isinstance(value, bytes)]) for row in rows)
        most = max(1, min(_VARIABLES // len(rows[0]), _BYTES // max(1, largest)))
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            places = ", ".join([f"({', '.join('?' * len(part[0]))})"] * len(part))
            self._connection.execute(f"{into} VALUES {places}", list(itertools.chain.from_iterable(part)))

    def _scalar(self, query: str) -> int:
        return self._connection.execute(query).fetchone()[0] or 0

    # ---- what is recorded ----------------------------------------------------------------------------------------

    def _note_parameters(self, rows: Rows) -> None:
        """Write down the parameters, once a session and whenever they change."""
        own = layout(rows.selections)
        if own == self._layout:
            return
        known = {name: (s, i) for s in rows.selections for i, name in enumerate(s.measured.names)}
        ordered = [name for name in rows.subject.names if name in known]
        ordered += [name for name in known if name not in set(ordered)]
        for name in ordered:
            position = self._positions.setdefault(name, len(self._positions))
            selection, i = known[name]
            measured = selection.measured
            size = measured.sizes[i] if measured.sizes else 0
            shape = rows.subject.shapes.get(name, (size,))
            self._connection.execute(
                "INSERT OR REPLACE INTO parameters VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
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
        self._is_main = self._read_main()
        self._note_rank(rows)
        if self._width != len(self._positions):
            self._start_block()
        self._layout = own

    def _read_main(self) -> Tensor:
        selections = self._connection.execute(
            "SELECT selection FROM parameters WHERE superseded_by = 0 ORDER BY position"
        )
        return torch.tensor(
            [selection == "main" for (selection,) in selections], dtype=torch.bool, device="cpu"
        )

    def _note_rank(self, rows: Rows) -> None:
        """Write down whose file this is, and from which step on its samples are of which pieces."""
        subject = rows.subject
        told = {"rank": str(subject.rank), "ranks": str(subject.ranks), "pieces": json.dumps(subject.pieces)}
        before = dict(self._connection.execute("SELECT key, value FROM meta"))
        if rows.steps[0] < int(before.get("pieces_since", 0)) or told.items() - before.items():
            told["pieces_since"] = str(rows.steps[0])
        self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", told.items())

    def _start_session(self, rows: Rows) -> None:
        main = rows.selections[0]
        self._session = self._connection.execute(
            "INSERT INTO sessions VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING session",
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
        ).fetchone()[0]
        self._layout = None  # written down again, for what it was before may belong to what is superseded

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _start_block(self, width: int | None = None) -> None:
        """From now on rows go into a new block."""
        self._block = self._scalar("SELECT max(block) FROM blocks") + 1
        self._width = len(self._positions) if width is None else width
        self._open_rows: dict[str, Tensor] = {}

    def _in_order(self, name: str, values: Tensor, columns: Sequence[int]) -> Tensor:
        """The values with their columns at the file's."""
        series = series_of(name)
        values = values.to(series.dtype)
        return placed(values, columns, self._width, series.fill) if series.is_wide else values

    def _sampled(self, samples: Sequence[tuple[int, Sample]]) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
        """Each step's norms of weights and updates, by the file's columns; nothing where no update was measured."""
        for names, group in itertools.groupby(samples, key=lambda one: one[1].names):
            steps, own = zip(*group, strict=True)
            known = {i: self._positions[name] for i, name in enumerate(names) if name in self._positions}
            kept = torch.stack([norms for one in own for norms in (one.weights, one.updates)])[:, list(known)]
            rows = placed(kept.to(torch.float64), list(known.values()), self._width, float("nan"))
            has_updates = (~rows[1::2].isnan()).any(dim=1).tolist()
            blobs = _pieces(to_blob(rows), len(rows))
            for step, weights, updates, has in zip(steps, blobs[::2], blobs[1::2], has_updates, strict=True):
                yield step, (weights, updates if has else b"")

    def _append(self, new: dict[str, Tensor]) -> None:
        """Add rows to the open block; write it, and as many full ones as there are."""
        old = self._open_rows
        counts = len(old.get("step", ())), len(new["step"])
        merged = new
        if old:
            merged = {
                name: torch.cat([_or_fill(name, old, new, counts[0]), _or_fill(name, new, old, counts[1])])
                for name in dict.fromkeys((*old, *new))
            }
        rows = sum(counts)
        full = rows - rows % ROWS_PER_BLOCK
        self._write_blocks(
            self._block, {name: values[:full] for name, values in merged.items()}, ROWS_PER_BLOCK
        )
        self._block += full // ROWS_PER_BLOCK
        self._open_rows = {name: values[full:] for name, values in merged.items()} if full < rows else {}
        self._write_blocks(self._block, self._open_rows, rows - full)

    def _write_blocks(self, first: int, rows: dict[str, Tensor], size: int) -> None:
        """Write rows as blocks of ``size``, from the number ``first`` on, in place of what these held before.

        What is the same for all of them is done once: each operation of torch's hands the interpreter's lock over.
        """
        if not rows or not len(rows["step"]):
            return
        steps = rows["step"].reshape(-1, size).tolist()
        count = len(steps)
        self._insert(
            "INSERT OR REPLACE INTO blocks (block, first_step, last_step, rows, width, session)",
            [(first + i, one[0], one[-1], size, self._width, self._session) for i, one in enumerate(steps)],
        )
        norms = rows["norms"].reshape(count, size, self._width).transpose(0, 1)
        blobs = {name: _pieces(to_blob(values), count) for name, values in rows.items()}
        blobs["summary"] = _pieces(to_blob(summarize(norms).transpose(0, 1)), count)
        implied = {name: self._are_implied(name, rows, count) for name in _MAYBE_IMPLIED if name in rows}
        self._insert(
            "INSERT OR REPLACE INTO series",
            [
                (name, first + i, blob)
                for name, own in blobs.items()
                for i, blob in enumerate(own)
                if name not in implied or not implied[name][i]
            ],
        )

    def _are_implied(self, name: str, rows: dict[str, Tensor], count: int) -> list[bool]:
        """For each of ``count`` blocks, whether readers know these values without being told."""
        values = rows[name]
        if name == "coefficients":
            main = self._is_main[: self._width]
            values = values == torch.where(main, rows["coefficient"].unsqueeze(1), 1.0)
        return values.bool().reshape(count, len(values) // count * self._width).all(dim=1).tolist()

    def _supersede(self, step: int) -> None:
        """Mark this step and all after it: this session records them again."""
        execute, by = self._connection.execute, self._session
        split = execute(
            "SELECT block, width, session FROM blocks WHERE superseded_by = 0 AND first_step < ? AND last_step >= ?",
            (step, step),
        ).fetchone()
        if split is not None:
            block, width, session = split
            self._split(block, width, session, step)
        for table, column in (("blocks", "first_step"), ("skips", "step"), ("weight_samples", "step")):
            those = f"superseded_by = 0 AND {column} >= ?"
            execute(f"UPDATE {table} SET superseded_by = ? WHERE {those}", (by, step))  # noqa: S608  # our own words
        if not self._scalar("SELECT count(*) FROM blocks WHERE superseded_by = 0"):
            # A run from scratch, perhaps of another model.
            execute("UPDATE parameters SET superseded_by = ? WHERE superseded_by = 0", (by,))
            self._positions = {}
        self._start_block()

    def _split(self, block: int, width: int, session: int, step: int) -> None:
        """Make two blocks of one: the rows before ``step`` and the others."""
        data = dict(self._connection.execute("SELECT name, data FROM series WHERE block = ?", (block,)))
        del data["summary"]
        # What the whole had to say may be implied in a part, which then is not written in its place.
        self._connection.execute("DELETE FROM series WHERE block = ?", (block,))
        steps = from_blobs([data["step"]], torch.int64)
        rows = int((steps < step).sum())
        series = {
            name: from_blobs([blob], series_of(name).dtype).reshape(series_of(name).sizes(len(steps), width))
            for name, blob in data.items()
        }
        now, self._session, self._width = self._session, session, width
        self._start_block(width)
        for number, part in ((self._block, slice(rows, None)), (block, slice(0, rows))):
            own = {name: values[part] for name, values in series.items()}
            self._write_blocks(number, own, len(own["step"]))
        self._session = now


def _pieces(blob: bytes, count: int) -> list[bytes]:
    """The blob in ``count`` equal pieces."""
    size = len(blob) // count
    return [blob[i * size : (i + 1) * size] for i in range(count)]


def _or_fill(name: str, series: dict[str, Tensor], other: dict[str, Tensor], rows: int) -> Tensor:
    """The series, or ``rows`` rows of what stands for one that was not recorded."""
    if name in series:
        return series[name]
    return torch.full(
        (rows, *other[name].shape[1:]), series_of(name).fill, dtype=other[name].dtype, device="cpu"
    )


def _connect(path: Path) -> sqlite3.Connection:
    # Without a cache of statements: each in it would keep the blobs that were bound to it.
    connection = sqlite3.connect(
        path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=0
    )
    try:
        if is_empty(connection, path):
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        else:
            check(connection, path)
        # Readers do not stop the writer, and a killed process leaves whole transactions. Where the file system
        # cannot share memory, as network ones, SQLite answers with the journal that it falls back to.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        create(connection)
    except BaseException:
        connection.close()
        raise
    return connection
