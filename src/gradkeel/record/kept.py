"""Steps as the training thread leaves them, kept as they are until they are stacked, many at once."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradkeel.guard.report import SelectionReport, StepReport
from gradkeel.kernels.arrival import to_host
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


OUTCOME, SKIPPED, SAMPLE, _TAKEN = 6, 7, 8, 9  # fields of a step that is kept


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
        if outcomes := self.some(OUTCOME).values():
            after = [own.total() if own.decision.clamp is None else measured for own, measured in outcomes]
            series["outcome_total"] = torch.stack([unknown if total is None else total for total in after])
            series["outcome_clipped"] = torch.stack([own.is_clipped() for own, _ in outcomes]).to(
                unknown.dtype
            )
        scalars = [{"lr": own} if type(own) is float else own for own in logged]
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
    if not _are_floats(values):
        filled = [1.0 if value is None else value for value in filled]
        filled = [from_list(value) if isinstance(value, tuple) else value for value in filled]
        if any(isinstance(value, Tensor) and value.dim() for value in filled):
            return torch.stack(
                [v.expand_as(norms) if isinstance(v, Tensor) else torch.full_like(norms, v) for v in filled]
            )
    return _scalars(filled, norms).unsqueeze(1).expand(-1, norms.numel())
