"""What the experiments on a bad step showed, as a warning, a record and an explanation have it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gradkeel.explain.readable import readable

Cause = Literal["sample", "batch", "numerics", "state", "transient", "learning_rate"]
NOTE = "autopsy."
"""How the keys begin under which a record keeps them."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """The step with one thing changed.

    Attributes:
        change: what was changed, in words.
        norm: 2-norm of the gradients that came out, NaN or inf where they were not finite.
        is_bad: whether the fault was still there.
        loss: the mean loss that came out.
    """

    change: str
    norm: float
    is_bad: bool
    loss: float = math.nan


@dataclass(frozen=True, slots=True)
class AutopsyResult:
    """What the experiments on a bad step showed.

    Attributes:
        step: its number.
        cause: "sample": one sample of the batch; "batch": this batch, as a whole; "numerics": an operation that left
            its range on sound weights and data; "learning_rate": the weights, after the learning rate had risen;
            "state": the weights, whatever the batch; "transient": the same step again was sound.
        sample: index of the bad sample in the batch, or None.
        module: name of the first module whose output was not finite, or ten times its usual, or None.
        op: the first operation that gave a non-finite number from finite ones, or None.
        norm: of the gradients as the step saw them.
        usual: the median norm of the steps before, or None.
        experiments: what was changed, and what came out, in order.
        micro: index of the bad batch among the several of this step, or None.
        rank: the rank whose batch it was, or None.
        loss, usual_loss: of the step, and the median before, where the loss was the alarm; else None.
    """

    step: int
    cause: Cause
    sample: int | None
    module: str | None
    op: str | None
    norm: float
    usual: float | None
    experiments: tuple[Experiment, ...]
    micro: int | None = None
    rank: int | None = None
    loss: float | None = None
    usual_loss: float | None = None

    def __str__(self) -> str:
        """It in words."""
        size = "the norm was not finite"
        if self.loss is not None and not math.isfinite(self.loss):
            size = "the loss was not finite"
        elif self.loss is not None:
            size = f"the loss was {readable(self.loss)}, its usual {readable(self.usual_loss or 0.0)}"
        elif math.isfinite(self.norm):
            times = f", {readable(self.norm / self.usual)} times its usual" if self.usual else ""
            size = f"the norm was {readable(self.norm)}{times}"
        batch = "" if self.micro is None else f" {self.micro}"
        batch += "" if self.rank is None else f" of rank {self.rank}"
        what = {
            "sample": f"Sample {self.sample} of {f'batch{batch}' if batch else 'the batch'} does it",
            "batch": f"{f'Batch{batch}' if batch else 'This batch'} does it: another one is sound",
            "numerics": "Numerics do it: weights and data are finite",
            "learning_rate": "The weights do it, on any batch, after the learning rate had risen",
            "state": "The weights do it, on any batch",
            "transient": "The same step again was sound: hardware, or something that is not deterministic",
        }[self.cause]
        place = f"; first in module {self.module!r}" if self.module else ""
        return f"Step {self.step}: {size}. {what}{place}{f', operation {self.op}' if self.op else ''}."


def of_note(note: Mapping[str, Any]) -> AutopsyResult:
    """A result as a record holds it."""
    experiments = tuple(
        Experiment(str(e["change"]), _number(e["norm"]), bool(e["is_bad"]), _number(e.get("loss")))
        for e in note["experiments"]
    )
    told = {**note, "norm": _number(note["norm"]), "experiments": experiments}
    if told.get("usual_loss") is not None:
        told["loss"] = _number(note["loss"])
    return AutopsyResult(**told)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
