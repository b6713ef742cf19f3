"""And with gradients in bfloat16?"""

import torch

from gradkeel.bench import SHAPES, Gradients, Table
from gradkeel.bench.contenders import GUARDED_STEP

from benchmarks.speed.answer import Answer, target
from benchmarks.speed.clip import clip_only
from benchmarks.speed.step import clip_and_step


def ask(rounds: int) -> Answer:
    """GPT-2 small's shapes, clip only and with the step."""
    gradients = Gradients(SHAPES["gpt2-small"], dtype=torch.bfloat16)
    tables, targets = [], []
    for active, words in ((False, "norm below the bound"), (True, "norm above the bound")):
        both = clip_and_step(gradients, active=active, rounds=rounds)
        tables += [
            Table(f"Clip only, {words}", clip_only(gradients, active=active, rounds=rounds)),
            Table(f"Clip and step, {words}", both),
        ]
        if active:
            targets.append(target(f"bfloat16, clip + step, {words}, to torch", 0.95, both, GUARDED_STEP))
    return Answer(tables, targets)
