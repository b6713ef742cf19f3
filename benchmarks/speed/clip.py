"""How long does clipping by the global norm take, by itself?"""

from collections.abc import Sequence
from types import ModuleType

from benchmarks.peers import PEERS, clips, optax_clip
from benchmarks.speed.answer import Answer, target

import gradkeel as gk
from gradkeel.bench import SHAPES, Gradients, Race, Table, race
from gradkeel.bench.contenders import FUNCTION, GUARD, guard_alone, own_clip, torch_clip
from gradkeel.bench.workload import READ


def clip_only(
    gradients: Gradients, *, active: bool, rounds: int, peers: Sequence[ModuleType] = PEERS
) -> Race:
    """All that clip, side by side; with ``active`` the norm is three times the bound."""
    bound = gradients.norm * (1 / 3 if active else 2)
    contenders = [
        torch_clip(gradients, bound),
        own_clip(gradients, bound),
        guard_alone(gradients, gk.ClipByGlobalNorm(bound)),
        *clips(gradients, bound, peers),
        gradients.read(),
    ]
    return race(contenders, rounds=rounds)


def ask(rounds: int) -> Answer:
    """GPT-2 small and ResNet-50, below and above the bound."""
    tables, targets = [], []
    for name, words in (("gpt2-small", "GPT-2 small"), ("resnet50", "ResNet-50")):
        gradients = Gradients(SHAPES[name])
        below = clip_only(gradients, active=False, rounds=rounds)
        above = clip_only(gradients, active=True, rounds=rounds)
        tables += [
            Table(f"{words}, norm below the bound", below),
            Table(f"{words}, norm above the bound", above),
        ]
        if name == "gpt2-small":
            for own in (FUNCTION, GUARD):
                targets += [
                    target(f"{own}, norm below the bound, to torch", 0.42, below, own),
                    target(f"{own}, norm below the bound, to one read", 1.1, below, own, READ),
                    target(f"{own}, norm above the bound, to torch", 0.88, above, own),
                ]
                if optax_clip.NAME in below.seconds:
                    to_optax = f"{own}, norm below the bound, to optax"
                    targets.append(target(to_optax, 0.9, below, own, optax_clip.NAME))
    return Answer(tables, targets)
