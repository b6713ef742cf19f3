"""The best clipped policy against the unclipped one: what the words under the table compare."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradkeel.compare.plan import Comparison
from gradkeel.compare.run import Run
from gradkeel.compare.starts import ignores_seed
from gradkeel.compare.summary import Row, summarize
from gradkeel.compare.words import is_unclipped


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
