"""A record as a table that other programs read: CSV, or Parquet with the extra ``parquet``."""

import csv
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import MissingExtraError
from gradkeel.record.reader import Reader
from gradkeel.record.schema import CLIPPED, NONFINITE, SCALAR_PREFIX, STEPPED, refuse_record, to_blob

_CHUNK = 4096  # rows at a time, which bounds the memory

Columns = dict[str, Tensor | list[str]]


def export(reader: Reader, path: str | os.PathLike[str], *, parameters: bool = True) -> int:
    """Write a record as a table with a row a step.

    The columns are step, time, norm, clipped_norm, coefficient, bound, stepped, clipped, finite, reason, what was
    logged (loss, lr, ...), and with ``parameters`` ``norm:NAME`` for each parameter. What is not there (no bound, not
    logged) is empty in CSV and NaN in Parquet.

    Args:
        reader: an open record.
        path: ends in ``.csv`` or ``.parquet``.
        parameters: whether to write each parameter's norm.

    Returns:
        The number of rows.

    Raises:
        ValueError: the path ends in something else.
        RecordError: a record is there.
        MissingExtraError: pyarrow is not installed.
    """
    write = {".csv": _write_csv, ".parquet": _write_parquet}.get(Path(path).suffix)
    if write is None:
        raise ValueError(f"export(path={os.fspath(path)!r}): the path must end in .csv or .parquet")
    refuse_record(Path(path), "export to")
    write(Path(path), _chunks(reader, parameters))
    return len(reader)


def _chunks(reader: Reader, parameters: bool) -> Iterator[Columns]:
    scalars, reasons = reader.scalar_names, dict(reader.skips())
    for first in range(0, max(1, len(reader)), _CHUNK):
        last = min(first + _CHUNK, len(reader))

        def rows(name: str, first: int = first, last: int = last) -> Tensor:
            return reader.store.series(name, first, last)

        steps, verdict = rows("step"), rows("verdict")
        columns: Columns = {
            "step": steps,
            "time": rows("time"),
            "norm": rows("total"),
            "clipped_norm": rows("clipped_total"),
            "coefficient": rows("coefficient"),
            "bound": rows("bound"),
            "stepped": (verdict & STEPPED).bool(),
            "clipped": (verdict & CLIPPED).bool(),
            "finite": (verdict & NONFINITE) == 0,
            "reason": [reasons.get(step, "") for step in steps.tolist()],
        }
        columns |= {name: rows(SCALAR_PREFIX + name) for name in scalars}
        if parameters:
            columns |= {
                f"norm:{name}": norms
                for name, norms in zip(reader.names, rows("norms").unbind(1), strict=True)
            }
        yield columns


def _write_csv(path: Path, chunks: Iterator[Columns]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for i, columns in enumerate(chunks):
            if i == 0:
                writer.writerow(columns)
            writer.writerows(zip(*(_cells(values) for values in columns.values()), strict=True))


def _cells(values: Tensor | list[str]) -> Sequence[object]:
    if isinstance(values, list):
        return values
    if values.dtype == torch.bool:
        return values.int().tolist()
    if values.dtype.is_floating_point:
        return ["" if math.isnan(value) else repr(value) for value in values.tolist()]
    return values.tolist()


def _write_parquet(path: Path, chunks: Iterator[Columns]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet", "export to Parquet") from None
    writer = None
    try:
        for columns in chunks:
            table = pa.table({name: _array(pa, values) for name, values in columns.items()})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _array(pa: Any, values: Tensor | list[str]) -> Any:
    """An Arrow array; numbers by their bytes, which needs no numpy."""
    if isinstance(values, list) or values.dtype == torch.bool:
        return pa.array(values if isinstance(values, list) else values.tolist())
    kind = pa.int64() if values.dtype == torch.int64 else pa.float64()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(to_blob(values))])
