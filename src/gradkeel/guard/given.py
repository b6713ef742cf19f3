"""What a step is given besides its gradients, and what stands for it in a step that is captured."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradkeel.kernels.graph import UnfitError


class Route(Enum):
    """Who skips a step that must not be made, and who multiplies gradients."""

    HOST = "host"
    """The host waits for the verdict, and lets gradients be multiplied where there is something to do."""
    DEVICE = "device"
    """The optimizer's kernel skips; gradients are multiplied before it."""
    FOLDED = "folded"
    """The optimizer's kernel does both, where it can."""


@dataclasses.dataclass(slots=True, eq=False)
class Given:
    """What one step is given besides its gradients."""

    step: Any  # its number
    prescale: Tensor | float  # [] what turns the stored gradients into the true ones
    loss: Tensor | float | None  # [] the loss, where it was logged
    found_inf: Tensor | None  # [] above 0 where a loss scaler saw a non-finite gradient
    tolerant: bool  # whether a step may be made on non-finite gradients
    route: Route  # who skips, and who multiplies

    def kind(self) -> tuple[object, ...]:
        """What a graph depends on: which of the numbers there are, and what is done."""
        return (
            self.has_prescale(),
            self.loss is not None,
            self.found_inf is not None,
            self.tolerant,
            self.route,
        )

    def has_prescale(self) -> bool:
        """Whether there is anything to multiply by."""
        return isinstance(self.prescale, Tensor) or self.prescale != 1.0

    def buffers(self, device: torch.device) -> "Given":
        """[] float64 memory for the numbers that there are."""
        new = torch.zeros(3, dtype=torch.float64, device=device).unbind()
        return Given(
            Watched(self.step),
            new[0] if self.has_prescale() else 1.0,
            None if self.loss is None else new[1],
            None if self.found_inf is None else new[2],
            self.tolerant,
            self.route,
        )

    def send(self, given: "Given") -> None:
        """Write another step's numbers into these buffers; does not sync the host."""
        pairs = ((self.prescale, given.prescale), (self.loss, given.loss), (self.found_inf, given.found_inf))
        for buffer, value in pairs:
            if not isinstance(buffer, Tensor) or value is None:
                continue
            if isinstance(value, Tensor) and not value.is_cpu:
                buffer.copy_(value.reshape(()), non_blocking=True)
            else:  # not copied: the host may write to it before a copy arrives
                buffer.fill_(float(value))


class Watched:
    """Stands for the number of a step that is captured: a graph holds as long as comparisons with it come out alike.

    Whoever wants more of it than to compare it cannot be captured.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._found: list[tuple[Callable[[Any, Any], Any], object, object]] = []

    def holds(self, step: int) -> bool:
        """Whether all that was found of the captured step is so of this one."""
        return all(compare(step, other) == found for compare, other, found in self._found)

    def _compared(self, compare: Callable[[Any, Any], Any], other: object) -> Any:
        found = compare(self._step, other)
        self._found.append((compare, other, found))
        return found

    def _refuse(self, *_: object) -> NoReturn:
        raise UnfitError("a policy computes with the number of the step, which the host alone knows")

    __hash__ = None  # type: ignore[assignment]

    __eq__ = functools.partialmethod(_compared, operator.eq)  # as a number has them
    __lt__ = functools.partialmethod(_compared, operator.lt)
    __le__ = functools.partialmethod(_compared, operator.le)
    __gt__ = functools.partialmethod(_compared, operator.gt)
    __ge__ = functools.partialmethod(_compared, operator.ge)
    __bool__ = __int__ = __float__ = __index__ = __str__ = __format__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = _refuse
