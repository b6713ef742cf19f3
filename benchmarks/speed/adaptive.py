"""Do policies that learn their bound cost more than a constant one?"""

import math
from functools import partial

import gradkeel as gk
from gradkeel import policies as gp
from gradkeel.bench import SHAPES, Gradients, Table, race
from gradkeel.bench.contenders import guard_alone

from benchmarks.speed.answer import Answer, target

POLICIES = (
    gp.AutoClip(),
    gp.QuantileClip(),
    gp.ZClip(),
    gp.ZClip(scope="tensor"),
    gp.RobustClip(),
    gp.AdaGC(),
    gp.SkipStep(),
)


def ask(rounds: int) -> Answer:
    """GPT-2 small's shapes; norms stay the same, so that nothing is above its bound."""
    gradients = Gradients(SHAPES["gpt2-small"], scale=1e-5)
    unclipped = partial(gradients.error, math.inf)
    constant = guard_alone(gradients, gk.ClipByGlobalNorm(2 * gradients.norm), unclipped, "global-norm")
    own = [guard_alone(gradients, policy, unclipped, policy.spec) for policy in POLICIES]
    found = race([constant, *own], rounds=rounds)
    targets = [target(f"{policy.spec}, to a constant bound", 1.05, found, policy.spec) for policy in POLICIES]
    return Answer([Table("GPT-2 small, a guard alone", found)], targets)
