"""Steps on their way from the device to whoever writes them down: kept as they are, stacked later, many at once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradkeel.guard.report import SelectionReport, SkipReason, StepReport, nonfinite_words
from gradkeel.kernels.arrival import Arrival, to_host
from gradkeel.norms import combine
from gradkeel.outcome import Outcome
from gradkeel.policies.states import from_list
from gradkeel.record.lag import SERIES, Lag
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
    """Norms of the parameters before a step's update, and of the update: [n] each, by the names' order.

    And what the lag of Adam's second moment follows from, where that is known.
    """

    names: tuple[str, ...]
    weights: Tensor
    updates: Tensor
    lag: Lag | None = None

    def on_host(self) -> "Sample":
        """A copy on the CPU, to be read when it has arrived."""
        lag = None if self.lag is None else self.lag.on_host()
        return Sample(self.names, to_host(self.weights), to_host(self.updates), lag)


@dataclass(slots=True, eq=False)
class Columns:
    """What one selection's steps have measured and decided, an entry a step; what is not known is None."""

    present: list[tuple[bool, ...]] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    weights: list[Tensor | None] = field(default_factory=list)
    peaks: list[Tensor | None] = field(default_factory=list)
    coefficients: list[Tensor | float | Outcome | None] = field(default_factory=list)

    def add(self, selection: SelectionReport) -> None:
        """Take a step's."""
        measured, decision, present = selection.measured, selection.decision, selection.present
        if self.present and present == self.present[-1]:
            present = self.present[-1]  # one object for all of them
        self.present.append(present)
        self.norms.append(measured.norms)
        self.weights.append(measured.weights)
        self.peaks.append(measured.peaks)
        known = decision.known_coefficients
        self.coefficients.append(known if decision.unit_coefficients is None else selection.outcome)

    def stacked_coefficients(self) -> Tensor:
        """[k, n] of all steps."""
        values = [own.coefficients() if isinstance(own, Outcome) else own for own in self.coefficients]
        return _coefficients(values, self.norms[0])

    def stacked(self, name: str, unknown: Tensor, shape: Sequence[int]) -> Tensor:
        """[k, n, ...] of the column of this name; ``unknown`` where it was not measured."""
        values = zip(getattr(self, name), self.norms, strict=True)
        return torch.stack(
            [(unknown if v is None else v).expand(*norms.shape, *shape) for v, norms in values]
        )


class Kept:
    """Steps of one layout as the training thread leaves them: in columns, and nothing computed that can wait.

    Only numbers and tensors are kept: whatever else is alive for long is what the interpreter's garbage collection
    goes through again and again, with all else that the process has.
    """

    def __init__(self, first: StepReport) -> None:
        self.selections = first.selections
        self.columns = [Columns() for _ in self.selections]
        self.steps: list[int] = []
        self.times: list[float] = []
        self.totals: list[Tensor | float] = []
        self.bounds: list[Tensor | float] = []
        self.stepped: list[bool | Tensor] = []
        self.scalars: dict[str, list[Tensor | float]] = {}
        self.samples: list[tuple[int, Sample]] = []
        # By place: of steps that do more than multiply each parameter by a factor, also the norm that was measured.
        self.outcomes: dict[int, tuple[Outcome, Tensor | None]] = {}
        self.maybe_skipped: dict[int, StepReport] = {}

    def __len__(self) -> int:
        """How many steps they are."""
        return len(self.steps)

    def add(
        self, report: StepReport, time: float, scalars: dict[str, Tensor | float], sample: Sample | None
    ) -> None:
        """Take a step, and at once what reads its gradients, and tensors that are the user's."""
        selections, place = report.selections, len(self.steps)
        main = selections[0]
        decision, norms, bound = main.decision, main.measured.norms, _bound(main)
        numbers = {name: v if type(v) is float else _own(v, norms) for name, v in scalars.items()}
        if decision.clamp is not None or decision.unit_coefficients is not None:
            total = None if decision.clamp is None else main.clipped_total()
            self.outcomes[place] = main.outcome, total
        # From here on nothing fails, which would leave a part of the step.
        for columns, selection in zip(self.columns, selections, strict=True):
            columns.add(selection)
        self.steps.append(report.step)
        self.times.append(time)
        self.totals.append(main.measured.known_total)
        self.bounds.append(bound)
        self.stepped.append(report.stepped_or_pending)
        if report.stepped_or_pending is not True:
            self.maybe_skipped[place] = report
        for name, number in numbers.items():
            column = self.scalars.get(name)
            if column is None:
                column = self.scalars[name] = []
            column += [math.nan] * (place - len(column))  # where it was not logged
            column.append(number)
        if sample is not None:
            self.samples.append((report.step, sample))

    def stacked(self) -> dict[str, Tensor]:
        """The steps' tensors where they are, stacked: [k] and [k, n]."""
        unknown = self.columns[0].norms[0].new_full((), math.nan)
        series = {
            "total": _scalars(self.totals, unknown),
            "bound": _scalars(self.bounds, unknown),
            "stepped": _scalars([_number(flag) for flag in self.stepped], unknown),
            "norms": torch.cat([torch.stack(own.norms) for own in self.columns], dim=1),
            "coefficients": torch.cat([own.stacked_coefficients() for own in self.columns], dim=1),
        }
        for name in ("weights", "peaks"):
            own = [column for columns in self.columns for column in getattr(columns, name)]
            known = next((value for value in own if value is not None), None)
            if known is not None:
                shape = known.shape[1:]
                series[name] = torch.cat(
                    [columns.stacked(name, unknown, shape) for columns in self.columns], dim=1
                )
        if self.outcomes:
            outcomes = self.outcomes.values()
            totals = [own.total() if own.decision.clamp is None else measured for own, measured in outcomes]
            series["outcome_total"] = torch.stack([unknown if total is None else total for total in totals])
            series["outcome_clipped"] = torch.stack([own.is_clipped() for own, _ in outcomes]).to(
                unknown.dtype
            )
        for name, values in self.scalars.items():
            series[SCALAR_PREFIX + name] = _scalars(values + [math.nan] * (len(self) - len(values)), unknown)
        return series


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

    def __init__(self, kept: Kept, subject: Subject) -> None:
        self._kept, self._subject = kept, subject
        norms = kept.columns[0].norms[0]
        self._series: dict[str, Tensor] | None = None
        if not norms.is_cpu:
            self._series = {name: to_host(value) for name, value in kept.stacked().items()}
        self._samples = [(step, sample.on_host()) for step, sample in kept.samples]
        self._arrival = Arrival(norms.device)

    def __len__(self) -> int:
        """How many steps they are."""
        return len(self._kept)

    def rows(self) -> Rows:
        """The steps on the host; waits for the copy, so call it off the training thread."""
        self._arrival.wait()
        kept = self._kept
        stacked = kept.stacked() if self._series is None else self._series
        series = {name: value.to(torch.float64) for name, value in stacked.items()}
        _derive(series, kept)
        series["step"] = from_list(kept.steps, torch.int64)
        series["time"] = from_list(kept.times)
        series["present"] = torch.cat([_present(columns.present) for columns in kept.columns], dim=1)
        self._add_lags(series)
        stepped = (series["verdict"] & STEPPED).tolist()
        return Rows(
            subject=self._subject,
            selections=kept.selections,
            steps=kept.steps,
            series=series,
            skips=[_skip(one, series["norms"][i]) for i, one in kept.maybe_skipped.items() if not stepped[i]],
            samples=self._samples,
        )

    def _add_lags(self, series: dict[str, Tensor]) -> None:
        lags = {step: sample.lag.value() for step, sample in self._samples if sample.lag is not None}
        if lags:
            name = SCALAR_PREFIX + SERIES
            logged = series[name].tolist() if name in series else [math.nan] * len(self)
            series[name] = from_list(
                [lags.get(step, own) for step, own in zip(self._kept.steps, logged, strict=True)]
            )


def _bound(selection: SelectionReport) -> Tensor | float:
    known = selection.decision.known_bound
    if isinstance(known, float):
        return known
    bound = selection.outcome.bound()
    return math.nan if bound is None else bound


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


def _derive(series: dict[str, Tensor], kept: Kept) -> None:
    """Fill in what follows from norms and coefficients; on the host."""
    main = kept.selections[0].measured
    columns = len(main.names)
    norms, own = series["norms"], series["coefficients"][:, :columns]
    smallest = largest = torch.ones(len(own), dtype=torch.float64)
    if columns:
        smallest, largest = own.aminmax(dim=1)
    clipped = (own < 1).any(dim=1)  # also beside a coefficient that is NaN, as the smallest then is
    after = (
        series["total"] * smallest
        if smallest.equal(largest)
        else torch.stack([combine(row, main.norm_type) for row in norms[:, :columns] * own])
    )
    if kept.outcomes:
        places = list(kept.outcomes)
        after[places] = series.pop("outcome_total")
        clipped[places] |= series.pop("outcome_clipped") == 1.0
    series["clipped_total"], series["coefficient"] = after, smallest
    is_finite = torch.isfinite(norms).all(dim=1)
    verdict = series.pop("stepped") * STEPPED + clipped * CLIPPED + ~is_finite * NONFINITE
    series["verdict"] = verdict.to(torch.uint8)


def _present(rows: Sequence[tuple[bool, ...]]) -> Tensor:
    """[k, n] from the flags of each step; they are nearly always the same at all."""
    is_same = rows.count(rows[0]) == len(rows)
    return torch.tensor(rows[:1] if is_same else rows, dtype=torch.uint8).expand(len(rows), -1)


def _skip(report: StepReport, norms: Tensor) -> tuple[int, SkipReason, str]:
    """A skipped step's number, reason and words, from norms that are on the host already."""
    place = nonfinite_words(report.step, report.selections, norms.tolist())
    why = report.why or (SkipReason.POLICY if place is None else SkipReason.NONFINITE)
    return report.step, why, why.words(report.step, place)
