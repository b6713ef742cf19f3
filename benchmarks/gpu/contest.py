"""Three times of each contender, round after round in random order."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CONTROL = "torch, again"
_FILL = 30_000_000
"""Clock cycles for which the queue is kept from running, so that the device never waits for the host: 15 to 20 ms."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """Something to be timed; ``prepare`` comes before each run, untimed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Times:
    """Medians in milliseconds.

    Attributes:
        wall: from an idle device until it is idle again.
        host: until the host has enqueued everything.
        device: from the first operation's start to the last one's end, with a queue that was filled beforehand.
        ratio: median over the rounds of this one's wall time to the first entrant's in the same round.
        quartiles: of the same.
    """

    wall: float
    host: float
    device: float
    ratio: float
    quartiles: tuple[float, float]


def contest(
    entrants: Sequence[Entrant], *, rounds: int, warmup: int = 3, with_device: bool = True
) -> dict[str, Times]:
    """Time all entrants; the first is the baseline, and runs a second time in each round as its own control."""
    running = [*entrants, Entrant(CONTROL, entrants[0].run, entrants[0].prepare)]
    for entrant in running * warmup:
        entrant.prepare()
        entrant.run()
    walls: dict[str, list[float]] = {entrant.name: [] for entrant in running}
    hosts: dict[str, list[float]] = {entrant.name: [] for entrant in running}
    devices: dict[str, list[float]] = {entrant.name: [] for entrant in running}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for entrant in order.sample(running, len(running)):
                wall, host = _idle(entrant)
                walls[entrant.name].append(wall)
                hosts[entrant.name].append(host)
                if with_device:
                    devices[entrant.name].append(_filled(entrant))
    finally:
        gc.enable()
    base = walls[entrants[0].name]
    return {name: _times(walls[name], hosts[name], devices[name], base) for name in walls}


def _times(walls: list[float], hosts: list[float], devices: list[float], base: list[float]) -> Times:
    ratios = [own / other for own, other in zip(walls, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    device = statistics.median(devices) if devices else float("nan")
    return Times(statistics.median(walls), statistics.median(hosts), device, middle, (low, high))


def _idle(entrant: Entrant) -> tuple[float, float]:
    entrant.prepare()
    torch.cuda.synchronize()
    start = time.perf_counter()
    entrant.run()
    enqueued = time.perf_counter()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, (enqueued - start) * 1e3


def _filled(entrant: Entrant) -> float:
    entrant.prepare()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_FILL)
    begin.record()
    entrant.run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
