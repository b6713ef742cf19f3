"""Steps on their way from the device to whoever writes them down: kept as they are, stacked later, many at once."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradkeel.guard.report import SelectionReport, SkipReason, StepReport, nonfinite_words
from gradkeel.kernels.arrival import Arrival, to_host
from gradkeel.norms import combine, from_list
from gradkeel.outcome import Outcome
from gradkeel.record.lag import SERIES, Lag
from gradkeel.record.schema import CLIPPED, NONFINITE, SCALAR_PREFIX, STEPPED, from_blobs, to_blob


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


def _taken(selection: SelectionReport) -> tuple[Any, ...]:
    """A step's norms, coefficients, norms of weights, peaks, and which parameters have a gradient."""
    measured, decision = selection.measured, selection.decision
    factors: Any = decision.known_coefficients if decision.unit_coefficients is None else selection.outcome
    if type(factors) is list:
        factors = tuple(factors)
    return measured.known_norms, factors, measured.weights, measured.peaks, selection.present


class Columns:
    """What one selection's steps have measured and decided.

    Args:
        like: [n] norms of one of its steps.
        steps: of each of them what was taken of the selection.
    """

    def __init__(self, like: Tensor, steps: Sequence[tuple[Any, ...]]) -> None:
        self._like, self._steps = like, steps

    def norms(self) -> Tensor:
        """[k, n] of all steps."""
        norms = [step[0] for step in self._steps]
        if bytearray in set(map(type, norms)):  # the host's, whose tensors are made where somebody looks
            blobs = [own if type(own) is bytearray else to_blob(own.to(torch.float64)) for own in norms]
            return from_blobs(blobs, torch.float64).reshape(len(norms), self._like.numel())
        return torch.stack(norms)

    def coefficients(self) -> Tensor:
        """[k, n] of all steps."""
        values = [step[1] for step in self._steps]
        if Outcome in set(map(type, values)):
            values = [own.coefficients() if isinstance(own, Outcome) else own for own in values]
        return _coefficients(values, self._like)

    def known(self, place: int) -> list[Tensor | None]:
        """Of each step the norms of weights (2) or the peaks (3), where they were measured."""
        return [step[place] for step in self._steps]

    def stacked(self, known: Sequence[Tensor | None], unknown: Tensor, shape: Sequence[int]) -> Tensor:
        """[k, n, ...] of what is known of some steps; ``unknown`` elsewhere."""
        blank = unknown.expand(*self._like.shape, *shape)
        return torch.stack([blank if own is None else own for own in known])

    def present(self) -> Tensor:
        """[k, n] of all steps, on the host."""
        flags = [step[4] for step in self._steps]
        runs = [(own, len(list(run))) for own, run in itertools.groupby(flags)]
        rows = torch.tensor([own for own, _ in runs], dtype=torch.uint8)
        return rows.repeat_interleave(torch.tensor([steps for _, steps in runs]), dim=0)


_OUTCOME, _SKIPPED, _SAMPLE, _TAKEN = 6, 7, 8, 9  # fields of a step that is kept


class Kept:
    """Steps of one layout as the training thread leaves them, and nothing computed that can wait.

    Of a step that was made, multiplied by factors of parameters at most, only numbers and tensors are kept: whatever
    else is alive for long, the interpreter's garbage collection goes through again and again, with all that there is.
    """

    def __init__(self, first: StepReport) -> None:
        self.selections = first.selections
        self.like = self.selections[0].measured.norms
        self._places = [i for i, selection in enumerate(self.selections) if selection.measured.names] or [0]
        # Of each step: number, time, the main selection's norm and bound, whether it was made, what was logged (a
        # number is the learning rate); where it did more than multiply each parameter by a factor, what came of it; its
        # report where it may have been skipped; its sample; and what was taken of the selections.
        self.steps: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        """How many steps they are."""
        return len(self.steps)

    def add(
        self, report: StepReport, time: float, rate: Tensor | float | None, sample: Sample | None
    ) -> None:
        """Take a step, and at once what reads its gradients, and tensors that are the user's.

        Whatever interrupts this, the step is there as a whole, or not at all.
        """
        selections, outcome = report.selections, None
        main, scalars = selections[0], self._scalars(report, rate)
        decision, made = main.decision, report.stepped_or_pending
        if decision.clamp is not None or decision.unit_coefficients is not None:
            outcome = main.outcome, None if decision.clamp is None else main.clipped_total()
            bound: Any = main.outcome.bound()
        else:
            bound = _small(decision.known_bound)
        taken = [_taken(selections[i]) for i in self._places]
        skipped, total = None if made is True else report, main.measured.known_total
        self.steps.append((report.step, time, total, bound, made, scalars, outcome, skipped, sample, *taken))

    def some(self, field: int) -> dict[int, Any]:
        """By place what there is in a field of the steps that have it."""
        return {i: step[field] for i, step in enumerate(self.steps) if step[field] is not None}

    def columns(self) -> list[Columns]:
        """The selections' with parameters."""
        return [
            Columns(self.selections[i].measured.norms, [step[_TAKEN + k] for step in self.steps])
            for k, i in enumerate(self._places)
        ]

    def _scalars(self, report: StepReport, rate: Tensor | float | None) -> dict[str, Tensor | float] | float:
        """What the user logged, and what is worth knowing beside it; mostly the learning rate alone."""
        prescale = report.prescale
        is_scaled = isinstance(prescale, Tensor) or prescale != 1.0
        if type(rate) is float and not (is_scaled or report.scalars):
            return rate
        scalars = dict(report.scalars)
        if rate is not None:
            scalars.setdefault("lr", rate)
        if is_scaled:
            scalars["prescale"] = prescale
        for name, value in scalars.items():
            if type(value) is not float:
                scalars[name] = _own(value, self.like)
        return scalars

    def stacked(self) -> dict[str, Tensor]:
        """The steps' tensors where they are, stacked: [k] and [k, n]."""
        unknown, columns = self.like.new_full((), math.nan), self.columns()
        _, _, totals, bounds, made, logged = zip(*(step[:6] for step in self.steps), strict=True)
        series = {
            "total": _scalars(totals, unknown),
            "bound": _scalars(bounds if _are_floats(bounds) else [_least(own) for own in bounds], unknown),
            "stepped": _scalars(made, unknown),
            "norms": torch.cat([own.norms() for own in columns], dim=1),
            "coefficients": torch.cat([own.coefficients() for own in columns], dim=1),
        }
        for name, place in (("weights", 2), ("peaks", 3)):
            known = [own.known(place) for own in columns]
            one = next((value for own in known for value in own if value is not None), None)
            if one is not None:
                parts = zip(columns, known, strict=True)
                series[name] = torch.cat(
                    [own.stacked(of, unknown, one.shape[1:]) for own, of in parts], dim=1
                )
        if outcomes := self.some(_OUTCOME).values():
            after = [own.total() if own.decision.clamp is None else measured for own, measured in outcomes]
            series["outcome_total"] = torch.stack([unknown if total is None else total for total in after])
            series["outcome_clipped"] = torch.stack([own.is_clipped() for own, _ in outcomes]).to(
                unknown.dtype
            )
        scalars = [{"lr": own} if type(own) is float else own for own in logged]
        for name in dict.fromkeys(itertools.chain.from_iterable(scalars)):
            series[SCALAR_PREFIX + name] = _scalars([row.get(name, math.nan) for row in scalars], unknown)
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


def layout(selections: Sequence[SelectionReport]) -> list[tuple[str, str, tuple[str, ...]]]:
    """What steps of one batch have in common: the same parameters under the same policies."""
    return [(s.label, s.policy, s.measured.names) for s in selections]


class Batch:
    """Kept steps of one layout, stacked on their device and copied to the host without waiting for it.

    What is on the host already is stacked by the writing thread.
    """

    def __init__(self, kept: Kept, subject: Subject) -> None:
        self._kept, self._subject = kept, subject
        self._series: dict[str, Tensor] | None = None
        self._samples: list[tuple[int, Sample]] = [
            (kept.steps[i][0], sample) for i, sample in kept.some(_SAMPLE).items()
        ]
        if not kept.like.is_cpu:
            self._series = {name: to_host(value) for name, value in kept.stacked().items()}
            self._samples = [(step, sample.on_host()) for step, sample in self._samples]
        self._arrival = Arrival(kept.like.device)

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
        steps = [step[0] for step in kept.steps]
        series["step"] = from_list(steps, torch.int64)
        series["time"] = from_list([step[1] for step in kept.steps])
        series["present"] = torch.cat([columns.present() for columns in kept.columns()], dim=1)
        self._add_lags(series, steps)
        stepped = (series["verdict"] & STEPPED).tolist()
        return Rows(
            subject=self._subject,
            selections=kept.selections,
            steps=steps,
            series=series,
            skips=[_skip(one, series, i) for i, one in kept.some(_SKIPPED).items() if not stepped[i]],
            samples=self._samples,
        )

    def _add_lags(self, series: dict[str, Tensor], steps: Sequence[int]) -> None:
        lags = {step: sample.lag.value() for step, sample in self._samples if sample.lag is not None}
        if lags:
            name = SCALAR_PREFIX + SERIES
            logged = series[name].tolist() if name in series else [math.nan] * len(steps)
            series[name] = from_list([lags.get(step, own) for step, own in zip(steps, logged, strict=True)])


def _small(bound: Any) -> Any:
    """A policy's bound in little memory: of a tensor on the host the smallest, of a list a tuple of its numbers."""
    if type(bound) is list:
        return tuple(bound)
    return _least(bound) if isinstance(bound, Tensor) and bound.is_cpu else bound


def _least(bound: Any) -> Tensor | float:
    """The smallest bound of a step; NaN where there is none."""
    if isinstance(bound, Tensor):
        return bound.min() if bound.numel() else math.nan
    if isinstance(bound, tuple):
        return min(bound, default=math.nan)
    return math.nan if bound is None else float(bound)


def _are_floats(values: Sequence[Any]) -> bool:
    return set(map(type, values)) == {float}


def _scalars(values: Sequence[Tensor | float], like: Tensor) -> Tensor:
    if like.is_cpu:
        return from_list(values)
    # Filled on the device: a number that travelled there would make the host wait.
    number = like.new_empty(())
    return torch.stack(
        [v.to(like.dtype) if isinstance(v, Tensor) else torch.full_like(number, v) for v in values]
    )


def _coefficients(values: Sequence[Tensor | tuple[float, ...] | float | None], norms: Tensor) -> Tensor:
    """[k, n] from one coefficient a step, or one a parameter and step; None is 1."""
    filled: Sequence[Any] = values
    if not _are_floats(values):
        filled = [1.0 if value is None else value for value in filled]
        filled = [from_list(value) if isinstance(value, tuple) else value for value in filled]
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
    if places := list(kept.some(_OUTCOME)):
        after[places] = series.pop("outcome_total")
        clipped[places] |= series.pop("outcome_clipped") == 1.0
    series["clipped_total"], series["coefficient"] = after, smallest
    is_finite = torch.isfinite(norms).all(dim=1)
    verdict = series.pop("stepped") * STEPPED + clipped * CLIPPED + ~is_finite * NONFINITE
    series["verdict"] = verdict.to(torch.uint8)


def _skip(report: StepReport, series: Mapping[str, Tensor], row: int) -> tuple[int, SkipReason, str]:
    """A skipped step's number, reason and words, from norms and losses that are on the host already."""
    losses = series.get(SCALAR_PREFIX + "loss")
    place = nonfinite_words(
        report, series["norms"][row].tolist(), None if losses is None else float(losses[row])
    )
    why = report.why or (SkipReason.POLICY if place is None else SkipReason.NONFINITE)
    return report.step, why, why.words(report.step, place)
