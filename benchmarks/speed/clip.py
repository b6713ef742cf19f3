"""How long does clipping by the global norm take, by itself?"""

from collections.abc import Sequence
from functools import partial
from types import ModuleType

from gradkeel.bench import Gradients, Race, race
from gradkeel.bench.contenders import FUNCTION, GUARD, clips
from gradkeel.bench.workload import READ

from benchmarks import peers
from benchmarks.speed.answer import Answer, both_sides, bound, target


def clip_only(
    gradients: Gradients, *, active: bool, rounds: int, beside: Sequence[ModuleType] = peers.PEERS
) -> Race:
    """All that clip, side by side; with ``active`` the norm is three times the bound."""
    limit = bound(gradients, active=active)
    return race([*clips(gradients, limit), *peers.clips(gradients, limit, beside)], rounds=rounds)


def ask(rounds: int) -> Answer:
    """GPT-2 small and ResNet-50, below and above the bound."""
    timed = partial(clip_only, rounds=rounds)
    below, above, tables = both_sides("gpt2-small", "GPT-2 small", timed)
    targets, optax = [], peers.optax_clip.NAME
    for own in (FUNCTION, GUARD):
        words = f"{own}, norm below the bound, to"
        targets += [
            target(f"{words} torch", 0.42, below, own),
            target(f"{words} one read", 1.1, below, own, READ),
            target(f"{own}, norm above the bound, to torch", 0.88, above, own),
        ]
        if optax in below.seconds:
            targets.append(target(f"{words} optax", 0.9, below, own, optax))
    return Answer([*tables, *both_sides("resnet50", "ResNet-50", timed)[2]], targets)
