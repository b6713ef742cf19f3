"""What all of a run's steps came to, read from the record once."""

from gradkeel.record import Reader


class Course:
    """Numbers of the k steps of an open record, and the samples of its weights."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader  # for what is not here: norms of single parameters
        self.steps = reader.steps()
        self.totals = reader.totals()  # before clipping
        self.losses, self.rates = reader.losses(), reader.scalar("lr")  # NaN where not logged
        self.nonfinite = reader.nonfinite()  # steps with a gradient that was not finite
        self.skips = dict(reader.skips())  # in words, by the steps' numbers
        self.skip_reasons = reader.skip_reasons()
        self.samples = reader.weight_samples()  # steps [s], weight norms [s, n], update norms [s, n]

    def step(self, row: int) -> int:
        """Number of the step in a row; -1 is the last."""
        return int(self.steps[row])
