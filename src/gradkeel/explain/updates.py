"""Updates that overwrite the weights they change: what a learning rate that is far too high does first."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE, USUAL = 0.3, 0.1
"""An update of this share of the weights is no step any more; up to this one it may be."""
TIMES = 10.0
FEWEST = 8


@dataclass(frozen=True, slots=True)
class Overwrite:
    """An update as large as the weights, after updates had been small.

    Attributes:
        step: at which it was made.
        last_step: the last measured one of its kind.
        ratio: norm of the whole update over that of all weights.
        before: the usual such ratio before.
        parameters: whose update was larger than their weights, largest first, with the ratio.
        lasts: whether updates were still so large when last measured.
    """

    step: int
    last_step: int
    ratio: float
    before: float
    parameters: tuple[tuple[str, float], ...]
    lasts: bool


def find_overwrites(names: tuple[str, ...], samples: tuple[Tensor, Tensor, Tensor]) -> list[Overwrite]:
    """All of them, in order.

    Args:
        names: of the n parameters.
        samples: steps [s], weight norms [s, n], update norms [s, n], NaN where not measured.
    """
    steps, weights, updates = samples
    measured = ~updates.isnan().all(dim=1) & torch.isfinite(weights).all(dim=1)
    steps, weights, updates = steps[measured], weights[measured], updates[measured]
    whole = torch.linalg.vector_norm(updates.nan_to_num(nan=math.inf), dim=1)
    ratios = whole / torch.linalg.vector_norm(weights, dim=1)
    found: list[Overwrite] = []
    row = FEWEST
    while row < len(ratios):
        before = float(ratios[:row].median())
        if not (float(ratios[row]) > max(LARGE, TIMES * before) and before < USUAL):
            row += 1
            continue
        small = (ratios[row:] < USUAL).nonzero()
        stop = row + int(small[0]) if len(small) else len(ratios)
        own = updates[row] / weights[row]
        larger = [(float(own[j]), names[j]) for j in range(len(names)) if weights[row, j] > 0 and own[j] > 1]
        found.append(
            Overwrite(
                step=int(steps[row]),
                last_step=int(steps[stop - 1]),
                ratio=float(ratios[row]),
                before=before,
                parameters=tuple((name, ratio) for ratio, name in sorted(larger, reverse=True)),
                lasts=stop == len(ratios),
            )
        )
        row = stop
    return found
