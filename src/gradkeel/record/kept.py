"""Steps as the training thread leaves them, kept as they are until they are stacked, many at once."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradkeel.guard.report import SelectionReport, StepReport
from gradkeel.kernels.arrival import current_stream, to_host
from gradkeel.norms import from_list
from gradkeel.outcome import Outcome
from gradkeel.record.lag import Lag
from gradkeel.record.schema import SCALAR_PREFIX, from_blobs, to_blob


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


NORMS, FACTORS, WEIGHTS, PEAKS, PRESENT = range(5)
"""Fields of what is kept of one selection in a step."""


def _taken(selection: SelectionReport) -> tuple[Any, ...]:
    measured, decision = selection.measured, selection.decision
    factors: Any = decision.known_coefficients if decision.unit_coefficients is None else selection.outcome
    if type(factors) is list:
        factors = tuple(factors)
    return measured.known_norms, factors, measured.weights, measured.peaks, selection.present


class Columns:
    """What one selection's steps have measured and decided; ``like`` are the [n] norms of one of them."""

    def __init__(self, like: Tensor, rows: Sequence[tuple[Any, ...]]) -> None:
        self._like, self._columns = like, tuple(zip(*rows, strict=True))

    def norms(self) -> Tensor:
        """[k, n] of all steps."""
        norms = self._columns[NORMS]
        if bytearray in set(map(type, norms)):  # the host's, whose tensors are made where somebody looks
            blobs = [own if type(own) is bytearray else to_blob(own.to(torch.float64)) for own in norms]
            return from_blobs(blobs, torch.float64).reshape(len(norms), self._like.numel())
        return torch.stack(norms)

    def coefficients(self) -> Tensor:
        """[k, n] of all steps."""
        values: Sequence[Any] = self._columns[FACTORS]
        if Outcome in set(map(type, values)):
            values = [own.coefficients() if isinstance(own, Outcome) else own for own in values]
        return _coefficients(values, self._like)

    def known(self, field: int) -> Sequence[Tensor | None]:
        """Of each step the norms of weights or the peaks, where they were measured."""
        return self._columns[field]

    def stacked(self, known: Sequence[Tensor | None], unknown: Tensor, shape: Sequence[int]) -> Tensor:
        """[k, n, ...] of what is known of some steps; ``unknown`` elsewhere."""
        blank = unknown.expand(*self._like.shape, *shape)
        return torch.stack([blank if own is None else own for own in known])

    def present(self) -> Tensor:
        """[k, n] of all steps, on the host."""
        runs = [(own, len(list(run))) for own, run in itertools.groupby(self._columns[PRESENT])]
        rows = torch.tensor([own for own, _ in runs], dtype=torch.uint8, device="cpu")
        return rows.repeat_interleave(torch.tensor([steps for _, steps in runs], device="cpu"), dim=0)


STEP, TIME, TOTAL, BOUND, MADE, LOGGED, CAME_TO, MAYBE_SKIPPED, SAMPLE, _SELECTIONS = range(10)
"""Fields of a kept step: its number, when it ended, the main selection's norm and bound, and whether it was made.

What was logged: the learning rate alone as a number, else pairs of a name and a number. Where it did more than multiply
each parameter by a factor: what that came to, and the norm that was measured after a clamp. Its report, where it may
have been skipped. Its sample. From `_SELECTIONS` on what is kept of each selection.
"""


class Kept:
    """Steps of one layout as the training thread leaves them, and nothing computed that can wait.

    Of a step that was made, multiplied by factors of parameters at most, only numbers and tensors are kept, in tuples.
    The interpreter's garbage collection does not go through tuples of numbers alone, which most policies' are on the
    CPU; whatever else is alive for long, it goes through again and again.
    """

    def __init__(self, first: StepReport) -> None:
        self.selections = first.selections
        self.like = self.selections[0].measured.norms
        self._places = [i for i, selection in enumerate(self.selections) if selection.measured.names] or [0]
        self.steps: list[tuple[Any, ...]] = []
        self.stream: Any = None  # the last one's
        self._columns: tuple[tuple[Any, ...], ...] = ((),)  # of as many steps as it was made of

    def __len__(self) -> int:
        return len(self.steps)

    def taken(
        self, report: StepReport, time: float, rate: Tensor | float | None, sample: Sample | None
    ) -> tuple[Any, ...]:
        """A step as it is kept; what reads its gradients, and tensors that are the user's, are read at once."""
        if not self.like.is_cpu:
            self.stream = current_stream(self.like.device)
        main, came_to = report.selections[0], None
        decision, made = main.decision, report.stepped_or_pending
        if decision.clamp is not None or decision.unit_coefficients is not None:
            outcome = main.outcome
            came_to = outcome, None if decision.clamp is None else main.clipped_total()
            bound: Any = outcome.bound()
        else:
            bound = _small(decision.known_bound)
        taken = [_taken(report.selections[i]) for i in self._places]
        return (
            report.step, time, main.measured.known_total, bound, made, self._logged(report, rate),
            came_to, None if made is True else report, sample, *taken,
        )  # fmt: skip

    def of(self, field: int) -> tuple[Any, ...]:
        """What there is in a field, of all steps."""
        if len(self._columns[0]) != len(self.steps):
            self._columns = tuple(zip(*self.steps, strict=True))
        return self._columns[field]

    def some(self, field: int) -> dict[int, Any]:
        """By place what there is in a field of the steps that have it."""
        return {i: value for i, value in enumerate(self.of(field)) if value is not None}

    def columns(self) -> list[Columns]:
        """The selections' with parameters."""
        return [
            Columns(self.selections[i].measured.norms, self.of(_SELECTIONS + k))
            for k, i in enumerate(self._places)
        ]

    def _logged(self, report: StepReport, rate: Tensor | float | None) -> tuple[Any, ...] | float:
        """What the user logged, and what is worth knowing beside it."""
        prescale = report.prescale
        is_scaled = isinstance(prescale, Tensor) or prescale != 1.0
        if type(rate) is float and not (is_scaled or report.scalars):
            return rate
        scalars = dict(report.scalars)
        if rate is not None:
            scalars.setdefault("lr", rate)
        if is_scaled:
            scalars["prescale"] = prescale
        return tuple(
            [
                (name, value if type(value) is float else _own(value, self.like))
                for name, value in scalars.items()
            ]
        )

    def stacked(self) -> dict[str, Tensor]:
        """The steps' tensors where they are, stacked: [k] and [k, n]."""
        unknown, columns = self.like.new_full((), math.nan), self.columns()
        bounds = self.of(BOUND)
        series = {
            "total": _scalars(self.of(TOTAL), unknown),
            "bound": _scalars(bounds if _are_floats(bounds) else [_least(own) for own in bounds], unknown),
            "stepped": _scalars(self.of(MADE), unknown),
            "norms": torch.cat([own.norms() for own in columns], dim=1),
            "coefficients": torch.cat([own.coefficients() for own in columns], dim=1),
        }
        for name, field in (("weights", WEIGHTS), ("peaks", PEAKS)):
            known = [own.known(field) for own in columns]
            one = next((value for own in known for value in own if value is not None), None)
            if one is not None:
                parts = zip(columns, known, strict=True)
                series[name] = torch.cat(
                    [own.stacked(of, unknown, one.shape[1:]) for own, of in parts], dim=1
                )
        if outcomes := self.some(CAME_TO).values():
            after = [own.total() if own.decision.clamp is None else measured for own, measured in outcomes]
            series["outcome_total"] = torch.stack([unknown if total is None else total for total in after])
            series["outcome_clipped"] = torch.stack([own.is_clipped() for own, _ in outcomes]).to(
                unknown.dtype
            )
        logged = self.of(LOGGED)
        if _are_floats(logged):
            return series | {SCALAR_PREFIX + "lr": _scalars(logged, unknown)}
        scalars = [{"lr": own} if type(own) is float else dict(own) for own in logged]
        for name in dict.fromkeys(itertools.chain.from_iterable(scalars)):
            series[SCALAR_PREFIX + name] = _scalars([row.get(name, math.nan) for row in scalars], unknown)
        return series


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
    kinds = set(map(type, values))
    if kinds != {float}:
        filled = [1.0 if value is None else value for value in filled]
    if not kinds <= {float, type(None)}:
        filled = [from_list(value) if isinstance(value, tuple) else value for value in filled]
        if any(isinstance(value, Tensor) and value.dim() for value in filled):
            return torch.stack(
                [v.expand_as(norms) if isinstance(v, Tensor) else torch.full_like(norms, v) for v in filled]
            )
    return _scalars(filled, norms).unsqueeze(1).expand(-1, norms.numel())
