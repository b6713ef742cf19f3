"""Where the loss leaves its own past; during training, for an autopsy, and in a record."""

from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)
PAST = 32
FEWEST = PAST // 2
_ROSE, _LOST = 3.0, 0.3
_HOP = 8  # steps after which the past is looked at anew
_CALM, _ONE_EVENT = 5, 20


def loss_rises(usual: Number, highest: Number, first: float) -> tuple[Number, Number, Number]:
    """A loss is an alarm that is above ``usual`` by more than each of these: by far the highest, and much is lost.

    Args:
        usual, highest: median and maximum of the last losses.
        first: the run's first loss.
    """
    return _ROSE * (highest - usual), abs(usual), _LOST * (first - usual)


def find_losses(losses: Tensor) -> list[tuple[int, bool]]:
    """Row at which the loss left its past, and whether it came back, of each time; in order.

    Args:
        losses: [k] loss of each step, NaN where not known.
    """
    known = losses[torch.isfinite(losses)]
    if len(known) <= FEWEST:
        return []
    before = torch.cat([losses.new_full((PAST,), torch.nan), losses]).unfold(0, PAST, _HOP)
    before = torch.where(torch.isfinite(before), before, torch.nan)
    enough = (~before.isnan()).sum(dim=1) >= FEWEST
    highest = before.nan_to_num(nan=-torch.inf).amax(dim=1)
    usual = before.nanmedian(dim=1).values
    limits = usual + torch.stack(loss_rises(usual, highest, float(known[0]))).amax(dim=0)
    limits = torch.where(enough, limits, torch.inf).repeat_interleave(_HOP)[: len(losses)]
    rows = (losses > limits).nonzero().flatten().tolist()
    starts = rows[:1] + [b for a, b in pairwise(rows) if b - a > _ONE_EVENT]
    return [(row, _is_over(losses[row + 1 :], float(limits[row]))) for row in starts]


def _is_over(later: Tensor, limit: float) -> bool:
    """Whether it stayed below for a few steps."""
    calm = later[torch.isfinite(later)] <= limit
    return len(calm) >= _CALM and bool(calm.unfold(0, _CALM, 1).all(dim=1).any())
