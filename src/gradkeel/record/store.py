"""Finds and decodes the blobs of a record; what is damaged is left out, or stands as not known."""

import bisect
import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import RecordError
from gradkeel.guard import SkipReason
from gradkeel.record.described import Block, Parameter, Rollback, Session
from gradkeel.record.opening import in_words, open_record, size_of
from gradkeel.record.schema import ROWS_PER_BLOCK, SCALAR_PREFIX, from_blobs, placed, series_of, to_blob

LIVE, SUPERSEDED = "superseded_by = 0", "superseded_by > 0"
"""Which rows are read, as a condition in SQL: those that hold, or those that were recorded again later."""
_SESSION = (str, int, str, float, str, str, str, str, int)  # as its fields are
_MAY_BE_LEFT_OUT = {"coefficients", "present", "weights", "peaks"}
_MOST_PER_BYTE, _ALWAYS_ALLOWED = 8, 1 << 25  # numbers in memory for each byte of the file


def before(session: int) -> str:
    """Which rows there were when a session went back, as a condition in SQL."""
    return f"session < {session} AND (superseded_by = 0 OR superseded_by >= {session})"


class Store:
    """An open record: one consistent view, taken when it is opened, of what the file holds.

    Rows are counted from 0 over the whole record; each holds one step. ``where`` says which there are: `LIVE`,
    `SUPERSEDED` or those `before` a session.

    Attributes:
        meta: key and value, as in the table of that name.
        sessions: the sessions that wrote these rows, in order.
        rollbacks: the sessions that went back, in order.
        parameters: the n parameters, in order of their position.
        blocks: where rows lie.
        steps: [k] int64 their steps; they ascend, but for `SUPERSEDED`.
        rank: of the process that wrote it, 0 where there was one.
        ranks: how many ranks have a file of their own.
        pieces_since: the first step of which `piece` holds.

    Raises what `Reader` does.
    """

    def __init__(self, path: Path, where: str = LIVE) -> None:
        self.path, self._where = path, where
        self._order = " ORDER BY superseded_by, step" if where == SUPERSEDED else " ORDER BY step"
        self._bad: set[int] = set()
        with in_words(path):
            self._connection = open_record(path)
            try:
                self._load()
            except BaseException:
                self._connection.close()
                raise

    def _load(self) -> None:
        query, where = self._connection.execute, self._where
        query("BEGIN")  # all that follows sees the record as it is now
        self.meta: dict[str, str] = dict(query("SELECT key, value FROM meta"))
        self.rank, self.ranks = self._fact("rank", 0), self._fact("ranks", 1)
        self.pieces_since = self._fact("pieces_since", 0)
        pieces = json.loads(self.meta.get("pieces", "null"))
        self._pieces: dict[str, list[int]] | None = pieces if isinstance(pieces, dict) else None
        found = [
            Block(*row)
            for row in query("SELECT * FROM blocks WHERE " + where)  # noqa: S608  # our own words
            if all(isinstance(number, int) for number in row)
        ]
        self._number_of_blocks = len(found)
        sets = query("SELECT DISTINCT superseded_by FROM parameters WHERE superseded_by > 0 ORDER BY 1")
        self._sets = [number for (number,) in sets if isinstance(number, int)]
        self._read_parameters({self._set_of(block) for block in found} or {0})
        self._read_blocks(found)
        everybody = [
            Session(*(kind(value) for kind, value in zip(_SESSION, row, strict=True)))
            for row in query(
                "SELECT started, first_step, policy, norm_type, optimizer, nonfinite, gradkeel, torch, session "
                "FROM sessions ORDER BY session"
            )
        ]
        writers = {block.session for block in self.blocks}
        self.sessions = [s for s in everybody if s.number in writers] or everybody[: len(writers)]
        self.rollbacks = self._read_rollbacks({s.number: s for s in everybody})

    def _fact(self, key: str, default: int) -> int:
        try:
            return int(self.meta.get(key, default))
        except (TypeError, ValueError):
            return default

    def _set_of(self, block: Block) -> int:
        """Under which number a block's parameters stand: a run from scratch may be of others than the one before."""
        place = bisect.bisect_left(self._sets, block.superseded_by)
        return self._sets[place] if block.superseded_by and place < len(self._sets) else 0

    def _read_parameters(self, sets: set[int]) -> None:
        known: dict[str, Parameter] = {}
        names: dict[int, list[str]] = {}
        for number in sorted(sets):
            rows = self._connection.execute(
                "SELECT name, shape, size, selection, policy, optimizer_group FROM parameters "
                "WHERE superseded_by = ? ORDER BY position",
                (number,),
            )
            for name, shape, size, selection, policy, group in rows:
                sizes = tuple(map(int, json.loads(shape)))
                known[name] = Parameter(str(name), sizes, int(size), str(selection), str(policy), int(group))
                names.setdefault(number, []).append(name)
        self.parameters = tuple(known.values())
        places = {name: i for i, name in enumerate(known)}
        self._columns = {number: [places[name] for name in own] for number, own in names.items()}

    def _read_blocks(self, found: list[Block]) -> None:
        """Keep the blocks whose steps can be read and follow each other."""
        self.blocks: list[Block] = []
        parts: list[Tensor] = []
        self._offsets = [0]
        for block in sorted(
            found, key=lambda b: (b.superseded_by * (self._where == SUPERSEDED), b.first_step)
        ):
            steps = self._steps_of(block)
            last = self.blocks[-1] if self.blocks and self._where != SUPERSEDED else None
            if steps is None or (last is not None and block.first_step <= last.last_step):
                self._bad.add(block.block)
                continue
            self.blocks.append(block)
            parts.append(steps)
            self._offsets.append(self._offsets[-1] + block.rows)
        self.steps = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")
        # Series that were read from end to end since the blocks were last looked for.
        self._whole: dict[str, Tensor] = {}
        if found and not parts:
            raise RecordError(f"{self.path} is damaged: none of its blocks of steps can be read")
        if self.rows * self.width > _ALWAYS_ALLOWED + _MOST_PER_BYTE * size_of(self.path):
            raise RecordError(
                f"{self.path} is damaged: it claims more than so small a file can hold (steps: {self.rows}, "
                f"parameters: {self.width})"
            )

    def _steps_of(self, block: Block) -> Tensor | None:
        """[k] the steps of a block, or None where it makes no sense."""
        if not (1 <= block.rows <= ROWS_PER_BLOCK and 0 <= block.width <= len(self._columns_of(block))):
            return None
        blob = self._blob("step", block)
        if blob is None:
            follows = block.last_step - block.first_step + 1 == block.rows
            return torch.arange(block.first_step, block.last_step + 1, device="cpu") if follows else None
        steps = from_blobs([blob], torch.int64)
        fits = int(steps[0]) == block.first_step and int(steps[-1]) == block.last_step
        return steps if fits and bool((steps[1:] > steps[:-1]).all()) else None

    def _columns_of(self, block: Block) -> list[int]:
        return self._columns.get(self._set_of(block), [])

    def _read_rollbacks(self, sessions: dict[int, Session]) -> list[Rollback]:
        rows = self.query(
            "SELECT superseded_by, max(last_step), sum(rows) FROM blocks WHERE superseded_by > 0 "
            "GROUP BY superseded_by ORDER BY superseded_by"
        )
        return [
            Rollback(number, sessions[number].started, sessions[number].first_step, int(last), int(rows))
            for number, last, rows in rows
            if number in sessions
        ]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @property
    def damage(self) -> str | None:
        """What could not be read so far, in words."""
        if not self._bad:
            return None
        return (
            f"{self.path} is damaged: blocks of up to {ROWS_PER_BLOCK} steps that cannot be read as a whole are left "
            f"out, or stand as not known ({len(self._bad)} of {self._number_of_blocks})"
        )

    def query(self, statement: str, *arguments: str | int) -> list[tuple[Any, ...]]:
        """All rows of a SQL query."""
        with in_words(self.path):
            return self._connection.execute(statement, arguments).fetchall()

    def scalar_names(self) -> list[str]:
        """Names of the series that the user logged, without their prefix."""
        blocks = "SELECT block FROM blocks WHERE " + self._where  # noqa: S608
        chosen = f"name >= ? AND name < 'scalar;' AND block IN ({blocks})"
        rows = self.query(f"SELECT DISTINCT name FROM series WHERE {chosen} ORDER BY 1", SCALAR_PREFIX)  # noqa: S608
        return [name.removeprefix(SCALAR_PREFIX) for (name,) in rows]

    def skips(self) -> list[tuple[int, str, SkipReason]]:
        """Number, words and reason of each step that was skipped."""
        kinds = {reason.value: reason for reason in SkipReason}
        return [
            (step, str(words), kinds.get(kind) or SkipReason.of_words(str(words)))
            for step, words, kind in self._noted("step, reason, kind", "skips")
        ]

    def _noted(self, columns: str, table: str) -> list[tuple[Any, ...]]:
        """What a table says of single steps, in their order."""
        chosen = f"{table} WHERE typeof(step) = 'integer' AND {self._where}{self._order}"
        return self.query(f"SELECT {columns} FROM {chosen}")  # noqa: S608  # our own words

    def piece(self, name: str) -> tuple[int, ...] | None:
        """Which piece of a parameter this file's rank held; None for a parameter that counts for another rank."""
        if self._pieces is None:
            return ()
        return tuple(map(int, self._pieces[name])) if name in self._pieces else None

    def weight_samples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Steps [s], and what was measured of the weights [s, n] and of their updates [s, n]; else NaN."""
        rows = self._noted("step, weights, updates", "weight_samples")
        if self._where != SUPERSEDED:  # an index that is damaged gives other orders, and steps twice
            rows = sorted({row[0]: row for row in rows}.values(), key=lambda row: row[0])
        steps = torch.tensor([step for step, _, _ in rows], dtype=torch.int64, device="cpu")
        return steps, self._samples([row[1] for row in rows]), self._samples([row[2] for row in rows])

    def _samples(self, blobs: list[bytes]) -> Tensor:
        """[s, n] of blobs that may be shorter: parameters are added, and an empty one holds nothing."""
        result = torch.full((len(blobs), self.width), math.nan, dtype=torch.float64, device="cpu")
        sizes = [len(blob) if isinstance(blob, bytes) else 0 for blob in blobs]
        for size in {size for size in sizes if 0 < size <= 8 * self.width and not size % 8}:
            rows = [i for i, own in enumerate(sizes) if own == size]
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
        blocks = self.blocks
        first = 0 if start is None else bisect.bisect_left(blocks, start, key=lambda b: b.last_step)
        last = len(blocks) if stop is None else bisect.bisect_left(blocks, stop, key=lambda b: b.first_step)
        return first, max(first, last)

    def _row(self, step: int) -> int:
        """Number of the first row whose step is ``step`` or later."""
        return int(torch.searchsorted(self.steps, step))

    def _blob(self, name: str, block: Block, found: dict[int, Any] | None = None) -> bytes | None:
        """A series of a block; None where it was left out, or is damaged."""
        try:
            if found is None:
                found = dict(self._blobs(name, block.block, block.block))
            blob = found.get(block.block)
        except sqlite3.Error:
            self._bad.add(block.block)
            return None
        series = series_of(name)
        size = math.prod(series.sizes(block.rows, block.width)) * series.dtype.itemsize
        if isinstance(blob, bytes) and len(blob) == size:
            return blob
        may_be_left_out = name in _MAY_BE_LEFT_OUT or name.startswith(SCALAR_PREFIX)
        if not (blob is None and may_be_left_out):
            self._bad.add(block.block)
        return None

    def _blobs(self, name: str, first: int, last: int) -> Iterator[tuple[int, Any]]:
        return self._connection.execute(
            "SELECT block, data FROM series WHERE name = ? AND block BETWEEN ? AND ?", (name, first, last)
        )

    def _all_blobs(self, name: str, blocks: Sequence[Block]) -> list[bytes | None]:
        """A series of several blocks, read at once, or one by one where that fails."""
        numbers = [block.block for block in blocks]
        found: dict[int, Any] | None
        try:
            found = dict(self._blobs(name, min(numbers), max(numbers)))
        except sqlite3.Error:
            found = None
        return [self._blob(name, block, found) for block in blocks]

    def _touched(self, first: int, last: int) -> range:
        """Indices of the blocks that hold rows from ``first`` up to ``last``."""
        if first >= last:
            return range(0)
        return range(bisect.bisect_right(self._offsets, first) - 1, bisect.bisect_left(self._offsets, last))

    def series(self, name: str, first: int, last: int, stride: int = 1) -> Tensor:
        """[k, ...] rows ``first`` up to ``last`` of a series, by its name in the file."""
        series = series_of(name)
        if not series.is_wide:
            return self._narrow(name, first, last, stride)
        parts = [rows for _, rows in self.pieces(name, first, last, stride)]
        return (
            torch.cat(parts)
            if parts
            else torch.empty(series.sizes(0, self.width), dtype=series.dtype, device="cpu")
        )

    def _narrow(self, name: str, first: int, last: int, stride: int) -> Tensor:
        if name == "step":
            return self.steps[first:last:stride]
        if (first, last) == (0, len(self.steps)) and last:
            if name not in self._whole:
                self._whole[name] = self._narrow_of(name, first, last)
            return self._whole[name][::stride].clone()
        return self._narrow_of(name, first, last)[::stride]

    def _narrow_of(self, name: str, first: int, last: int) -> Tensor:
        series, touched = series_of(name), self._touched(first, last)
        if not touched:
            return torch.empty(0, dtype=series.dtype, device="cpu")
        blocks = self.blocks[touched.start : touched.stop]
        fill = to_blob(torch.full((1,), series.fill, dtype=series.dtype, device="cpu"))
        found = self._all_blobs(name, blocks)
        blobs = [blob or fill * block.rows for block, blob in zip(blocks, found, strict=True)]
        offset = self._offsets[touched.start]
        return from_blobs(blobs, series.dtype)[first - offset : last - offset]

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
            if blob is None:
                rows = torch.full(
                    series.sizes(block.rows, self.width), series.fill, dtype=series.dtype, device="cpu"
                )
            else:
                rows = from_blobs([blob], series.dtype).reshape(series.sizes(block.rows, block.width))
                rows = self._placed(rows, block, series.fill)
            rows = rows[skip : last - offset : stride]
            yield offset + skip, rows if stride == 1 else rows.clone()  # a view would keep the whole block

    def block_summaries(self, first: int, last: int) -> Tensor:
        """[b, 3, n] lowest, median and highest norm of each parameter in each of the blocks ``first`` to ``last``."""
        if first >= last:
            return torch.empty(0, 3, self.width, dtype=torch.float64, device="cpu")
        parts: list[Tensor] = []
        blocks = self.blocks[first:last]
        for block, blob in zip(blocks, self._all_blobs("summary", blocks), strict=True):
            if blob is None:
                parts.append(torch.full((3, self.width), math.nan, dtype=torch.float64, device="cpu"))
            else:
                summary = from_blobs([blob], torch.float64).reshape(3, block.width)
                parts.append(self._placed(summary, block, math.nan))
        return torch.stack(parts)

    def _placed(self, rows: Tensor, block: Block, fill: float) -> Tensor:
        """Rows [k, width, ...] of a block with a column for each of the n parameters, also those added later."""
        return placed(rows, self._columns_of(block)[: block.width], self.width, fill)
