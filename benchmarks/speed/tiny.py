"""And with 2,000 tiny tensors, where the calls cost more than the numbers?"""

from typing import ClassVar

import torch
from torch import Tensor

from gradkeel.bench import SHAPES, Gradients, Table
from gradkeel.bench.contenders import FUNCTION, GUARD

from benchmarks.peers import accelerate_clip, paddle_clip
from benchmarks.speed.answer import Answer, target
from benchmarks.speed.clip import clip_only


class Cold(Gradients):
    """Gradients that are no longer in the processor's cache when they are clipped."""

    block: ClassVar[Tensor] = torch.ones(64 << 20)

    def refill(self) -> None:
        """Write the gradients, then 256 MB elsewhere."""
        super().refill()
        self.block.add_(1.0)


def ask(rounds: int) -> Answer:
    """2,000 tensors of 2,100 entries."""
    warm, cold = (kind(SHAPES["tiny-tensors"]) for kind in (Gradients, Cold))
    below, above = (clip_only(warm, active=active, rounds=rounds) for active in (False, True))
    # Without optax, which compiles for half a minute.
    gone = clip_only(cold, active=False, rounds=rounds, beside=(accelerate_clip, paddle_clip))
    tables = [
        Table("In the cache, norm below the bound", below),
        Table("In the cache, norm above the bound", above),
        Table("Not in the cache, norm below the bound", gone),
    ]
    words = "2,000 tiny tensors, {}, norm below the bound, to torch"
    return Answer(tables, [target(words.format(own), 0.15, below, own) for own in (FUNCTION, GUARD)])
