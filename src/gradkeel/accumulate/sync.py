"""When a distributed model exchanges gradients, and what its ranks' windows weigh together."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class GradientSync:
    """Puts a distributed model's gradient exchange off to a window's last micro-batch.

    Args:
        model: a DistributedDataParallel model (``no_sync`` must go around forward and backward), an FSDP2 one
            (``set_requires_gradient_sync``), or any other module or None, where there is nothing to exchange.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model: Any = model

    @property
    def is_needed(self) -> bool:
        """Whether gradients are exchanged, so that a micro-batch must know at its start whether it is the last."""
        return hasattr(self._model, "no_sync") or hasattr(self._model, "set_requires_gradient_sync")

    def around(self, *, last: bool) -> AbstractContextManager[Any]:
        """The context for forward and backward of one micro-batch."""
        if hasattr(self._model, "set_requires_gradient_sync"):
            self._model.set_requires_gradient_sync(last)
        elif hasattr(self._model, "no_sync") and not last:
            context: AbstractContextManager[Any] = self._model.no_sync()
            return context
        return nullcontext()

    @property
    def ranks(self) -> int:
        """By how many ranks the backend has divided the gradients' sum."""
        return torch.distributed.get_world_size(self.process_group) if self.is_needed else 1

    def largest(self, weight: float, device: torch.device) -> float:
        """The largest such weight of all ranks, on all of them; syncs the host."""
        if not self.is_needed:
            return weight
        largest = torch.tensor(weight, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self.process_group)
        return float(largest)

    @property
    def process_group(self) -> Any:
        """The ranks between which gradients are exchanged."""
        return getattr(self._model, "process_group", None)
