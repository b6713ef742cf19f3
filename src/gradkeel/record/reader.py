"""Reads a record, also while training still writes it."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gradkeel.errors import RecordError, check_kind
from gradkeel.guard import SkipReason
from gradkeel.language import count
from gradkeel.norms import combine
from gradkeel.record.described import Rollback, Session
from gradkeel.record.schema import CLIPPED, NONFINITE, SCALAR_PREFIX, STEPPED, rank_path
from gradkeel.record.store import LIVE, SUPERSEDED, Store, before


class Reader:
    """Reads a record file; use it as a context manager.

    Everything is returned as a tensor on the CPU, one row a step. ``start`` and ``stop`` are step numbers, ``stop``
    not included; None means from the first and to the last. ``stride`` takes every so many-th of these rows. Memory
    and time grow with what is asked for, not with the file: `gradkeel.record.downsample` draws a long run from
    per-block summaries.

    Files of other ranks beside it (``Recorder(..., per_rank=True)``) are read with it.

    What of a file is damaged is left out, or stands as not known (NaN), and ``damage`` says so.

    Args:
        path: a file that `Recorder` wrote, or is writing.
        superseded: read the steps that were recorded again later, and so do not count any more, instead of those that
            hold: what each session superseded after what the one before it did, so that steps ascend only within
            those. `before` reads one of them with what led to it.

    Attributes:
        path: the file.
        parameters: what is known of each of the n parameters, in the model's order.
        names: their names.
        sessions: the sessions that wrote its steps, in order.
        rollbacks: the sessions that recorded steps again, in order.
        store: the blocks that it is made of.

    Raises:
        RecordError: there is no such file, it is no record, nothing of it can be read, or a newer version wrote it.

    Example:
        >>> with Reader("run.keel") as run:                                        # doctest: +SKIP
        ...     run.norms(start=400, stop=500)[:, run.names.index("head.weight")]
    """

    def __init__(self, path: str | os.PathLike[str], *, superseded: bool = False) -> None:
        rule = "path must be that of a record, such as 'runs/exp1.keel'"
        check_kind(path, str | os.PathLike, "Reader(path=...)", rule)
        self._read(Path(path), SUPERSEDED if superseded else LIVE)

    def _read(self, path: Path, where: str) -> None:
        self.path = path
        self.store = Store(path, where)
        self._is_in_order = where != SUPERSEDED
        self._stores = _beside(self.store, path) if where == LIVE else [self.store]
        self.parameters = self.store.parameters
        self.names = tuple(parameter.name for parameter in self.parameters)
        self.sessions = self.store.sessions
        self.rollbacks = self.store.rollbacks

    def before(self, rollback: Rollback) -> "Reader":
        """A reader of the record as it was just before a session recorded steps again; close it, too."""
        reader = Reader.__new__(Reader)
        reader._read(self.path, before(rollback.session))
        return reader

    @property
    def damage(self) -> str | None:
        """What could not be read so far, in words; None where nothing is damaged."""
        found = [store.damage for store in self._stores if store.damage]
        return "; ".join(found) or None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        for store in self._stores:
            store.close()

    # ---- for other programs ----------------------------------------------------------------------------------------

    def to_pandas(self, *, long: bool = False, parameters: bool = True) -> Any:
        """The record as a pandas DataFrame, with the columns of `gradkeel.record.export`; pandas must be installed.

        Args:
            long: a row a step and parameter instead of a row a step.
            parameters: whether a wide table has each parameter's columns.
        """
        import pandas as pd

        from gradkeel.record.export import columns

        table = columns(self, parameters=parameters, long=long)
        return pd.DataFrame({k: v if isinstance(v, list) else v.numpy() for k, v in table.items()})

    def to_arrow(self, *, long: bool = False, parameters: bool = True) -> Any:
        """The same as a pyarrow Table, which ``polars.from_arrow`` and DuckDB take.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        from gradkeel.record.export import arrow

        return arrow(self, parameters=parameters, long=long)

    def __repr__(self) -> str:
        policy = f", {self.policy}" if self.sessions else ""
        steps = count(len(self), "{n:,} step", "{n:,} steps")
        parameters = count(len(self.names), "{n:,} parameter", "{n:,} parameters")
        return (
            f"Reader({os.fspath(self.path)!r}: {steps} ({self.first_step} to {self.last_step}), "
            f"{parameters}{policy})"
        )

    def _repr_html_(self) -> str:
        """The same for notebooks, with what was logged."""
        from html import escape

        facts = {
            "steps": f"{len(self):,} ({self.first_step} to {self.last_step})",
            "parameters": f"{len(self.names):,}",
            "policy": self.policy if self.sessions else "",
            "logged": ", ".join(self.scalar_names),
            "damage": self.damage or "",
        }
        rows = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in facts.items() if v)
        return f"<table><caption>{escape(os.fspath(self.path))}</caption>{rows}</table>"

    # ---- what kind of run it is ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of steps in the record."""
        return self.store.rows

    @property
    def first_step(self) -> int:
        """Number of the first step in the record; 0 for an empty one."""
        return self.store.blocks[0].first_step if self.store.blocks else 0

    @property
    def last_step(self) -> int:
        """Number of the last step in the record; 0 for an empty one."""
        return self.store.blocks[-1].last_step if self.store.blocks else 0

    @property
    def session(self) -> Session:
        """The session that wrote last.

        Raises:
            RecordError: nothing has been written yet.
        """
        if not self.sessions:
            raise RecordError(
                f"{self.path} holds no steps yet; a step is on disk about a second after it was made"
            )
        return self.sessions[-1]

    @property
    def policy(self) -> str:
        """Spec of the main policy, as the last session had it."""
        return self.session.policy

    @property
    def norm_type(self) -> float:
        """The p of the main selection's norms."""
        return self.session.norm_type

    @property
    def main(self) -> Tensor:
        """[n] bool: which parameters the main policy looks at."""
        return torch.tensor([p.selection == "main" for p in self.parameters], dtype=torch.bool, device="cpu")

    @property
    def scalar_names(self) -> list[str]:
        """What was logged beside the norms, such as ``loss`` and ``lr``."""
        return self.store.scalar_names()

    # ---- one number a step ---------------------------------------------------------------------------------------

    def steps(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] int64 numbers of the steps; they ascend, and may have gaps."""
        return self.series("step", start, stop, stride)

    def totals(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] norm of the main selection's true gradients, before clipping."""
        return self.series("total", start, stop, stride)

    def clipped_totals(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] norm of the main selection's gradients after clipping."""
        return self.series("clipped_total", start, stop, stride)

    def coefficients(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] what clipping multiplied the gradients by; the smallest one where parameters have their own."""
        return self.series("coefficient", start, stop, stride)

    def bounds(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] bound in force, the smallest one where there are several; inf: none yet; NaN: a policy without one."""
        return self.series("bound", start, stop, stride)

    def stepped(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] bool: whether the optimizer made its step; False where it was skipped."""
        return (self.series("verdict", start, stop, stride) & STEPPED).bool()

    def clipped(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] bool: whether the main policy made any gradient smaller."""
        return (self.series("verdict", start, stop, stride) & CLIPPED).bool()

    def nonfinite(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] bool: whether any gradient was not finite, excluded parameters included."""
        return (self.series("verdict", start, stop, stride) & NONFINITE).bool()

    def scalar(self, name: str, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] what ``guard.log(name=...)`` was told; NaN at steps where it was told nothing."""
        return self.series(SCALAR_PREFIX + name, start, stop, stride)

    def losses(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k] the loss, where it was logged; else NaN."""
        return self.scalar("loss", start, stop, stride)

    # ---- one number a parameter and step ---------------------------------------------------------------------------

    def norms(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k, n] float64 norm of each parameter's true gradient, before clipping; 0 where it had none."""
        return self.series("norms", start, stop, stride)

    def parameter_coefficients(
        self, start: int | None = None, stop: int | None = None, stride: int = 1
    ) -> Tensor:
        """[k, n] what each parameter's gradient was multiplied by."""
        given = self.series("coefficients", start, stop, stride)
        return completed(given, self.coefficients(start, stop, stride), self.main)

    def present(self, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k, n] bool: whether a parameter had a gradient."""
        return self.series("present", start, stop, stride).bool()

    # ---- now and then ----------------------------------------------------------------------------------------------

    def weight_samples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Steps [s], norms of the parameters before that step's update [s, n], and norms of the update [s, n].

        NaN stands for what was not measured. Where each rank wrote a file, what their pieces come to; empty if one of
        the files is missing.
        """
        if len(self._stores) < self.store.ranks and not self.store.rank:
            empty = torch.empty(0, len(self.names), dtype=torch.float64, device="cpu")
            return torch.empty(0, dtype=torch.int64, device="cpu"), empty, empty
        return _merged_samples(self._stores)

    def by_rank(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """[k, ranks] a series of one number a step (``time``, ``scalar:loss``) as each rank recorded it.

        One column where only rank 0 wrote, or a rank's file is missing; NaN at steps that a rank has not written.
        """
        steps = self.steps(start, stop)
        result = torch.full((len(steps), len(self._stores)), math.nan, dtype=torch.float64, device="cpu")
        for column, store in enumerate(self._stores):
            found = torch.isin(steps, store.steps)
            values = store.series(name, 0, store.rows).to(torch.float64)
            result[found, column] = values[torch.searchsorted(store.steps, steps[found])]
        return result

    def skips(self) -> list[tuple[int, str]]:
        """Number and reason of each step that was skipped."""
        return [(step, words) for step, words, _ in self.store.skips()]

    def skip_reasons(self) -> dict[int, SkipReason]:
        """Reason of each step that was skipped, by its number."""
        return {step: reason for step, _, reason in self.store.skips()}

    def series(self, name: str, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k, ...] any series by its name in the file (``scalar:loss``); see docs/record.md."""
        if stride < 1:
            raise ValueError(f"stride={stride}: it must be 1 or more")
        if not self._is_in_order:
            steps = self.store.steps
            chosen = torch.ones(len(steps), dtype=torch.bool, device="cpu")
            chosen &= True if start is None else steps >= start
            chosen &= True if stop is None else steps < stop
            return self.store.series(name, 0, len(steps))[chosen][::stride]
        first, last = self.store.row_range(start, stop)
        return self.store.series(name, first, last, stride)


def completed(given: Tensor, common: Tensor, main: Tensor) -> Tensor:
    """[k, n] the series ``coefficients`` [k, n], what was left out of it filled in from ``coefficient`` [k]."""
    return torch.where(given.isnan(), torch.where(main, common.unsqueeze(1), 1.0), given)


def _beside(store: Store, path: Path) -> list[Store]:
    """The open files of all ranks, in their order; this one alone where others are missing or there are none."""
    if store.rank or store.ranks == 1:
        return [store]
    stores = [store]
    try:
        stores += [Store(rank_path(path, rank)) for rank in range(1, store.ranks)]
    except RecordError:  # lost, or nothing written yet
        for other in stores[1:]:
            other.close()
        return [store]
    return stores


def _merged_samples(stores: Sequence[Store]) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [s], norms of the whole parameters [s, n] and of their updates [s, n], from each rank's pieces.

    Copies of a piece count once. Steps of which a rank has no sample, or which were recorded by ranks that had other
    pieces, are left out.
    """
    samples = [store.weight_samples() for store in stores]
    first, *others = [own for own, _, _ in samples]
    are_known = first >= max(store.pieces_since for store in stores)
    for own in others:
        are_known &= torch.isin(first, own)
    steps = first[are_known]
    # Of one file alone a step may have several, where they are superseded.
    rows = [are_known, *(torch.searchsorted(own, steps) for own in others)]
    parts: dict[str, dict[tuple[int, ...], Tensor]] = {p.name: {} for p in stores[0].parameters}
    for store, (_, weights, updates), own in zip(stores, samples, rows, strict=True):
        both = torch.stack([weights, updates])[:, own]
        for column, parameter in enumerate(store.parameters):
            key = store.piece(parameter.name)
            if key is not None and parameter.name in parts:
                parts[parameter.name].setdefault(key, both[:, :, column])
    unknown = torch.full((2, len(steps)), math.nan, dtype=torch.float64, device="cpu")
    columns = [
        combine(torch.stack([*own.values()], dim=2), 2.0) if own else unknown for own in parts.values()
    ]
    weights, updates = torch.stack([*columns, unknown], dim=2)[:, :, : len(columns)]
    return steps, weights, updates
