"""Reads a record, also while training still writes it."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gradkeel.errors import RecordError
from gradkeel.guard import SkipReason
from gradkeel.record.described import Session
from gradkeel.record.ranks import beside, by_rank, merged_samples
from gradkeel.record.schema import CLIPPED, NONFINITE, SCALAR_PREFIX, STEPPED
from gradkeel.record.store import Store


class Reader:
    """Reads a record file; use it as a context manager.

    Everything is returned as a tensor on the CPU, one row a step. ``start`` and ``stop`` are step numbers, ``stop``
    not included; None means from the first and to the last. ``stride`` takes every so many-th of these rows. Memory
    and time grow with what is asked for, not with the file: `gradkeel.record.downsample` draws a long run from
    per-block summaries.

    Files of other ranks beside it (``Recorder(..., per_rank=True)``) are read with it.

    Args:
        path: a file that `Recorder` wrote, or is writing.

    Attributes:
        path: the file.
        parameters: what is known of each of the n parameters, in the model's order.
        names: their names.
        sessions: the processes that wrote to it, in order.
        store: the blocks that it is made of.

    Raises:
        RecordError: there is no such file, it is no record, or a newer version wrote it.

    Example:
        >>> with Reader("run.keel") as run:                                        # doctest: +SKIP
        ...     run.norms(start=400, stop=500)[:, run.names.index("head.weight")]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.store = Store(self.path)
        self._stores = beside(self.store, self.path)
        self.parameters = self.store.parameters
        self.names = tuple(parameter.name for parameter in self.parameters)
        self.sessions = self.store.sessions

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        for store in self._stores:
            store.close()

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
        return torch.tensor([p.selection == "main" for p in self.parameters], dtype=torch.bool)

    @property
    def scalar_names(self) -> list[str]:
        """What was logged beside the norms, such as ``loss`` and ``lr``."""
        rows = self.store.query(
            "SELECT DISTINCT name FROM series WHERE name >= ? AND name < ? ORDER BY name",
            SCALAR_PREFIX,
            "scalar;",
        )
        return [name.removeprefix(SCALAR_PREFIX) for (name,) in rows]

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
        result = self.series("coefficients", start, stop, stride)
        common = torch.where(self.main, self.coefficients(start, stop, stride).unsqueeze(1), 1.0)
        return torch.where(torch.isnan(result), common, result)

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
            empty = torch.empty(0, len(self.names), dtype=torch.float64)
            return torch.empty(0, dtype=torch.int64), empty, empty
        return merged_samples(self._stores)

    def by_rank(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """[k, ranks] a series of one number a step (``time``, ``scalar:loss``) as each rank recorded it.

        One column where only rank 0 wrote, or a rank's file is missing; NaN at steps that a rank has not written.
        """
        return by_rank(self._stores, name, self.steps(start, stop))

    def skips(self) -> list[tuple[int, str]]:
        """Number and reason of each step that was skipped."""
        return [
            (step, reason)
            for step, reason in self.store.query("SELECT step, reason FROM skips ORDER BY step")
        ]

    def skip_reasons(self) -> dict[int, SkipReason]:
        """Reason of each step that was skipped, by its number."""
        columns = {column[1] for column in self.store.query("PRAGMA table_info(skips)")}
        if "kind" not in columns:
            return {step: SkipReason.of_words(words) for step, words in self.skips()}
        rows = self.store.query("SELECT step, reason, kind FROM skips ORDER BY step")
        return {step: SkipReason(kind) if kind else SkipReason.of_words(words) for step, words, kind in rows}

    def series(self, name: str, start: int | None = None, stop: int | None = None, stride: int = 1) -> Tensor:
        """[k, ...] any series by its name in the file (``scalar:loss``); see docs/record.md."""
        if stride < 1:
            raise ValueError(f"stride={stride}: it must be 1 or more")
        first, last = self.store.row_range(start, stop)
        return self.store.series(name, first, last, stride)
