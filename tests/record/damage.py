"""Damages record files in every way that disks and people have: for tests/record/test_damaged.py."""

import contextlib
import random
import sqlite3
from pathlib import Path

KINDS = ("flips", "zeroed", "truncated", "swapped", "values", "rows", "tables", "blobs", "log")
HOSTILE = (
    None, -1, 0, 1, 2, 63, 65, 10**6, 2**31, 2**62, 2**63 - 1, -(2**63), 1.5, 1e308, float("inf"), "", "x", "null",
    "NaN", "[]", "[1e400]", "{}", '{"a":1}', "\0", "é" * 1000, "<script>alert(1)</script>", b"", b"\xff" * 7,
    b"\xff" * 512, b"\0" * 4096, b"\x80\x81",
)  # fmt: skip


def damage(whole: bytes, path: Path, kind: str, seed: int) -> None:
    """Write a damaged copy of a record to ``path``."""
    chance = random.Random(f"{kind} {seed}")
    data = bytearray(whole)
    size = int.from_bytes(data[16:18], "big")
    pages = len(data) // size
    if kind == "flips":
        for _ in range(chance.choice([1, 4, 64, 1000])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "zeroed":
        for _ in range(chance.randint(1, 4)):
            page = chance.randrange(pages)
            data[page * size : (page + 1) * size] = bytes(size)
    elif kind == "truncated":
        del data[chance.randrange(len(data)) :]
    elif kind == "swapped":
        one, other = chance.randrange(pages) * size, chance.randrange(pages) * size
        data[one : one + size], data[other : other + size] = (
            data[other : other + size],
            data[one : one + size],
        )
    path.write_bytes(data)
    if kind == "log":
        log = chance.randbytes(chance.choice([0, 10, 32, 4096, 20_000]))
        path.with_name(path.name + chance.choice(["-wal", "-shm", "-journal"])).write_bytes(log)
    elif kind in ("values", "rows", "tables", "blobs"):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")
            for _ in range(chance.randint(1, 3)):
                with contextlib.suppress(sqlite3.Error):  # a constraint held
                    _craft(connection, kind, chance)


def _craft(connection: sqlite3.Connection, kind: str, chance: random.Random) -> None:
    tables = ("meta", "sessions", "parameters", "blocks", "weight_samples", "skips", "series")
    table = chance.choice(tables)
    columns = [column[1] for column in connection.execute(f"PRAGMA table_info({table})")]
    kinds = dict(connection.execute("SELECT name, type FROM sqlite_master"))
    if kinds.get(table) != "table":
        return  # dropped before, or a view that never ends
    column, value = chance.choice(columns), chance.choice(HOSTILE)
    if kind == "values":
        rowids = [rowid for (rowid,) in connection.execute(f"SELECT rowid FROM {table}")] or [0]
        one = f" WHERE rowid = {chance.choice(rowids)}"
        connection.execute(f"UPDATE {table} SET {column} = ?{chance.choice(['', one])}", (value,))
    elif kind == "rows":
        if chance.random() < 0.5:
            connection.execute(f"DELETE FROM {table} WHERE rowid % ? = 0", (chance.choice([1, 2, 3]),))
        else:
            rows = [tuple(chance.choice(HOSTILE) for _ in columns) for _ in range(20)]
            for row in rows:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", row)
    elif kind == "blobs":
        for rowid, size in chance.sample(
            list(connection.execute("SELECT rowid, length(data) FROM series WHERE typeof(data) = 'blob'")), 3
        ):
            length = chance.choice([8, 512, size, max(0, size - 1)])
            data = chance.choice([bytes(length), chance.randbytes(length), "x"])
            connection.execute("UPDATE series SET data = ? WHERE rowid = ?", (data, rowid))
    else:
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
        chosen = chance.choice(["drop", "view", "column", "many", "big"])
        if chosen == "drop":
            connection.execute(f"DROP TABLE {table}")
        elif chosen == "view":
            names = ", ".join(f"i AS {name}" for name in columns)
            connection.execute(f"DROP TABLE {table}")
            connection.execute(f"CREATE VIEW {table} AS SELECT {names} FROM ({endless})")
        elif chosen == "column":
            connection.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO other")
        elif chosen == "many":
            connection.execute(
                "INSERT OR IGNORE INTO blocks SELECT i, i, i + 63, 64, 1, 1, 0 FROM "
                f"({endless} LIMIT 2000) WHERE i > 10"
            )
        else:
            connection.execute(
                "INSERT OR IGNORE INTO parameters SELECT i, 'p' || i, '[1]', 1, 'main', '', 0, 0 "
                f"FROM ({endless} LIMIT 2000)"
            )
