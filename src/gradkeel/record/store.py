"""Finds and decodes the blobs of a record."""

import bisect
import json
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import RecordError
from gradkeel.record.described import Block, Parameter, Session
from gradkeel.record.schema import check, from_blobs, series_of, to_blob


class Store:
    """An open record: one consistent view, taken when it is opened, of what the file holds.

    Rows are counted from 0 over the whole record; each holds one step.

    Attributes:
        meta: key and value, as in the table of that name.
        sessions: the processes that wrote, in order.
        parameters: the n parameters, in order of their position.
        blocks: where rows lie.
        rank: of the process that wrote it, 0 where there was one.
        ranks: how many ranks have a file of their own.
        pieces_since: the first step of which `piece` holds.

    Raises:
        RecordError: there is no such file, it is no record, or a newer version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._connection = _open(path)
        try:
            check(self._connection, path)
            self._load()
        except BaseException:
            self._connection.close()
            raise

    def _load(self) -> None:
        query = self._connection.execute
        query("BEGIN")  # all that follows sees the record as it is now
        self.meta: dict[str, str] = dict(query("SELECT key, value FROM meta"))
        self.rank, self.ranks = int(self.meta.get("rank", 0)), int(self.meta.get("ranks", 1))
        self.pieces_since = int(self.meta.get("pieces_since", 0))
        self._pieces = json.loads(self.meta.get("pieces", "null"))
        self.sessions = [Session(*row[1:]) for row in query("SELECT * FROM sessions ORDER BY session")]
        self.parameters = tuple(
            Parameter(name, tuple(json.loads(shape)), size, selection, policy, group)
            for _, name, shape, size, selection, policy, group in query(
                "SELECT * FROM parameters ORDER BY position"
            )
        )
        self.blocks = [Block(*row) for row in query("SELECT * FROM blocks ORDER BY block")]
        self._offsets = [0]
        for block in self.blocks:
            self._offsets.append(self._offsets[-1] + block.rows)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def query(self, statement: str, *arguments: str | int) -> list[tuple[Any, ...]]:
        """All rows of a SQL query."""
        return self._connection.execute(statement, arguments).fetchall()

    def piece(self, name: str) -> tuple[int, ...] | None:
        """Which piece of a parameter this file's rank held; None for a parameter that counts for another rank."""
        if self._pieces is None:
            return ()
        return tuple(self._pieces[name]) if name in self._pieces else None

    def weight_samples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Steps [s], and what was measured of the weights [s, n] and of their updates [s, n]; else NaN."""
        rows = self.query("SELECT step, weights, updates FROM weight_samples ORDER BY step")
        steps = torch.tensor([step for step, _, _ in rows], dtype=torch.int64)
        return steps, self._samples([row[1] for row in rows]), self._samples([row[2] for row in rows])

    def _samples(self, blobs: list[bytes]) -> Tensor:
        """[s, n] of blobs that may be shorter: parameters are added, and an empty one holds nothing."""
        result = torch.full((len(blobs), self.width), math.nan, dtype=torch.float64)
        for size in {len(blob) for blob in blobs} - {0}:
            rows = [i for i, blob in enumerate(blobs) if len(blob) == size]
            values = from_blobs([blobs[i] for i in rows], torch.float64)
            result[rows, : size // 8] = values.reshape(len(rows), -1)
        return result

    @property
    def rows(self) -> int:
        """Number of steps."""
        return self._offsets[-1]

    @property
    def width(self) -> int:
        """Number of parameters."""
        return len(self.parameters)

    def row_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        """First row and one past the last row whose step numbers lie in [start, stop)."""
        return 0 if start is None else self._row(start), self.rows if stop is None else self._row(stop)

    def block_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        """Index of the first and one past the last block that holds any of the steps [start, stop)."""
        first = (
            0 if start is None else bisect.bisect_left(self.blocks, start, key=lambda block: block.last_step)
        )
        last = (
            len(self.blocks)
            if stop is None
            else bisect.bisect_left(self.blocks, stop, key=lambda b: b.first_step)
        )
        return first, max(first, last)

    def _row(self, step: int) -> int:
        """Number of the first row whose step is ``step`` or later."""
        i = bisect.bisect_left(self.blocks, step, key=lambda block: block.last_step)
        if i == len(self.blocks) or step <= self.blocks[i].first_step:
            return self._offsets[i]
        steps = from_blobs([self._blob("step", self.blocks[i]) or b""], torch.int64)
        return self._offsets[i] + int(torch.searchsorted(steps, step))

    def _blob(self, name: str, block: Block) -> bytes | None:
        row = self._connection.execute(
            "SELECT data FROM series WHERE name = ? AND block = ?", (name, block.block)
        ).fetchone()
        return None if row is None else row[0]

    def _touched(self, first: int, last: int) -> range:
        """Indices of the blocks that hold rows from ``first`` up to ``last``."""
        if first >= last:
            return range(0)
        return range(bisect.bisect_right(self._offsets, first) - 1, bisect.bisect_left(self._offsets, last))

    def series(self, name: str, first: int, last: int, stride: int = 1) -> Tensor:
        """[k, ...] rows ``first`` up to ``last`` of a series, by its name in the file."""
        read = self._wide if series_of(name).is_wide else self._narrow
        return read(name, first, last, stride)

    def _narrow(self, name: str, first: int, last: int, stride: int) -> Tensor:
        series = series_of(name)
        blocks = self._touched(first, last)
        if not blocks:
            return torch.empty(0, dtype=series.dtype)
        found = dict(
            self._connection.execute(
                "SELECT block, data FROM series WHERE name = ? AND block BETWEEN ? AND ?",
                (name, self.blocks[blocks[0]].block, self.blocks[blocks[-1]].block),
            )
        )
        fill = to_blob(torch.full((1,), series.fill, dtype=series.dtype))
        blobs = [found.get(b.block) or fill * b.rows for b in (self.blocks[i] for i in blocks)]
        offset = self._offsets[blocks[0]]
        return from_blobs(blobs, series.dtype)[first - offset : last - offset : stride]

    def _wide(self, name: str, first: int, last: int, stride: int) -> Tensor:
        parts = [rows for _, rows in self.pieces(name, first, last, stride)]
        if parts:
            return torch.cat(parts)
        return torch.empty((0, *self._row_shape(name)), dtype=series_of(name).dtype)

    def _row_shape(self, name: str) -> tuple[int, ...]:
        return (self.width, 2) if name == "peaks" else (self.width,)

    def pieces(self, name: str, first: int, last: int, stride: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Rows ``first`` to ``last`` of a series with a column for each parameter, block by block.

        Yields:
            The number of the first row, and the rows [k, n, ...].
        """
        series = series_of(name)
        for i in self._touched(first, last):
            offset, block = self._offsets[i], self.blocks[i]
            skip = max(first - offset, (first - offset) % stride if offset > first else 0)
            if skip >= min(block.rows, last - offset):
                continue
            blob = self._blob(name, block)
            rows = (
                torch.full((block.rows, *self._row_shape(name)), series.fill, dtype=series.dtype)
                if blob is None
                else pad(
                    from_blobs([blob], series.dtype).reshape(
                        block.rows, block.width, *self._row_shape(name)[1:]
                    ),
                    self.width,
                    series.fill,
                )
            )
            rows = rows[skip : last - offset : stride]
            yield offset + skip, rows if stride == 1 else rows.clone()  # a view would keep the whole block

    def block_summaries(self, first: int, last: int) -> Tensor:
        """[b, 3, n] lowest, median and highest norm of each parameter in each of the blocks ``first`` to ``last``."""
        if first >= last:
            return torch.empty(0, 3, self.width, dtype=torch.float64)
        rows = self._connection.execute(
            "SELECT data FROM series WHERE name = 'summary' AND block BETWEEN ? AND ? ORDER BY block",
            (self.blocks[first].block, self.blocks[last - 1].block),
        )
        parts: list[Tensor] = []
        n = self.width
        for block, (blob,) in zip(self.blocks[first:last], rows, strict=True):
            summary = from_blobs([blob], torch.float64).reshape(3, block.width)
            parts.append(summary if block.width == n else pad(summary.T, n, math.nan, dim=0).T)
        return torch.stack(parts)


def _open(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise RecordError(f"there is no record at {path}")
    try:
        return _connect(path, "mode=ro")
    except sqlite3.OperationalError:
        # A record on a read-only disk: SQLite cannot make the files it shares with a writer, and there is no writer.
        return _connect(path, "immutable=1")


def _connect(path: Path, query: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?{query}", uri=True, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:
        connection.close()
        raise
    except sqlite3.DatabaseError:
        pass  # not a database: check() says so
    return connection


def pad(rows: Tensor, width: int, fill: float, dim: int = 1) -> Tensor:
    """Rows with columns of ``fill`` up to ``width``: parameters that were added later."""
    dim = min(dim, rows.dim() - 1)
    missing = width - rows.shape[dim]
    if missing <= 0:
        return rows
    shape = list(rows.shape)
    shape[dim] = missing
    return torch.cat([rows, torch.full(shape, fill, dtype=rows.dtype)], dim=dim)
