"""What an experiment is: a claim with a criterion that was fixed before it was run, and what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Series = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment measured.

    Attributes:
        measured: the measurement in words and figures.
        passed: whether it meets the criterion.
        series: the points of its picture, by name; empty where it has none.
    """

    measured: str
    passed: bool
    series: Series = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """An experiment that was run: its number, claim and criterion, and its outcome.

    Attributes:
        id: "R1", "R2", ...
        title: the claim in a few words.
        criterion: when it counts as shown.
        measured: what was seen.
        passed: whether the criterion is met.
        series: the points of its picture, by name.
    """

    id: str
    title: str
    criterion: str
    measured: str
    passed: bool
    series: Series


@dataclass(frozen=True, slots=True)
class Experiment:
    """A claim, its criterion, and how to measure it; ``quick`` ones take a few seconds at most."""

    id: str
    title: str
    criterion: str
    measure: Callable[[], Outcome]
    quick: bool

    def run(self) -> Result:
        """Measure, and compare with the criterion."""
        outcome = self.measure()
        return Result(self.id, self.title, self.criterion, outcome.measured, outcome.passed, outcome.series)


EXPERIMENTS: dict[str, Experiment] = {}
"""All experiments by number, in the order in which their modules define them."""


def experiment(
    id: str,  # noqa: A002 - what the table calls it
    title: str,
    criterion: str,
    *,
    quick: bool = True,
) -> Callable[[Callable[[], Outcome]], Callable[[], Outcome]]:
    """Register the decorated function as the measurement of an experiment."""

    def register(measure: Callable[[], Outcome]) -> Callable[[], Outcome]:
        EXPERIMENTS[id] = Experiment(id, title, criterion, measure, quick)
        return measure

    return register
