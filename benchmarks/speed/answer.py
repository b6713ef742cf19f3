"""What the answer to a question is made of, and how it is read."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from gradkeel.bench import SHAPES, Gradients, Quartiles, Race, Table
from gradkeel.bench.stopwatch import AGAIN
from gradkeel.bench.workload import READ


@dataclass(frozen=True)
class Target:
    """A ratio that was fixed beforehand, and what was measured.

    Attributes:
        words: of what to what.
        limit: the largest that is good enough.
        measured: quartiles over the rounds.
    """

    words: str
    limit: float
    measured: Quartiles

    @property
    def verdict(self) -> str:
        """Met or missed by three rounds of four, or else undecided."""
        if self.measured.high <= self.limit:
            return "met"
        return "MISSED" if self.measured.low > self.limit else "undecided"


@dataclass(frozen=True)
class Curve:
    """Milliseconds over sizes, a line for each contender; both axes are logarithmic."""

    name: str
    title: str
    xlabel: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Answer:
    """All that was found out about one question; ``rows`` are further lines of Markdown, such as a table."""

    tables: Sequence[Table] = ()
    targets: Sequence[Target] = ()
    curves: Sequence[Curve] = ()
    rows: Sequence[str] = ()


def asked(question: str, rounds: int) -> Answer:
    """The answer to one question, found in this process."""
    warnings.simplefilter("ignore")  # peers' own, about their imports
    answer: Answer = import_module(f"benchmarks.speed.{question}").ask(rounds)
    return answer


def target(words: str, limit: float, race: Race, name: str, to: str | None = None) -> Target:
    """A target for a contender's time as a multiple of another's."""
    return Target(words, limit, race.ratio(name, to))


def bound(gradients: Gradients, *, active: bool) -> float:
    """Twice the gradients' norm or, if the bound is to be active, a third of it."""
    return gradients.norm * (1 / 3 if active else 2)


def both_sides(name: str, words: str, timed: Callable[..., Race]) -> tuple[Race, Race, list[Table]]:
    """A race below and one above the bound, on the shapes of this name, and their tables."""
    gradients = Gradients(SHAPES[name])
    below, above = (timed(gradients, active=active) for active in (False, True))
    tables = [(f"{words}, norm below the bound", below), (f"{words}, norm above the bound", above)]
    return below, above, [Table(title, race) for title, race in tables]


def markdown(table: Table) -> list[str]:
    """The race as a table: time, ratio to the first contender and, where it was timed, to one read."""
    race = table.race
    has_read, has_errors = READ in race.seconds, bool(race.errors)
    heads = (
        ["", "ms", f"x {race.baseline}"]
        + ["x one read"] * has_read
        + ["error"] * has_errors
        + ["first run, ms"]
    )
    lines = [f"**{table.title}**", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in race.seconds:
        cells = [
            name.replace(AGAIN, ", again (control)"),
            number(race.time(name).median * 1e3),
            ratio(race.ratio(name)),
        ]
        if has_read:
            cells.append(f"{race.ratio(name, READ).median:.2f}")
        if has_errors:
            cells.append(f"{race.errors[name]:.0e}" if name in race.errors else "")
        lines.append(f"| {' | '.join([*cells, number(race.first[name] * 1e3)])} |")
    return [*lines, ""]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: Quartiles, digits: int = 2) -> str:
    """Median and quartiles."""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(value.median, value.low, value.high, d=digits)
