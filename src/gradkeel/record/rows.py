"""Steps on their way from the device to whoever writes them down: kept as they are, stacked later, many at once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from gradkeel.guard.report import SelectionReport, SkipReason, StepReport, nonfinite_words
from gradkeel.kernels.arrival import Arrival, to_host
from gradkeel.norms import combine
from gradkeel.policies.states import from_list
from gradkeel.record.schema import CLIPPED, NONFINITE, SCALAR_PREFIX, STEPPED


@dataclass(frozen=True, slots=True)
class Subject:
    """What is recorded.

    Attributes:
        names: the parameters, in the order in which they are to be shown.
        shapes: their shapes, by name.
        policy: spec of the main policy.
        optimizer: name of the optimizer's class.
        nonfinite: what the guard does with non-finite gradients.
        rank: who records.
        ranks: how many do, each into a file of its own.
        pieces: which piece of each parameter this rank holds; None where it holds whole ones.
    """

    names: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    policy: str = ""
    optimizer: str = ""
    nonfinite: str = ""
    rank: int = 0
    ranks: int = 1
    pieces: dict[str, tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Norms of the parameters before a step's update, and of the update: [n] each, by the names' order."""

    names: tuple[str, ...]
    weights: Tensor
    updates: Tensor

    def on_host(self) -> "Sample":
        """A copy on the CPU, to be read when it has arrived."""
        return Sample(self.names, to_host(self.weights), to_host(self.updates))


@dataclass(slots=True, eq=False)
class Kept:
    """One step as the training thread leaves it: references to tensors, and nothing computed that can wait.

    ``clipped_total`` is filled only where it is measured, of gradients that are there now.
    """

    report: StepReport
    time: float
    scalars: dict[str, Tensor | float]
    clipped_total: Tensor | None
    sample: Sample | None

    @classmethod
    def of(
        cls, report: StepReport, time: float, scalars: dict[str, Tensor | float], sample: Sample | None
    ) -> "Kept":
        """Take from a report what must be taken at once: what reads gradients, and tensors that are the user's."""
        main = report.selections[0]
        for name, value in scalars.items():
            if type(value) is not float:
                scalars[name] = _own(value, main.measured.norms)
        total = None if main.decision.clamp is None else main.clipped_total()
        return cls(report, time, scalars, total, sample)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Consecutive steps on the host.

    Attributes:
        subject: the run that they are from.
        selections: the first step's, for names, labels and policies; every step here has the same.
        steps: their numbers, ascending.
        series: by the names in ``schema.SERIES`` (and ``scalar:...``), one row a step; columns are the selections'
            parameters, one selection after the other.
        skips: number, reason and words of the skipped ones.
        samples: number and sample of those whose weights were measured.
    """

    subject: Subject
    selections: tuple[SelectionReport, ...]
    steps: list[int]
    series: dict[str, Tensor]
    skips: list[tuple[int, SkipReason, str]]
    samples: list[tuple[int, Sample]]

    @property
    def names(self) -> list[str]:
        """The parameters' names, by column."""
        return [name for selection in self.selections for name in selection.measured.names]

    def numbers(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Number of each step, and what trackers show of it; without what is NaN, such as a bound that is not there."""
        shown = {
            "norm": "total",
            "clipped_norm": "clipped_total",
            "coefficient": "coefficient",
            "bound": "bound",
        }
        columns = {name: self.series[series].tolist() for name, series in shown.items()}
        for name, values in self.series.items():
            if name.startswith(SCALAR_PREFIX):
                columns[name.removeprefix(SCALAR_PREFIX)] = values.tolist()
        for bit, name in ((CLIPPED, "clipped"), (STEPPED, "stepped")):
            columns[name] = (self.series["verdict"] & bit).bool().double().tolist()
        for i, step in enumerate(self.steps):
            yield step, {name: column[i] for name, column in columns.items() if not math.isnan(column[i])}


def _own(value: Tensor | float, like: Tensor) -> Tensor | float:
    """A number that nobody else writes to or differentiates; where it is on an accelerator, as ``like`` is."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1:
        return math.nan  # not a number of the step; a recorder must not raise
    value = value.detach().reshape(())
    if value.device.type == "cpu":
        return float(value)
    return value.to(like.device, like.dtype, copy=True)


def same_layout(one: StepReport, other: StepReport) -> bool:
    """Whether two steps can stand in one batch: the same parameters under the same policies."""
    first, second = one.selections, other.selections
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        names, others = a.measured.names, b.measured.names
        # The same object, as it is from step to step, is not looked at name by name.
        if (names is not others and names != others) or a.policy != b.policy or a.label != b.label:
            return False
    return True


class Batch:
    """Kept steps of one layout, stacked on their device and copied to the host without waiting for it.

    What is on the host already is stacked by the writing thread.
    """

    def __init__(self, kept: Sequence[Kept], subject: Subject) -> None:
        self._kept, self._subject = kept, subject
        norms = kept[0].report.selections[0].measured.norms
        self._series: dict[str, Tensor] | None = None
        if not norms.is_cpu:
            self._series = {name: to_host(value) for name, value in _stack(kept).items()}
        self._samples = [(row.report.step, row.sample.on_host()) for row in kept if row.sample is not None]
        self._arrival = Arrival(norms.device)

    def __len__(self) -> int:
        """How many steps they are."""
        return len(self._kept)

    def rows(self) -> Rows:
        """The steps on the host; waits for the copy, so call it off the training thread."""
        self._arrival.wait()
        reports = [kept.report for kept in self._kept]
        selections = [report.selections for report in reports]
        stacked = _stack(self._kept) if self._series is None else self._series
        series = {name: value.to(torch.float64) for name, value in stacked.items()}
        _derive(series, selections[0][0])
        steps = [report.step for report in reports]
        series["step"] = from_list(steps, torch.int64)
        series["time"] = from_list([kept.time for kept in self._kept])
        series["present"] = _present([tuple(s.present for s in row) for row in selections])
        skipped = (series["verdict"] & STEPPED == 0).nonzero().flatten().tolist()
        return Rows(
            subject=self._subject,
            selections=selections[0],
            steps=steps,
            series=series,
            skips=[_skip(reports[i], series["norms"][i]) for i in skipped],
            samples=self._samples,
        )


def _stack(kept: Sequence[Kept]) -> dict[str, Tensor]:
    """The steps' device tensors, stacked: [k] and [k, n]."""
    columns = list(zip(*[row.report.selections for row in kept], strict=True))
    main = columns[0]
    unknown = main[0].measured.norms.new_full((), math.nan)
    series = {
        "total": _scalars([s.measured.known_total for s in main], unknown),
        "bound": _scalars([_bound(s) for s in main], unknown),
        "stepped": _scalars([_number(row.report.stepped_or_pending) for row in kept], unknown),
    }
    parts = [[s.measured for s in column] for column in columns]
    series["norms"] = torch.cat([torch.stack([m.norms for m in part]) for part in parts], dim=1)
    series["coefficients"] = torch.cat(
        [_coefficients([_coefficient(s) for s in column], column[0].measured.norms) for column in columns],
        dim=1,
    )
    if any(m.weights is not None for part in parts for m in part):
        series["weights"] = torch.cat(
            [torch.stack([_or(m.weights, unknown).expand_as(m.norms) for m in part]) for part in parts], dim=1
        )
    if any(m.peaks is not None for part in parts for m in part):
        series["peaks"] = torch.cat(
            [torch.stack([_or(m.peaks, unknown).expand(*m.norms.shape, 2) for m in part]) for part in parts],
            dim=1,
        )
    # A policy may change its form within a batch, as `Warmup` does.
    if any(s.decision.clamp is not None or s.decision.unit_coefficients is not None for s in main):
        totals = [
            s.clipped_total() if s.decision.clamp is None else row.clipped_total
            for row, s in zip(kept, main, strict=True)
        ]
        if any(total is not None for total in totals):
            series["clipped_total"] = torch.stack([_or(total, unknown) for total in totals])
    if any(s.decision.clamp is not None for s in main):
        never = torch.zeros_like(unknown)
        series["clipped"] = torch.stack(
            [never if s.decision.clamp is None else s.outcome.is_clipped().to(never.dtype) for s in main]
        )
    for name in dict.fromkeys(name for row in kept for name in row.scalars):
        values = [row.scalars.get(name, math.nan) for row in kept]
        series[SCALAR_PREFIX + name] = _scalars(values, unknown)
    return series


def _coefficient(selection: SelectionReport) -> Tensor | float | None:
    decision = selection.decision
    if decision.unit_coefficients is None:
        return decision.known_coefficients
    return selection.outcome.coefficients()


def _bound(selection: SelectionReport) -> Tensor | float:
    known = selection.decision.known_bound
    if isinstance(known, float):
        return known
    bound = selection.outcome.bound()
    return math.nan if bound is None else bound


def _or(value: Tensor | None, other: Tensor) -> Tensor:
    return other if value is None else value


def _number(flag: bool | Tensor) -> Tensor | float:
    return flag if isinstance(flag, Tensor) else float(flag)


def _scalars(values: Sequence[Tensor | float], like: Tensor) -> Tensor:
    if like.is_cpu:
        return from_list(list(values))
    # Filled on the device: a number that travelled there would make the host wait.
    number = like.new_empty(())
    return torch.stack(
        [v.to(like.dtype) if isinstance(v, Tensor) else torch.full_like(number, v) for v in values]
    )


def _coefficients(values: Sequence[Tensor | float | None], norms: Tensor) -> Tensor:
    """[k, n] from one coefficient a step, or one a parameter and step; None is 1."""
    filled = [1.0 if value is None else value for value in values]
    if any(isinstance(value, Tensor) and value.dim() for value in filled):
        return torch.stack(
            [v.expand_as(norms) if isinstance(v, Tensor) else torch.full_like(norms, v) for v in filled]
        )
    return _scalars(filled, norms).unsqueeze(1).expand(-1, norms.numel())


def _derive(series: dict[str, Tensor], main: SelectionReport) -> None:
    """Fill in what follows from norms and coefficients; on the host."""
    columns = len(main.measured.names)
    norms, own = series["norms"], series["coefficients"][:, :columns]
    smallest = largest = torch.ones(len(own), dtype=torch.float64)
    if columns:
        smallest, largest = own.aminmax(dim=1)
    if "clipped_total" not in series:
        series["clipped_total"] = (
            series["total"] * smallest
            if smallest.equal(largest)
            else torch.stack([combine(row, main.measured.norm_type) for row in norms[:, :columns] * own])
        )
    series["coefficient"] = smallest
    clipped = (own < 1).any(dim=1)  # also beside a coefficient that is NaN, as the smallest then is
    if "clipped" in series:
        clipped = clipped | (series.pop("clipped") == 1.0)
    is_finite = torch.isfinite(norms).all(dim=1)
    verdict = series.pop("stepped") * STEPPED + clipped * CLIPPED + ~is_finite * NONFINITE
    series["verdict"] = verdict.to(torch.uint8)


def _present(rows: Sequence[tuple[tuple[bool, ...], ...]]) -> Tensor:
    """[k, n] from each selection's flags at each step; they are nearly always the same at all."""
    is_same = rows.count(rows[0]) == len(rows)
    flags = [[*chain.from_iterable(row)] for row in (rows[:1] if is_same else rows)]
    return torch.tensor(flags, dtype=torch.uint8).expand(len(rows), -1)


def _skip(report: StepReport, norms: Tensor) -> tuple[int, SkipReason, str]:
    """A skipped step's number, reason and words, from norms that are on the host already."""
    place = nonfinite_words(report.step, report.selections, norms.tolist())
    why = report.why or (SkipReason.POLICY if place is None else SkipReason.NONFINITE)
    return report.step, why, why.words(report.step, place)
