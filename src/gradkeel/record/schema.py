"""The record file: one SQLite database for a run, and the one place that says what is in it."""

import ctypes
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from gradkeel.errors import RecordError

SCHEMA_VERSION = 3
"""2: skips have a kind. 3: steps that are recorded again leave the older ones in the file, marked. Older records are
read as well, and continued in this version."""
APPLICATION_ID = 0x6B65656C  # "keel"
ROWS_PER_BLOCK = 64
"""How many steps a block holds, which are read together."""

STEPPED, CLIPPED, NONFINITE = 1, 2, 4
"""The bits of a verdict."""

SCALAR_PREFIX = "scalar:"

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE series_types (
    name TEXT PRIMARY KEY, dtype TEXT NOT NULL, shape TEXT NOT NULL, unit TEXT NOT NULL, meaning TEXT NOT NULL
);
CREATE TABLE sessions (
    session INTEGER PRIMARY KEY, started TEXT NOT NULL, first_step INTEGER NOT NULL, policy TEXT NOT NULL,
    norm_type REAL NOT NULL, optimizer TEXT NOT NULL, nonfinite TEXT NOT NULL, gradkeel TEXT NOT NULL,
    torch TEXT NOT NULL
);
CREATE TABLE parameters (
    position INTEGER NOT NULL, name TEXT NOT NULL, shape TEXT NOT NULL, size INTEGER NOT NULL,
    selection TEXT NOT NULL, policy TEXT NOT NULL, optimizer_group INTEGER NOT NULL,
    superseded_by INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (superseded_by, position), UNIQUE (superseded_by, name)
);
CREATE TABLE blocks (
    block INTEGER PRIMARY KEY, first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, rows INTEGER NOT NULL,
    width INTEGER NOT NULL, session INTEGER NOT NULL, superseded_by INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE series (
    name TEXT NOT NULL, block INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (name, block)
);
CREATE TABLE weight_samples (
    step INTEGER NOT NULL, weights BLOB NOT NULL, updates BLOB NOT NULL, session INTEGER NOT NULL,
    superseded_by INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (step, session)
);
CREATE TABLE skips (
    step INTEGER NOT NULL, reason TEXT NOT NULL, kind TEXT NOT NULL, session INTEGER NOT NULL,
    superseded_by INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (step, session)
);
"""
_NAMES = ("meta", "sessions", "parameters", "blocks", "series", "weight_samples", "skips")

# What tables of older versions are as tables of this one. Their sessions wrote what follows their first step.
_AS_NOW = {
    "parameters": "position, name, shape, size, selection, policy, optimizer_group, 0 AS superseded_by",
    "blocks": "block, first_step, last_step, rows, width, {session} <= t.first_step), 1) {own}",
    "weight_samples": "step, weights, updates, {session} <= t.step), 1) {own}",
    "skips": "step, reason, {kind} AS kind, {session} <= t.step), 1) {own}",
}
_SESSION = "coalesce((SELECT max(session) FROM main.sessions WHERE first_step"
_OWN = "AS session, 0 AS superseded_by"


@dataclass(frozen=True, slots=True)
class Series:
    """One thing that is recorded at every step, and how its blobs are read."""

    name: str  # its name in the table ``series``
    shape: str  # of a block's blob; k is the block's rows, n its width (how many parameters it knows)
    unit: str  # of the numbers
    meaning: str  # in words
    dtype: torch.dtype = torch.float64  # of the numbers in a blob, little-endian, in C order
    fill: float = float("nan")  # what a step holds where the series was not recorded

    @property
    def is_wide(self) -> bool:
        """Whether it has a column for each parameter."""
        return "n" in self.shape

    def sizes(self, rows: int, width: int) -> tuple[int, ...]:
        """Its shape in a block of so many rows and parameters."""
        known = {"k": rows, "n": width}
        return tuple(known[one] if one in known else int(one) for one in self.shape.strip("[]").split(", "))


_GRADIENT = "the gradient's"
SERIES: dict[str, Series] = {
    series.name: series
    for series in (
        Series(
            "step", "[k]", "1", "number of the optimizer step, from 1; skipped steps count", torch.int64, 0
        ),
        Series("time", "[k]", "s", "when the step ended, in seconds since 1970 UTC"),
        Series(
            "verdict",
            "[k]",
            "bits",
            "1 stepped, 2 clipped, 4 a gradient that was not finite",
            torch.uint8,
            STEPPED,
        ),
        Series("total", "[k]", _GRADIENT, "norm of the main selection's true gradients"),
        Series("clipped_total", "[k]", _GRADIENT, "the same after clipping; NaN where not known"),
        Series("coefficient", "[k]", "1", "smallest coefficient of the main selection", fill=1),
        Series("bound", "[k]", _GRADIENT, "smallest bound in force; inf: none yet; NaN: no bound"),
        Series("norms", "[k, n]", _GRADIENT, "norm of each parameter's true gradient, before clipping"),
        Series(
            "coefficients",
            "[k, n]",
            "1",
            "each parameter's coefficient; left out of a block where the main selection's all equal `coefficient` "
            "and all others are 1",
        ),
        Series(
            "present",
            "[k, n]",
            "1",
            "0 where a parameter had no gradient; left out of a block where all had one",
            torch.uint8,
            1,
        ),
        Series("weights", "[k, n]", "the weight's", "norm of each parameter, where the policy looks at it"),
        Series(
            "peaks",
            "[k, n, 2]",
            _GRADIENT,
            "lowest and highest entry of each gradient, where the policy looks at them",
        ),
        Series(
            "summary",
            "[3, n]",
            _GRADIENT,
            "lowest, median and highest finite norm of each parameter in the block; NaN where there is none",
        ),
    )
}
SCALAR = Series(
    SCALAR_PREFIX + "NAME", "[k]", "the user's", "what guard.log(NAME=...) was told, such as the loss"
)


def series_of(name: str) -> Series:
    """The series of this name; every ``scalar:...`` is one."""
    return SCALAR if name.startswith(SCALAR_PREFIX) else SERIES[name]


def to_blob(tensor: Tensor) -> bytes:
    """The tensor's numbers as bytes, in C order; the tensor lies on the CPU."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""


def placed(values: Tensor, columns: Sequence[int], width: int, fill: float) -> Tensor:
    """Values [k, columns, ...] at their places in [k, width, ...], and ``fill`` in the other columns."""
    if columns == list(range(width)):
        return values
    result = torch.full((len(values), width, *values.shape[2:]), fill, dtype=values.dtype, device="cpu")
    result[:, columns] = values
    return result


def from_blobs(blobs: Sequence[bytes | bytearray], dtype: torch.dtype) -> Tensor:
    """[m] the numbers of these blobs, one after the other."""
    data = bytearray().join(blobs)  # torch wants a buffer that it may write to
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")


def create(connection: sqlite3.Connection) -> None:
    """Make the tables, in one transaction, if they are not there, or bring older ones up to date."""
    connection.execute("BEGIN IMMEDIATE")
    version = _pragma(connection, "user_version")
    statements = {s.split()[2]: s for s in TABLES.split(";\n") if s.strip()}
    if 0 < version < SCHEMA_VERSION:
        for name, columns in _AS_NOW.items():
            connection.execute(f"ALTER TABLE {name} RENAME TO old")
            connection.execute(statements[name])
            connection.execute(f"INSERT INTO {name} {_as_now(columns, 'old', version)}")
            connection.execute("DROP TABLE old")
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (str(SCHEMA_VERSION),))
    elif not version:
        for statement in statements.values():
            connection.execute(statement)
        connection.executemany(
            "INSERT INTO series_types VALUES (?, ?, ?, ?, ?)",
            [
                (one.name, str(one.dtype).removeprefix("torch."), one.shape, one.unit, one.meaning)
                for one in (*SERIES.values(), SCALAR)
            ],
        )
        created = datetime.now(UTC).isoformat(timespec="seconds")
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [("format", "gradkeel record"), ("schema_version", str(SCHEMA_VERSION)), ("created", created)],
        )
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    connection.execute("COMMIT")


def show_as_now(connection: sqlite3.Connection) -> None:
    """Let a reader see a record of an older version as one of this, without writing to it."""
    version = _pragma(connection, "user_version")
    if version < SCHEMA_VERSION:
        for name, columns in _AS_NOW.items():
            connection.execute(f"CREATE TEMP VIEW {name} AS {_as_now(columns, f'main.{name}', version)}")


def _as_now(columns: str, table: str, version: int) -> str:
    chosen = columns.format(kind="kind" if version > 1 else "''", session=_SESSION, own=_OWN)
    return f"SELECT {chosen} FROM {table} AS t"  # noqa: S608  # our own words


def is_empty(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether nothing has been written to the file yet.

    Raises:
        RecordError: it is no database.
    """
    try:
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return not tables and _pragma(connection, "application_id") in {0, APPLICATION_ID}
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if "locked" in str(error) or "disk is full" in str(error) or "disk I/O" in str(error):
            raise
        words = " ".join(str(error).split())  # it may quote what is in the file
        raise RecordError(f"{path} is not a gradkeel record, or a damaged one: {words}") from None


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Raise `RecordError` unless the database is a record that this version can read."""
    empty, version = is_empty(connection, path), _pragma(connection, "user_version")
    if empty:
        raise RecordError(f"{path} is empty: no step has been recorded yet")
    if _pragma(connection, "application_id") != APPLICATION_ID:
        raise RecordError(
            f"{path} is not a gradkeel record; one is made by attach(..., record='run.keel') or "
            "GRADKEEL_RECORD=run.keel"
        )
    if version > SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema version {version}, and this gradkeel reads up to {SCHEMA_VERSION}; "
            "run: pip install --upgrade gradkeel"
        )
    kinds = dict(connection.execute("SELECT name, type FROM sqlite_master"))
    missing = [name for name in _NAMES if kinds.get(name) != "table"]  # a view could compute for ever
    if version < 1 or missing:
        raise RecordError(f"{path} is damaged: it has no table {', '.join(missing) or 'of a known version'}")


def rank_path(path: str | os.PathLike[str], rank: int) -> Path:
    """Where a rank writes: rank 0 to ``run.keel`` itself, rank 1 to ``run.rank1.keel`` beside it."""
    path = Path(path)
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def is_record(path: Path) -> bool:
    """Whether a file is a record, by its first bytes alone, or one of the files that SQLite keeps beside a record."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        try:
            with Path(str(path).removesuffix(suffix)).open("rb") as file:
                head = file.read(72)
        except (OSError, ValueError):
            continue
        if head[:15] == b"SQLite format 3" and head[68:72] == APPLICATION_ID.to_bytes(4, "big"):
            return True
    return False


def refuse_record(path: Path, argument: str) -> None:
    """Raise `RecordError` if writing something else to ``path`` would destroy a record."""
    if is_record(path):
        raise RecordError(f"{argument} {path}: that is a record, which would be lost; choose another path")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
