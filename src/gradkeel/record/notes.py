"""Findings about single steps, kept in a record beside its rows: a name, and JSON."""

import contextlib
import dataclasses
import json
import math
import os
import sqlite3
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_WAIT = 10.0  # seconds for the recorder's own thread to end a write


def write_note(path: str | os.PathLike[str], key: str, value: Any) -> None:
    """Keep a dataclass in a record that has steps; numbers that are not finite become null.

    Raises:
        sqlite3.Error: the record cannot be written to.
    """
    text = json.dumps(plain(dataclasses.asdict(value)))
    with contextlib.closing(sqlite3.connect(path, timeout=_WAIT)) as connection, connection:
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, text))


def plain(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
