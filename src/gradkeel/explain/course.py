"""What all of a run's steps came to, read from the record once."""

from dataclasses import dataclass

from torch import Tensor

from gradkeel.explain.weights import Jump, find_jumps
from gradkeel.guard import SkipReason
from gradkeel.record import Reader


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """One number a step, and the samples of the weights.

    Attributes:
        reader: for what is not here: norms of single parameters.
        steps: [k] numbers of the steps.
        totals: [k] main norms before clipping.
        losses, rates: [k] loss and learning rate, NaN where not logged.
        nonfinite: [k] bool: steps with a gradient that was not finite.
        skips: why steps were skipped, in words, by number.
        skip_reasons: the same as one of a few reasons.
        samples: steps [s], weight norms [s, n], update norms [s, n].
        jumps: weights that changed without an update.
    """

    reader: Reader
    steps: Tensor
    totals: Tensor
    losses: Tensor
    rates: Tensor
    nonfinite: Tensor
    skips: dict[int, str]
    skip_reasons: dict[int, SkipReason]
    samples: tuple[Tensor, Tensor, Tensor]
    jumps: tuple[Jump, ...]

    @classmethod
    def read(cls, reader: Reader) -> "Course":
        """The course of an open record."""
        samples = reader.weight_samples()
        return cls(
            reader=reader,
            steps=reader.steps(),
            totals=reader.totals(),
            losses=reader.losses(),
            rates=reader.scalar("lr"),
            nonfinite=reader.nonfinite(),
            skips=dict(reader.skips()),
            skip_reasons=reader.skip_reasons(),
            samples=samples,
            jumps=tuple(find_jumps(reader, samples)),
        )

    def step(self, row: int) -> int:
        """Number of the step in a row."""
        return int(self.steps[row])
