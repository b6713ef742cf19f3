"""Steps on their way from the device to whoever writes them down: batches of them, and rows on the host."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradkeel.guard.report import SelectionReport, SkipReason, StepReport, nonfinite_words
from gradkeel.kernels.arrival import Arrival, in_order_with, to_host
from gradkeel.norms import combine, from_list
from gradkeel.record.kept import CAME_TO, MAYBE_SKIPPED, SAMPLE, STEP, TIME, Kept, Sample
from gradkeel.record.lag import SERIES
from gradkeel.record.schema import CLIPPED, NONFINITE, SCALAR_PREFIX, STEPPED


@dataclass(frozen=True, slots=True)
class Subject:
    """What is recorded."""

    names: tuple[str, ...] = ()  # the parameters, in the order in which they are to be shown
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # their shapes, by name
    policy: str = ""  # spec of the main policy
    optimizer: str = ""  # name of the optimizer's class
    nonfinite: str = ""  # what the guard does with non-finite gradients
    rank: int = 0  # who records
    ranks: int = 1  # how many do, each into a file of its own
    # which piece of each parameter this rank holds; None where it holds whole ones
    pieces: dict[str, tuple[int, ...]] | None = None


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
            (kept.steps[i][STEP], sample) for i, sample in kept.some(SAMPLE).items()
        ]
        if not kept.like.is_cpu:
            with in_order_with(kept.stream, kept.like.device):
                self._series = {name: to_host(value) for name, value in kept.stacked().items()}
                self._samples = [(step, sample.on_host()) for step, sample in self._samples]
        self._arrival = Arrival(kept.like.device)

    def __len__(self) -> int:
        return len(self._kept)

    def rows(self) -> Rows:
        """The steps on the host; waits for the copy, so call it off the training thread."""
        self._arrival.wait()
        kept = self._kept
        stacked = kept.stacked() if self._series is None else self._series
        series = {name: value.to(torch.float64) for name, value in stacked.items()}
        _derive(series, kept)
        steps = list(kept.of(STEP))
        series["step"] = from_list(steps, torch.int64)
        series["time"] = from_list(kept.of(TIME))
        series["present"] = torch.cat([columns.present() for columns in kept.columns()], dim=1)
        self._add_lags(series, steps)
        stepped = (series["verdict"] & STEPPED).tolist()
        return Rows(
            subject=self._subject,
            selections=kept.selections,
            steps=steps,
            series=series,
            skips=[_skip(one, series, i) for i, one in kept.some(MAYBE_SKIPPED).items() if not stepped[i]],
            samples=self._samples,
        )

    def _add_lags(self, series: dict[str, Tensor], steps: Sequence[int]) -> None:
        lags = {step: sample.lag.value() for step, sample in self._samples if sample.lag is not None}
        if lags:
            name = SCALAR_PREFIX + SERIES
            logged = series[name].tolist() if name in series else [math.nan] * len(steps)
            series[name] = from_list([lags.get(step, own) for step, own in zip(steps, logged, strict=True)])


def _derive(series: dict[str, Tensor], kept: Kept) -> None:
    """Fill in what follows from norms and coefficients; on the host."""
    main = kept.selections[0].measured
    columns = len(main.names)
    norms, own = series["norms"], series["coefficients"][:, :columns]
    smallest = largest = torch.ones(len(own), dtype=torch.float64, device="cpu")
    if columns:
        smallest, largest = own.aminmax(dim=1)
    clipped = (own < 1).any(dim=1)  # also beside a coefficient that is NaN, as the smallest then is
    after = (
        series["total"] * smallest
        if smallest.equal(largest)
        else torch.stack([combine(row, main.norm_type) for row in norms[:, :columns] * own])
    )
    if places := list(kept.some(CAME_TO)):
        after[places] = series.pop("outcome_total")
        clipped[places] |= series.pop("outcome_clipped") == 1.0
    skipped = series["stepped"] == 0.0
    if skipped.any():  # by a device, it may be, after something had been decided of which nothing came
        series["coefficients"] = series["coefficients"].masked_fill(skipped.unsqueeze(1), 1.0)
        clipped, smallest = clipped & ~skipped, smallest.masked_fill(skipped, 1.0)
        after = torch.where(skipped, series["total"], after)
    series["clipped_total"], series["coefficient"] = after, smallest
    is_finite = torch.isfinite(norms).all(dim=1)
    verdict = series.pop("stepped") * STEPPED + clipped * CLIPPED + ~is_finite * NONFINITE
    series["verdict"] = verdict.to(torch.uint8)


def _skip(report: StepReport, series: Mapping[str, Tensor], row: int) -> tuple[int, SkipReason, str]:
    """A skipped step's number, reason and words, from norms and losses that are on the host already."""
    losses, why = series.get(SCALAR_PREFIX + "loss"), report.told_why()
    place = nonfinite_words(
        report, series["norms"][row].tolist(), None if losses is None else float(losses[row])
    )
    why = why or (SkipReason.POLICY if place is None else SkipReason.NONFINITE)
    return report.step, why, why.words(report.step, place)
