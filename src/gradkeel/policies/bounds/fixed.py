"""This module has the bounds that remember nothing: constants, schedules, multiples of what the same step measures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from gradkeel.errors import check_kind
from gradkeel.norms import State
from gradkeel.policies.base import positive
from gradkeel.policies.bounds.base import Bound, HostBound
from gradkeel.policies.numbers import Memory, Number, divide, maximum, sqrt
from gradkeel.policies.scopes import Cells


@dataclass(frozen=True)
class Constant(HostBound, on_numbers=True):
    """The same bound at every step.

    Args:
        highest: the largest norm (or entry) allowed, above 0.
        lowest: the smallest entry allowed, for the value scope; ``-highest`` unless given.
    """

    highest: float
    lowest: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest is None:
            positive("Constant", "highest", self.highest)

    def at(self, step: int) -> tuple[float, float]:
        return (-self.highest if self.lowest is None else self.lowest, self.highest)


@dataclass(frozen=True)
class Schedule(HostBound, on_numbers=True):
    """A bound that follows the step's number: ``bound(step)``, steps counted from 1.

    The host computes it, so a captured CUDA graph keeps the bound of the step at which it was captured.

    Args:
        function: from step to a positive number.
    """

    function: Callable[[int], float]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(
            self.function,
            Callable,
            "Schedule(function=...)",
            "function must give a bound for a step's number",
        )

    def at(self, step: int) -> tuple[float, float]:
        """Return the function's value, checked."""
        limit = positive("Schedule", f"function({step})", self.function(step))
        return (-limit, limit)


@dataclass(frozen=True)
class RootMeanSquare(Bound, on_numbers=True):
    """``c * sqrt(m)`` for a cell of m entries: bounds the root mean square of its entries by ``c``.

    Args:
        highest: the largest root mean square allowed, above 0.
    """

    _positive = ("highest",)
    highest: float

    def init(self, cells: Cells) -> State:
        """Keep nothing, but bring the sizes to the device before the first step."""
        _ = cells.sizes
        return {}

    def bound(self, cells: Cells, state: Memory) -> Number:
        return self.highest * sqrt(cells.sizes)


@dataclass(frozen=True)
class ParameterRatio(Bound, on_numbers=True):
    """``ratio * max(||w||, floor)``: bounds a gradient relative to the weights that it changes.

    Args:
        ratio: largest gradient norm as a share of the weights' norm, above 0.
        floor: the weights' norm counts as at least this much, so that weights that start at zero can move.
    """

    needs_weights: ClassVar[bool] = True
    _positive = ("ratio", "floor")
    ratio: float
    floor: float = 1e-3

    def bound(self, cells: Cells, state: Memory) -> Number:
        return self.ratio * maximum(cells.weights, self.floor)


@dataclass(frozen=True)
class Smoothness(Bound, on_numbers=True):
    """``n / (L0 + L1 n)``: the length of the best step where the curvature is at most ``L0 + L1 n``.

    It grows with ``n`` to the limit ``1 / L1``. With the form `Rescale` the coefficient is ``1 / (L0 + L1 n)``, with
    `Hard` the same but never above 1; both take the optimizer's learning rate as a share of the best step.

    Args:
        L0: curvature where the gradient vanishes, above 0.
        L1: growth of the curvature with the gradient norm, above 0.

    Source:
        Zhang, He, Sra, Jadbabaie, "Why gradient clipping accelerates training", 2020.
    """

    _positive = ("L0", "L1")
    L0: float
    L1: float

    def bound(self, cells: Cells, state: Memory) -> Number:
        return divide(cells.norms, self.L0 + self.L1 * cells.norms)
