"""Whether runs began alike: what a script of the user's own does with its seed, seen from its first step."""

import math
from collections.abc import Sequence

from gradkeel.compare.plan import Comparison
from gradkeel.compare.run import Run
from gradkeel.language import say


def first_step(run: Run) -> tuple[float, ...]:
    """What tells initial weights and first batch apart: the first loss and the first norm, which no policy changes."""
    firsts = [*run.losses[:1], *run.norms[:1]]
    return tuple(value for value in firsts if math.isfinite(value))


def ignores_seed(runs: Sequence[Run]) -> bool:
    """Whether runs of different seeds began alike, wherever there are any to compare."""
    pairs = [
        first_step(one) == first_step(other)
        for one in runs
        for other in runs
        if one.seed < other.seed and (one.policy, one.lr) == (other.policy, other.lr) and first_step(one)
    ]
    return bool(pairs) and all(pairs)


def same_starts(runs: Sequence[Run]) -> bool | None:
    """Whether all policies of a seed began alike; None where no two can be compared."""
    pairs = [
        first_step(one) == first_step(other)
        for i, one in enumerate(runs)
        for other in runs[i + 1 :]
        if one.seed == other.seed and first_step(one) and first_step(other)
    ]
    return all(pairs) if pairs else None


def in_words(comparison: Comparison) -> str:
    """What is known of how the runs of a command began, where that takes something from the result; else nothing."""
    if not comparison.plan.is_command:
        return ""
    if ignores_seed(comparison.runs):
        return say(
            "The script ignores GRADKEEL_SEED: its runs of different seeds began with the same loss and norm, so they "
            "are one seed."
        )
    if same_starts(comparison.runs) is False:
        return say(
            "Policies of one seed did not begin with the same loss and norm: the script does not set its weights and "
            "batches by GRADKEEL_SEED, so policies are not all that differs."
        )
    return ""
