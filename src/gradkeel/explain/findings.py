"""What the experiments on a bad step showed, as a warning, a record and an explanation have it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gradkeel.language import heard, readable, say

Cause = Literal["sample", "batch", "numerics", "state", "transient", "learning_rate"]
NOTE = "autopsy."
"""How the keys begin under which a record keeps them."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """The step with one thing changed."""

    change: str  # what was changed, in words
    norm: float  # 2-norm of the gradients that came out, NaN or inf where they were not finite
    is_bad: bool  # whether the fault was still there
    loss: float = math.nan  # the mean loss that came out


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
        return str(self.words())

    def words(self) -> str:
        """It in a sentence that can be translated."""
        return say(
            "Step {step}: {size}. {what}{place}{operation}.",
            step=self.step,
            size=self._size(),
            what=self._what(),
            place=say("; first in module {module!r}", module=self.module) if self.module else "",
            operation=say(", operation {op}", op=heard(self.op)) if self.op else "",
        )

    def _size(self) -> str:
        if self.loss is not None and not math.isfinite(self.loss):
            return say("the loss was not finite")
        if self.loss is not None:
            usual = readable(self.usual_loss or 0.0)
            return say("the loss was {loss}, its usual {usual}", loss=readable(self.loss), usual=usual)
        if not math.isfinite(self.norm):
            return say("the norm was not finite")
        ratio = readable(self.norm / self.usual) if self.usual else ""
        times = say(", {ratio} times its usual", ratio=ratio) if ratio else ""
        return say("the norm was {norm}{times}", norm=readable(self.norm), times=times)

    def _what(self) -> str:
        batch = say("the batch") if self.micro is None else say("batch {micro}", micro=self.micro)
        if self.rank is not None:
            batch = say("{batch} of rank {rank}", batch=batch, rank=self.rank)
        return {
            "sample": say("Sample {sample} of {batch} does it", sample=self.sample, batch=batch),
            "batch": say("It is {batch}: another one is sound", batch=batch),
            "numerics": say("Numerics do it: weights and data are finite"),
            "learning_rate": say("The weights do it, on any batch, after the learning rate had risen"),
            "state": say("The weights do it, on any batch"),
            "transient": say(
                "The same step again was sound: hardware, or something that is not deterministic"
            ),
        }[self.cause]


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
