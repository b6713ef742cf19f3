"""The best clipped policy against the unclipped one, and whether their runs began alike: what words compare."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradkeel.compare.plan import Comparison
from gradkeel.compare.run import Run
from gradkeel.compare.summary import Row, summarize
from gradkeel.compare.words import is_unclipped
from gradkeel.language import say


@dataclass(frozen=True)
class Contest:
    """The best clipped policy against the unclipped one, or against the runner-up where there is none."""

    comparison: Comparison
    rows: Sequence[Row]
    winner: Row
    rival: Row | None

    @property
    def runs(self) -> Sequence[Run]:
        """All runs that finished."""
        return self.comparison.runs

    def of(self, policy: str, lr: float | None) -> dict[int, Run]:
        """The policy's runs at this learning rate, by seed."""
        return {run.seed: run for run in self.runs if run.policy == policy and run.lr == lr}

    def seeds(self, ours: dict[int, Run], theirs: dict[int, Run]) -> list[int]:
        """The seeds that both have; one of them where a script ignores them, and so repeats itself."""
        shared = sorted(ours.keys() & theirs.keys())
        return shared[:1] if self.comparison.plan.is_command and ignores_seed(self.runs) else shared

    def wins(self) -> tuple[int, int, int]:
        """In how many seeds the winner's score is lower than the rival's, in how many higher, and of how many."""
        assert self.rival is not None
        ours = self.of(self.winner.policy, self.winner.lr)
        theirs = self.of(self.rival.policy, self.rival.lr)
        pairs = [(ours[seed].score, theirs[seed].score) for seed in self.seeds(ours, theirs)]
        return sum(a < b for a, b in pairs), sum(a > b for a, b in pairs), len(pairs)


def contest_of(comparison: Comparison) -> Contest:
    """The contest that a comparison decides.

    Raises:
        ValueError: no run has finished.
    """
    if not comparison.runs:
        raise ValueError("no run has finished, so there is nothing to say")
    rows = summarize(comparison.runs, comparison.plan.target_loss)
    clipped = [row for row in rows if not is_unclipped(row.policy)]
    unclipped = [row for row in rows if is_unclipped(row.policy)]
    winner = (clipped or rows)[0]
    rival = next((row for row in [*unclipped, *clipped[1:]] if row is not winner), None)
    return Contest(comparison, rows, winner, rival)


def first_step(run: Run) -> tuple[float, ...]:
    """What tells initial weights and first batch apart: the first loss and the first norm, which no policy changes."""
    return tuple(filter(math.isfinite, [*run.losses[:1], *run.norms[:1]]))


def ignores_seed(runs: Sequence[Run]) -> bool:
    """Whether runs of different seeds began alike, wherever there are any to compare."""
    pairs = [
        first_step(one) == first_step(other)
        for one, other in itertools.permutations(runs, 2)
        if one.seed < other.seed and (one.policy, one.lr) == (other.policy, other.lr) and first_step(one)
    ]
    return bool(pairs) and all(pairs)


def same_starts(runs: Sequence[Run]) -> bool | None:
    """Whether all policies of a seed began alike; None where no two can be compared."""
    pairs = [
        first_step(one) == first_step(other)
        for one, other in itertools.combinations(runs, 2)
        if one.seed == other.seed and first_step(one) and first_step(other) and not _is_open(one, other)
    ]
    return all(pairs) if pairs else None


def _is_open(one: Run, other: Run) -> bool:
    """Whether their first norms may differ by what another guard of the script did first: only the loss is the same."""
    if not one.is_one_of_several or one.losses[:1] != other.losses[:1]:
        return False
    return len(one.losses) > 0 and one.norms[:1] != other.norms[:1]


def starts_in_words(comparison: Comparison) -> str:
    """What is known of how the runs of a command began, where that takes something from the result; else nothing."""
    if not comparison.plan.is_command:
        return ""
    if ignores_seed(comparison.runs):
        return say(
            "The script ignores GRADKEEL_SEED: its runs of different seeds began with the same loss and norm, so they "
            "are one seed."
        )
    if same_starts(comparison.runs) is False:
        if any(run.is_one_of_several for run in comparison.runs):
            return say(
                "Policies of one seed did not begin with the same loss and norm: other guards of the script have "
                "stepped before, or it does not set its weights and batches by GRADKEEL_SEED, and then policies are "
                "not all that differs."
            )
        return say(
            "Policies of one seed did not begin with the same loss and norm: the script does not set its weights and "
            "batches by GRADKEEL_SEED, so policies are not all that differs."
        )
    return ""
