"""How long do clipping and the optimizer's step take together?"""

import torch
from benchmarks.speed.answer import Answer, target

import gradkeel as gk
from gradkeel.bench import SHAPES, Contender, Gradients, Race, Table, race
from gradkeel.bench.contenders import GUARDED_STEP, guarded_step, torch_clip_and_step

ALONE = "step without clipping"


def clip_and_step(gradients: Gradients, *, active: bool, rounds: int) -> Race:
    """Fused AdamW with torch's clip, under a guard, and by itself."""
    bound = gradients.norm * (1 / 3 if active else 2)

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(gradients.parameters, lr=1e-9, fused=True)

    alone = optimizer()
    contenders = [
        torch_clip_and_step(gradients, bound, optimizer()),
        guarded_step(gradients, gk.ClipByGlobalNorm(bound), optimizer()),
        Contender(ALONE, alone.step, gradients.refill),
    ]
    return race(contenders, rounds=rounds)


def ask(rounds: int) -> Answer:
    """GPT-2 small and ResNet-50, below and above the bound."""
    tables, targets = [], []
    for name, words in (("gpt2-small", "GPT-2 small"), ("resnet50", "ResNet-50")):
        gradients = Gradients(SHAPES[name])
        below = clip_and_step(gradients, active=False, rounds=rounds)
        above = clip_and_step(gradients, active=True, rounds=rounds)
        tables += [
            Table(f"{words}, norm below the bound", below),
            Table(f"{words}, norm above the bound", above),
        ]
        if name == "gpt2-small":
            targets += [
                target("clip + step, norm below the bound, to torch", 0.78, below, GUARDED_STEP),
                target("clip + step, norm above the bound, to torch", 0.90, above, GUARDED_STEP),
            ]
    return Answer(tables, targets)
