"""How long does adaptive gradient clipping take, which looks at each output unit of gradients and weights?"""

from functools import partial

import gradkeel as gk
from gradkeel.bench import SHAPES, Gradients, Table, race
from gradkeel.bench.contenders import GUARD, guard_alone

from benchmarks.peers import agc
from benchmarks.speed.answer import Answer, target

SMALL, LARGE = 1e-6, 1.0  # standard deviations of gradients that are below their bounds, and above


def ask(rounds: int) -> Answer:
    """GPT-2 small's shapes: no unit above its bound, one in ten, all of them."""
    tables, targets = [], []
    for every, words in ((0, "no unit"), (10, "one unit in ten"), (1, "every unit")):
        gradients = Gradients(SHAPES["gpt2-small"], scale=SMALL)
        for gradient in gradients.true if every else ():
            (gradient[::every] if gradient.dim() > 1 else gradient).mul_(LARGE / SMALL)
        error = partial(agc.error, gradients)
        guard = guard_alone(gradients, gk.AdaptiveGradientClip(agc.RATIO), error)
        found = race([*agc.clips(gradients), guard, gradients.read()], rounds=rounds)
        tables.append(Table(f"GPT-2 small, {words} above its bound", found))
        targets.append(target(f"AGC, {words} above its bound, to foreach operations", 0.5, found, GUARD))
    return Answer(tables, targets)
