"""Two bounds exactly as their papers print them, for comparison; the recipes take them under ``reference=True``.

Both feed their statistics with norms that they have clipped themselves, so after a shift of the norm they may clip
every step for thousands of steps, and neither starts afresh. What is not finite stays out of them all the same.
"""

import math
from dataclasses import dataclass

import torch

from gradkeel.norms import State
from gradkeel.policies.bounds.base import Bound
from gradkeel.policies.numbers import Memory, Number, constant, divide, maximum, minimum, sqrt, where
from gradkeel.policies.scopes import Cells


@dataclass(frozen=True)
class PublishedZScore(Bound, on_numbers=True):
    """ZClip's bound: above ``mean + z std`` a norm is clipped to ``mean + z^2 std (std + eps) / (n - mean)``.

    Mean and population variance of the first ``warmup`` norms, then running averages of clipped norms, the variance
    about the new mean.

    State: ``seen`` [k] int64, ``mean`` [k], ``variance`` [k].

    Source:
        Kumar, Owen, Chowdhury, Güra, "ZClip: Adaptive spike mitigation for LLM pre-training", 2025.
    """

    z: float
    decay: float
    warmup: int
    eps: float = 1e-6

    def init(self, cells: Cells) -> State:
        zeros = torch.zeros_like(cells.norms)
        return {"seen": zeros.to(torch.int64), "mean": zeros, "variance": zeros}

    def bound(self, cells: Cells, state: Memory) -> Number:
        """Return [k] inf during the warm-up, then the norm that is left of the one at hand."""
        mean, std = state["mean"], sqrt(state["variance"])
        score = divide(cells.norms - mean, std + self.eps)
        reduced = mean + divide(self.z * std, score / self.z)
        limit = where(score > self.z, reduced, maximum(mean + self.z * (std + self.eps), cells.norms))
        return where(state["seen"] >= self.warmup, limit, math.inf)

    def update(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        mean, variance, seen = state["mean"], state["variance"], state["seen"] + 1
        fed = minimum(cells.norms, bound)
        early = mean + (fed - mean) / seen
        early_variance = variance + ((fed - mean) * (fed - early) - variance) / seen
        late = self.decay * mean + (1 - self.decay) * fed
        late_variance = self.decay * variance + (1 - self.decay) * (fed - late) * (fed - late)
        warm = seen <= self.warmup
        return {
            "seen": seen,
            "mean": where(warm, early, late),
            "variance": where(warm, early_variance, late_variance),
        }


@dataclass(frozen=True)
class PublishedEma(Bound, on_numbers=True):
    """AdaGC's bound: ``ratio`` times a running average of the cell's own clipped norms.

    Before step ``warmup`` all cells are clipped together to ``warmup_norm``, and the average is the smallest clipped
    norm so far; from then on ``gamma <- decay * gamma + (1 - decay) * coefficient * n``.

    State: ``seen`` [k] int64, ``gamma`` [k].

    Source:
        Wang et al., "AdaGC: Improving training stability for large language model pretraining", 2025, algorithm 1.
    """

    ratio: float
    decay: float
    warmup: int
    warmup_norm: float

    def init(self, cells: Cells) -> State:
        return {
            "seen": torch.zeros_like(cells.norms, dtype=torch.int64),
            "gamma": torch.full_like(cells.norms, math.inf),
        }

    def bound(self, cells: Cells, state: Memory) -> Number:
        """Return [k] what clipping all cells together leaves of each, in the warm-up; then the multiple of gamma."""
        shared = minimum(divide(constant(self.warmup_norm, cells.total), cells.total), 1.0)
        shared = where(cells.total < math.inf, shared, 1.0)
        together = cells.norms * shared
        return where(state["seen"] + 1 < self.warmup, together, self.ratio * state["gamma"])

    def update(self, cells: Cells, state: Memory, bound: Number) -> Memory:
        gamma, clipped = state["gamma"], minimum(cells.norms, bound)
        warm = state["seen"] + 1 < self.warmup
        late = self.decay * gamma + (1 - self.decay) * clipped
        return {"seen": state["seen"] + 1, "gamma": where(warm, minimum(gamma, clipped), late)}
