"""Opens a record for reading, whoever made it and in whatever state it is."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gradkeel.errors import RecordError
from gradkeel.record.schema import check, show_as_now


@contextlib.contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes SQLite, or the reading of its numbers, raise: a `RecordError`."""
    try:
        yield
    except RecordError:
        raise
    except (sqlite3.Error, ValueError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
        words = " ".join(str(error).split())  # it may quote what is in the file
        raise RecordError(f"{path} cannot be read: {words or type(error).__name__}") from None


def open_record(path: Path) -> sqlite3.Connection:
    """A connection that reads a record, of any version as one of this, and in no more memory than the file has bytes.

    Raises:
        RecordError: there is none.
    """
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except ValueError as error:  # a path with a NUL
        raise RecordError(f"there is no record at {str(path)!r}: {error}") from None
    if is_directory:
        raise RecordError(f"{path} is a directory; give the record in it, such as {path / 'run.keel'}")
    if not exists:
        raise RecordError(f"there is no record at {path}")
    # Writable, though nothing is written: whoever reads last takes away the files that SQLite keeps beside it.
    modes = ["mode=rw"] if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else []
    # immutable: on a read-only disk SQLite cannot make the files it shares with a writer, and there is no writer.
    for mode in (*modes, "mode=ro", "immutable=1"):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, isolation_level=None)
        try:
            connection.text_factory = lambda data: data.decode(errors="replace")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(1_000_000, size_of(path)))
            connection.execute("PRAGMA trusted_schema=OFF")
            check(connection, path)
            show_as_now(connection)
            connection.execute("PRAGMA query_only=ON")
        except sqlite3.OperationalError:
            connection.close()
            if mode == "immutable=1":
                raise
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise AssertionError


def size_of(path: Path) -> int:
    """Bytes of the file and of its write-ahead log, which no value in it exceeds."""
    files = (path, path.with_name(path.name + "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())
