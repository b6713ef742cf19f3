"""Exact gradient accumulation."""

from gradkeel.accumulate.accumulator import Accumulator
from gradkeel.accumulate.micro import MicroBatch

__all__ = ["Accumulator", "MicroBatch"]
