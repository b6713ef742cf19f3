"""The sums of one window: how many micro-batches, what they weigh, what they lose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradkeel.errors import WindowError
from gradkeel.measure import wide_dtype


@dataclass(slots=True, eq=False)
class OpenWindow:
    """What has been accumulated since the last step.

    Attributes:
        count: micro-batches so far.
        is_open: between the end of the first micro-batch and the step.
        is_complete: no micro-batch follows.
        broken: what left it half done, in words.
        cause: the exception behind that, where it is not raised already.
        weight: of this rank's micro-batches.
        total: of all ranks', once the window is complete.
        loss: [] sum of the losses of this rank; None where nobody told any.
        weighs: whether the micro-batches have weights of their own; None before the first.
        has_logged: whether the guard has been told the mean loss, for the step.
    """

    count: int = 0
    is_open: bool = False
    is_complete: bool = False
    broken: str | None = None
    cause: Exception | None = None
    weight: Tensor | float = 0.0
    total: Tensor | float = 0.0
    loss: Tensor | None = None
    weighs: bool | None = None
    has_logged: bool = False

    @classmethod
    def loaded(cls, state: Mapping[str, Any]) -> "OpenWindow":
        """The window that ``saved`` gave."""
        count, weight = int(state["count"]), state["weight"]
        return cls(
            count=count,
            is_open=count > 0,
            is_complete=bool(state["is_complete"]),
            weight=weight,
            loss=state["loss"],
            weighs=state["weighs"],
        )

    def saved(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""
        return {
            "count": self.count,
            "is_complete": self.is_complete,
            "weight": self.weight,
            "weighs": self.weighs,
            "loss": self.loss,
        }

    def add(self, loss: Tensor | None, weight: Tensor | float | None) -> None:
        """Take in the sum of a micro-batch's losses, and its weight; None counts each micro-batch alike."""
        if self.weighs is not None and self.weighs != (weight is not None):
            raise WindowError(
                "weight=None counts each micro-batch alike, and cannot be mixed with weights in one window; give every "
                "micro-batch its number of items"
            )
        self.weighs = weight is not None
        self.weight = self.weight + (1.0 if weight is None else weight)
        if loss is not None:
            self.loss = loss if self.loss is None else self.loss + loss

    def mean_loss(self) -> Tensor | None:
        """[] mean loss of this rank's items; 0 without items."""
        return None if self.loss is None else self.loss / _nonzero(self.weight)

    def factor(self, scale: float, device: torch.device) -> Tensor | float:
        """[] ``scale / total``, or 0 for an empty window."""
        if isinstance(self.total, Tensor):
            total = self.total.to(device, wide_dtype(device))
            return torch.where(total > 0, scale / _nonzero(total), torch.zeros_like(total))
        return scale / self.total if self.total > 0 else 0.0


def _nonzero(weight: Tensor | float) -> Tensor | float:
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, torch.ones_like(weight), weight)
    return weight or 1.0
