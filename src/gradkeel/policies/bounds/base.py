"""This module says what a bound is, and what bounds that learn from norms have in common."""

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch

from gradkeel.norms import State
from gradkeel.policies.base import Part, count
from gradkeel.policies.numbers import Memory, Number, ask, constant, where
from gradkeel.policies.scopes import Cells

# Norms vary from step to step; a smaller standard deviation of their logarithm is an accident of a short history.
LEAST_SPREAD = 0.01


class Bound(Part, ABC):
    """A bound says how large a cell's norm may be. It is configuration; state tensors have the leading dimension k.

    A subclass whose formulas are written in the operations of `gradkeel.policies.numbers` says so by
    ``class Mine(Bound, on_numbers=True)``. On CPU they are then followed once, with symbols, and written down: as lines
    for the native kernels, and as one function of the plain numbers of a cell, both many times faster where cells are
    few. All that they look at beside cells and state must stay as it was, and none may ask what type a number has.
    Formulas that cannot be written down, for they choose by ``if`` or call functions of other modules, always see
    tensors, as those of all other subclasses do.
    """

    needs_weights: ClassVar[bool] = False

    def init(self, cells: Cells) -> State:
        """Return the state before the first step; empty unless a bound says otherwise."""
        return {}

    @abstractmethod
    def bound(self, cells: Cells, state: Memory) -> Number:
        """Return [k] or [1] the bound in force at this step; inf where there is none yet."""

    def update(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        """Return the state after this step; a cell that is not valid keeps its old one whatever is returned for it."""
        return state


class HostBound(Bound):
    """A bound that the host knows without looking at norms; the only kind that can bound single entries."""

    @abstractmethod
    def at(self, step: int) -> tuple[float, float]:
        """Return the lowest entry and the highest entry or norm allowed at ``step`` (from 1)."""

    def bound(self, cells: Cells, state: Memory) -> Number:
        """Return [1] the highest norm allowed."""
        return constant(ask(self.at, cells.step)[1], cells.norms)


@dataclass(frozen=True)
class AdaptiveBound(Bound):
    """A bound that learns from the norms it has seen, and starts afresh after a long run of norms above it.

    A norm that shifts for good would otherwise be clipped for as long as the statistics remember the old one. So
    after ``patience`` valid norms in a row above the bound, the statistics begin anew with the norm of that step;
    until they have seen ``warmup`` norms again, the last bound stays in force, and what is above it does not count.

    A subclass says what it keeps (`start`), how a norm enters it (`learn`) and what bound follows (`estimate`). Where
    ``state["seen"]`` is 0 it must take everything else in the state for empty. The norms that it learns from are the
    raw ones, each only after it has been judged.

    Args:
        warmup: how many valid norms a cell must have shown before it is bounded.
        patience: how many norms in a row above the bound make the statistics start afresh; None turns that off.
    """

    _: KW_ONLY
    warmup: int = 1
    patience: int | None = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        count(type(self).__name__, "warmup", self.warmup)
        if self.patience is not None:
            count(type(self).__name__, "patience", self.patience)

    @abstractmethod
    def start(self, cells: Cells) -> State:
        """Return what is kept before the first norm."""

    @abstractmethod
    def learn(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        """Return what is kept after this step's norms, which were judged by ``bound`` [k]."""

    @abstractmethod
    def estimate(self, cells: Cells, state: Memory) -> Number:
        """Return [k] the bound that follows from what is kept; read only where ``warmup`` norms were seen."""

    def init(self, cells: Cells) -> State:
        """Return ``seen`` [k] int64, with patience ``run`` [k] int64 and ``held`` [k], and what is kept."""
        seen = torch.zeros_like(cells.norms, dtype=torch.int64)
        state = {"seen": seen, **self.start(cells)}
        if self.patience is not None:
            state |= {"run": seen, "held": torch.full_like(cells.norms, math.inf)}
        return state

    def bound(self, cells: Cells, state: Memory) -> Number:
        """Return [k] the estimate, once enough was seen; until then the last bound, which is inf at the start."""
        held = math.inf if self.patience is None else state["held"]
        return where(state["seen"] >= self.warmup, self.estimate(cells, state), held)

    def update(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        """Return a state that has learned this step's norms, after a fresh start where patience has run out."""
        seen, extra = state["seen"], {}
        if self.patience is not None:
            # Above the last bound, while new statistics fill, says nothing of these: they would never fill.
            judged = (cells.norms > bound) & (seen >= self.warmup)
            run = where(judged, state["run"] + 1, 0)
            run_out = run >= self.patience
            seen = where(run_out, 0, seen)
            extra = {"run": where(run_out, 0, run), "held": bound}
        learned = self.learn(cells, {**state, "seen": seen}, bound)
        return {"seen": seen + 1, **learned, **extra}
