"""How long do clipping and the optimizer's step take together?"""

from functools import partial

from gradkeel.bench import Gradients, Race, race
from gradkeel.bench.contenders import GUARDED_STEP, steps

from benchmarks.speed.answer import Answer, both_sides, bound, target


def clip_and_step(gradients: Gradients, *, active: bool, rounds: int) -> Race:
    """Fused AdamW with torch's clip, under a guard, and by itself."""
    return race(steps(gradients, bound(gradients, active=active)), rounds=rounds)


def ask(rounds: int) -> Answer:
    """GPT-2 small and ResNet-50, below and above the bound."""
    timed = partial(clip_and_step, rounds=rounds)
    below, above, tables = both_sides("gpt2-small", "GPT-2 small", timed)
    targets = [
        target("clip + step, norm below the bound, to torch", 0.78, below, GUARDED_STEP),
        target("clip + step, norm above the bound, to torch", 0.90, above, GUARDED_STEP),
    ]
    return Answer([*tables, *both_sides("resnet50", "ResNet-50", timed)[2]], targets)
