"""Findings about single steps, kept in a record beside its rows: a name, and JSON."""

import contextlib
import dataclasses
import json
import math
import os
import sqlite3
from typing import Any

_WAIT = 10.0  # seconds for the recorder's own thread to end a write


def write_note(path: str | os.PathLike[str], key: str, value: Any) -> None:
    """Keep a dataclass in a record that has steps; numbers that are not finite become null.

    Raises:
        sqlite3.Error: the record cannot be written to.
    """
    text = json.dumps(_plain(dataclasses.asdict(value)))
    with contextlib.closing(sqlite3.connect(path, timeout=_WAIT)) as connection, connection:
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, text))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
