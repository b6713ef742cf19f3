"""A record as a table that other programs read: CSV, or Parquet with the extra ``parquet``."""

import csv
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import import_extra
from gradkeel.record.reader import Reader, completed
from gradkeel.record.schema import CLIPPED, NONFINITE, SCALAR_PREFIX, STEPPED, refuse_record, to_blob

_CHUNK = 4096  # rows at a time, which bounds the memory

Columns = dict[str, Tensor | list[str]]


def export(
    reader: Reader, path: str | os.PathLike[str], *, parameters: bool = True, long: bool = False
) -> int:
    """Write a record as a table.

    Wide, it has a row a step, whose columns are step, time, norm, clipped_norm, coefficient, bound, stepped, clipped,
    finite, reason, what was logged (loss, lr, ...), and with ``parameters`` ``norm:NAME``, ``coefficient:NAME``,
    ``weight_norm:NAME`` and ``update_ratio:NAME`` for each parameter. Long, it has a row a step and parameter, whose
    columns are step, what was logged, parameter, norm, coefficient, weight_norm and update_ratio, the update's norm
    over the weights'. What is not there (no bound, not logged, weights not measured at that step) is empty in CSV and
    NaN in Parquet.

    Args:
        reader: an open record.
        path: ends in ``.csv`` or ``.parquet``.
        parameters: whether a wide table has each parameter's columns.
        long: a row for each parameter instead.

    Returns:
        The number of steps.

    Raises:
        ValueError: the path ends in something else.
        RecordError: a record is there.
        MissingExtraError: pyarrow is not installed.
    """
    write = {".csv": _write_csv, ".parquet": _write_parquet}.get(Path(path).suffix)
    if write is None:
        raise ValueError(f"export(path={os.fspath(path)!r}): the path must end in .csv or .parquet")
    refuse_record(Path(path), "export to")
    write(Path(path), _chunks(reader, parameters, long))
    return len(reader)


def columns(reader: Reader, *, parameters: bool, long: bool) -> Columns:
    """The table that `export` writes, in memory."""
    return next(_chunks(reader, parameters, long, max(1, len(reader))))


def arrow(reader: Reader, *, parameters: bool, long: bool) -> Any:
    """The same as an Arrow table."""
    pa = import_extra("pyarrow", "parquet", "to_arrow()")
    return pa.table(
        {name: _array(pa, v) for name, v in columns(reader, parameters=parameters, long=long).items()}
    )


def _chunks(reader: Reader, parameters: bool, long: bool, size: int = _CHUNK) -> Iterator[Columns]:
    """The table, ``size`` steps at a time; without rows where there are no steps."""
    scalars, reasons = reader.scalar_names, dict(reader.skips())
    samples = reader.weight_samples() if parameters or long else None
    for first in range(0, max(1, len(reader)), size):
        last = min(first + size, len(reader))

        def rows(name: str, first: int = first, last: int = last) -> Tensor:
            return reader.store.series(name, first, last)

        steps, verdict = rows("step"), rows("verdict")
        logged = {name: rows(SCALAR_PREFIX + name) for name in scalars}
        own: dict[str, Tensor] = {}
        if samples is not None:
            weights, ratios = _measured(steps, samples)
            own = {
                "norm": rows("norms"),
                "coefficient": completed(rows("coefficients"), rows("coefficient"), reader.main),
                "weight_norm": weights,
                "update_ratio": ratios,
            }
        if long:
            n = len(reader.names)
            yield {
                "step": steps.repeat_interleave(n),
                **{name: values.repeat_interleave(n) for name, values in logged.items()},
                "parameter": list(reader.names) * len(steps),
                **{name: values.flatten() for name, values in own.items()},
            }
            continue
        yield {
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
            **logged,
            **{
                f"{kind}:{name}": column.contiguous()
                for kind, values in own.items()
                for name, column in zip(reader.names, values.unbind(1), strict=True)
            },
        }


def _measured(steps: Tensor, samples: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[k, n] weights' norms, and updates' norms over them, at the steps where they were measured; NaN elsewhere."""
    at, weights, updates = samples
    both = weights.new_full((2, len(steps), weights.shape[1]), math.nan)
    if len(at) and bool((at.diff() > 0).all()):
        place = torch.searchsorted(at, steps).clamp(max=len(at) - 1)
        there = at[place] == steps
        both[0, there], both[1, there] = weights[place[there]], (updates / weights)[place[there]]
    return both[0], both[1]


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
    pa = import_extra("pyarrow", "parquet", "export to Parquet")
    pq = import_extra("pyarrow.parquet", "parquet", "export to Parquet")
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
