"""How each optimizer skips a step: parameters, moments and counters stay bit-identical."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer


def clear_gradients(parameters: Sequence[Tensor]) -> None:
    """Set every gradient to None: every torch optimizer then leaves parameters, state and counters alone.

    Multiplying by 0 would not do (0 x NaN is NaN), nor would zero gradients (weight decay and momentum still act).
    """
    for parameter in parameters:
        parameter.grad = None


def moves_between_closures(optimizer: Optimizer) -> bool:
    """Whether the optimizer changes parameters between the evaluations of one step's closure."""
    return isinstance(optimizer, LBFGS)


class Snapshot:
    """Parameters and state before a step, for optimizers that have moved before a later closure goes non-finite.

    Attributes:
        is_wanted: whether the step was abandoned, so that this is to be restored after it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.is_wanted = False
        self._optimizer = optimizer
        self._values = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        self._state: dict[Any, Any] = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit by bit."""
        for parameter, value in self._values:
            parameter.copy_(value)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
