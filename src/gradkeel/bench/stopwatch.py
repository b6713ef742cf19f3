"""The stopwatch: contenders run in random order, round after round, and are compared round by round."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

AGAIN = ", again"
"""What the control is called after the baseline: the same code, timed a second time in each round."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to be timed."""

    name: str  # what tables call it; unique in a race
    run: Callable[[], object]  # what is timed; it returns when the work is done
    prepare: Callable[[], object] = lambda: None  # before each run, not timed: whatever the run uses up
    error: Callable[[], float] | None = None  # once after a run: what it left is off by this, beside float64


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Race:
    """What a race has measured."""

    baseline: str  # the contender to whom the others are compared
    seconds: Mapping[str, tuple[float, ...]]  # each contender's time in each round, the control included
    first: Mapping[str, float]  # seconds of each contender's very first run: compilation and caches included
    errors: Mapping[str, float]  # relative errors against float64 of those that were checked

    def time(self, name: str) -> Quartiles:
        """Return the seconds of one contender."""
        return quartiles(self.seconds[name])

    def ratio(self, name: str, to: str | None = None) -> Quartiles:
        """Return a contender's time as a multiple of another's (the baseline's) in the same round."""
        other = self.seconds[to or self.baseline]
        return quartiles([own / its for own, its in zip(self.seconds[name], other, strict=True)])

    @property
    def control(self) -> Quartiles:
        """Compare the baseline with itself: what a ratio of 1 looks like in this race."""
        return self.ratio(self.baseline + AGAIN)


@dataclass(frozen=True)
class Table:
    """One race, and what it was about."""

    title: str
    race: Race


def race(
    contenders: Sequence[Contender],
    *,
    rounds: int = 30,
    warmup: int = 2,
    seed: int = 0,
    seconds: float | None = None,
    collects: bool = False,
    synchronize: Callable[[], object] = lambda: None,
) -> Race:
    """Time all contenders once a round, in a random order that is another in each round.

    The first contender is the baseline, and is timed twice a round: the second time as its own control. Whoever
    has an ``error`` is checked before it is timed. The garbage collector is off meanwhile, unless ``collects``.

    Args:
        contenders: at least one, with names of their own.
        warmup: how often each is run beforehand, after the run that is checked.
        seconds: no further round is begun after so long, once there are 5; None sets no limit.
        collects: leave the garbage collector as it is: a run that is long pays for what it leaves alive.
        synchronize: waits for an accelerator; called before each run and, timed, at its end.
    """
    baseline = contenders[0]
    running = [*contenders, Contender(baseline.name + AGAIN, baseline.run, baseline.prepare)]
    if len({contender.name for contender in running}) < len(running):
        raise ValueError(f"race: contenders need names of their own, not {[c.name for c in contenders]}")

    def timed(contender: Contender) -> float:
        contender.prepare()
        synchronize()
        start = time.perf_counter()
        contender.run()
        synchronize()
        return time.perf_counter() - start

    first, errors = {}, {}
    for contender in running:
        first[contender.name] = timed(contender)
        if contender.error is not None:
            errors[contender.name] = contender.error()
    for contender in running * warmup:
        timed(contender)
    times: dict[str, list[float]] = {contender.name: [] for contender in running}
    order, started = random.Random(seed), time.perf_counter()
    gc.collect()
    was_enabled = gc.isenabled()
    if not collects:
        gc.disable()
    try:
        for done in range(rounds):
            if seconds is not None and done >= 5 and time.perf_counter() - started > seconds:
                break
            for contender in order.sample(running, len(running)):
                times[contender.name].append(timed(contender))
    finally:
        if was_enabled:
            gc.enable()
    return Race(baseline.name, {name: tuple(values) for name, values in times.items()}, first, errors)


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of at least one number."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))
