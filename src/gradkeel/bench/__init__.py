"""How long clipping takes, measured honestly: contenders interleaved in one process, ratios, and the read limit."""

from gradkeel.bench.stopwatch import Contender, Quartiles, Race, Table, race
from gradkeel.bench.workload import SHAPES, Gradients

__all__ = ["SHAPES", "Contender", "Gradients", "Quartiles", "Race", "Table", "race"]
