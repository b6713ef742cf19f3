"""What one optimizer step came to: lazy over device tensors, so that making a report costs nothing until it is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from gradkeel.language import count
from gradkeel.norms import Decision, GradientNorms
from gradkeel.outcome import Outcome


class SkipReason(Enum):
    """Why a step was not made."""

    NONFINITE = "nonfinite"
    """A gradient is NaN or inf."""
    LOSS_SCALE = "loss_scale_overflow"
    """A gradient is NaN or inf under a loss scale, which the scaler lowers."""
    NO_GRADIENT = "no_gradient"
    """No parameter has a gradient."""
    EMPTY_WINDOW = "empty_window"
    """The accumulation window's weight is zero."""
    POLICY = "policy"
    """The policy asked for it; the gradients are sound, and its statistics go on."""

    def words(self, step: int, place: str | None = None) -> str:
        """The reason as a sentence; ``place`` names the parameter whose gradient is not finite, where it is known."""
        if self is SkipReason.NONFINITE:
            return place or f"step {step}: a gradient is not finite"
        if self is SkipReason.LOSS_SCALE:
            return f"step {step}: the loss scale overflowed" + (f" ({place})" if place else "")
        return _WORDS[self]

    @classmethod
    def of_words(cls, words: str) -> "SkipReason":
        """The reason that a sentence of `words` gives; records of the first schema hold nothing else."""
        if "the loss scale overflowed" in words:
            return cls.LOSS_SCALE
        return next((why for why, own in _WORDS.items() if own == words), cls.NONFINITE)


_WORDS = {
    SkipReason.NO_GRADIENT: "no parameter has a gradient",
    SkipReason.EMPTY_WINDOW: "the window's weight is zero",
    SkipReason.POLICY: "the policy asked to skip this step",
}


def nonfinite_words(report: "StepReport", norms: Sequence[float], loss: Tensor | float | None) -> str | None:
    """Where non-finite gradients begin, in words; None where all are finite.

    Backward runs from the model's end to its beginning, and what is not finite makes everything after it so. So it
    began at the last parameter of the model's order that is hit; where all are, it came with the loss, or the batch.
    Not so where the loss was finite: it began before the first parameter, or one gradient has spoiled all, as a clip
    by the total norm does, or the ranks' mean; but under a loss scale what overflows is another loss than is logged.

    ``norms`` are those of the parameters' gradients, selection after selection; a logged ``loss`` on an accelerator is
    waited for, where all gradients are hit.
    """
    step = report.step
    columns = [(one, i) for one in report.selections for i in range(len(one.measured.names))]
    held = [
        (one.order[i] if one.order else i, norm, one, one.measured.names[i])
        for (one, i), norm in zip(columns, norms, strict=True)
        if one.present[i] or norm != 0
    ]
    hit = [row for row in held if not math.isfinite(row[1])]
    if not hit:
        return None
    _, norm, one, name = max(hit, key=lambda row: row[0])
    kind, where = "NaN" if math.isnan(norm) else "inf", one.place_of(name)
    if len(hit) == len(held) > 1:
        cause = "it came with the loss"
        if report.why is not SkipReason.LOSS_SCALE and loss is not None and math.isfinite(loss):
            cause = (
                "the loss was finite, so it came with the start of backward, another clip, or another rank"
            )
        return f"step {step}: all {len(hit)} gradients are not finite ({kind}){where}: {cause}"
    return f"step {step}: the gradient of {name!r} is not finite ({kind}){where}"


@dataclass(slots=True, eq=False, repr=False)
class SelectionReport:
    """What one policy did to its selection of parameters in one step. Reading a number syncs the host.

    Attributes:
        label: "main", "group 0", ..., or "excluded".
        policy: the policy's repr, or "None" where gradients were only measured.
        measured: the norms of the true gradients, before clipping.
        decision: what was applied; empty where the host knows that the step was skipped.
        present: which of the parameters had a gradient.
        remeasure: measures the norm after a clamp; None from it once the gradients are gone or changed.
        locate: on which rank the gradient of the parameter of an index is not finite, in words.
        order: the parameters' places in the model, or in the optimizer where there is no model; () as they stand.
    """

    label: str
    policy: str
    measured: GradientNorms
    decision: Decision
    present: tuple[bool, ...]
    remeasure: Callable[[], Tensor | None] | None = None
    locate: Callable[[int], str] | None = None
    order: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold what was measured, and cannot measure again."""
        held = (self.label, self.policy, self.measured, self.decision, self.present)
        return type(self), (*held, None, None, self.order)

    @property
    def outcome(self) -> Outcome:
        """What the decision did to the norms, as tensors; does not sync the host."""
        return Outcome(self.measured, self.decision)

    @property
    def norm(self) -> float:
        """Norm of the selection's true gradients, before clipping."""
        return float(self.measured.known_total)  # without making a tensor of what the host knows

    @property
    def norms(self) -> dict[str, float]:
        """Norm of each parameter's true gradient; parameters without a gradient, on any rank, are not listed."""
        values = self.measured.norms.tolist()
        return {
            name: value
            for name, value, here in zip(self.measured.names, values, self.present, strict=True)
            if here or value != 0
        }

    def place_of(self, name: str) -> str:
        """On which rank the gradient of a parameter is not finite, in words; empty where there are no ranks."""
        return "" if self.locate is None else self.locate(self.measured.names.index(name))

    @property
    def coefficient(self) -> float:
        """What the gradients were multiplied by; the smallest one where parameters or units have their own."""
        return self.outcome.coefficient()

    @property
    def coefficients(self) -> dict[str, float]:
        """What each parameter's gradient was multiplied by; the smallest one of its units under the unit scope."""
        return dict(zip(self.measured.names, self.outcome.coefficients().tolist(), strict=True))

    @property
    def clipped(self) -> bool:
        """Whether any of the selection's gradients was made smaller."""
        return bool(self.outcome.is_clipped())

    @property
    def clipped_norm(self) -> float | None:
        """Norm of the selection's gradients after clipping.

        Under the value scope it is measured when read, and None once the gradients are cleared or changed.
        """
        if self.decision.clamp is not None and not self.outcome.factors and not self.clipped:
            return self.norm
        total = self.clipped_total()
        return None if total is None else float(total)

    def clipped_total(self) -> Tensor | None:
        """[] the same as a tensor; does not sync the host. Under the value scope it is measured now, clipped or not."""
        if self.decision.clamp is None:
            return self.outcome.total()
        return None if self.remeasure is None else self.remeasure()

    def __repr__(self) -> str:
        return (
            f"{self.label}: {self.policy}: norm {self.norm:.6g}, coefficient {self.coefficient:.6g}, "
            f"{count(len(self.measured.names), '{n:,} parameter', '{n:,} parameters')}"
        )


@dataclass(slots=True, eq=False, repr=False)
class StepReport:
    """The row of one ``optimizer.step()``. Reading a number syncs the host, so read it outside the hot loop.

    ``norm``, ``clipped_norm``, ``coefficient`` and ``clipped`` are the main policy's; each other policy's are in
    ``selections``.

    Attributes:
        step: number of the step, from 1; skipped steps count. 0 before the first.
        given: the selections' reports, or what makes them when somebody looks.
        prescale: [] what gradients were multiplied by besides clipping: 1 / (loss scale x window weight).
        scalars: what ``guard.log`` was told before this step, such as the loss.
        stepped_or_pending: whether the step was made; a [] bool tensor where only the device knows yet. Does not sync.
        why: what the host skipped the step for; None where it was made, or only the device knows.
        overflowed: tells whether a loss scale is to blame, where the device skips by itself; waits for the device.
    """

    step: int
    given: tuple[SelectionReport, ...] | Callable[[], tuple[SelectionReport, ...]]
    prescale: Tensor | float = 1.0
    scalars: Mapping[str, Tensor | float] = field(default_factory=dict)
    stepped_or_pending: bool | Tensor = True
    why: SkipReason | None = None
    overflowed: Callable[[], bool] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the selections' reports themselves."""
        return type(self), (
            self.step, self._settled(), self.prescale, self.scalars, self.stepped_or_pending, self.told_why(),
        )  # fmt: skip

    @property
    def selections(self) -> tuple[SelectionReport, ...]:
        """The main policy's report, then those of parameter groups with their own, then of the excluded."""
        if callable(self.given):
            self.given = self.given()
        return self.given

    def forget_decisions(self) -> None:
        """Nothing was applied, for the step was skipped; the bounds stay."""
        for selection in self.selections:
            bound: Any = selection.decision.known_bound
            if bound is None or (isinstance(bound, Tensor) and not bound.numel()):
                bound = selection.outcome.bound()
            selection.decision = Decision(bound=bound)

    def _settled(self) -> tuple[SelectionReport, ...]:
        """The selections' reports, without what was decided for a step that the device has skipped; syncs the host."""
        if isinstance(self.stepped_or_pending, Tensor) and not self.stepped:
            self.forget_decisions()
        return self.selections

    @property
    def norm_type(self) -> float:
        """The p of the norm that the main policy looks at."""
        return self.selections[0].measured.norm_type

    @property
    def norm(self) -> float:
        """Norm of the true gradients before clipping."""
        return self.selections[0].norm

    @property
    def clipped_norm(self) -> float | None:
        """Norm of the gradients after clipping."""
        return self._settled()[0].clipped_norm

    @property
    def coefficient(self) -> float:
        """What clipping multiplied the gradients by; the smallest one where parameters have their own."""
        return self._settled()[0].coefficient

    @property
    def clipped(self) -> bool:
        """Whether the main policy made any gradient smaller."""
        return self._settled()[0].clipped

    @property
    def stepped(self) -> bool:
        """Whether the optimizer made its step; False where it was skipped."""
        return bool(self.stepped_or_pending)

    @property
    def skip_reason(self) -> SkipReason | None:
        """Why the step was skipped; None where it was made, and before the first."""
        if self.stepped or self.step == 0:
            return None
        if (why := self.told_why()) is not None:
            return why
        return SkipReason.POLICY if self.nonfinite_reason() is None else SkipReason.NONFINITE

    def told_why(self) -> SkipReason | None:
        """Why the step was skipped, as the host or a loss scaler says; None where that follows from the norms."""
        asks = self.overflowed  # which another thread may settle meanwhile
        if self.why is None and asks is not None and asks():
            self.why = SkipReason.LOSS_SCALE
        return self.why

    @property
    def reason(self) -> str | None:
        """Why the step was skipped, with the parameter's name; None where it was made."""
        if self.step == 0:
            return "no step yet"
        why = self.skip_reason
        return None if why is None else why.words(self.step, self.nonfinite_reason())

    def nonfinite_reason(self) -> str | None:
        """Where non-finite gradients begin, in words; None where all are finite."""
        norms = [norm for selection in self.selections for norm in selection.measured.norms.tolist()]
        return nonfinite_words(self, norms, self.scalars.get("loss"))

    def stepped_tensor(self) -> Tensor:
        """[] bool: whether the optimizer made its step, without syncing the host."""
        if isinstance(self.stepped_or_pending, Tensor):
            return self.stepped_or_pending
        return torch.tensor(self.stepped_or_pending, device="cpu")

    @property
    def norms(self) -> dict[str, float]:
        """Norm of every parameter's true gradient, excluded ones included, by name."""
        return {name: norm for selection in self.selections for name, norm in selection.norms.items()}

    def to_pandas(self) -> Any:
        """Parameter, selection, norm and coefficient of each parameter as a pandas DataFrame; syncs the host."""
        import pandas as pd

        rows = [
            (name, selection.label, norm, coefficients[name])
            for selection in self._settled()
            for coefficients in [selection.coefficients]
            for name, norm in selection.norms.items()
        ]
        return pd.DataFrame(rows, columns=["parameter", "selection", "norm", "coefficient"])

    def __repr__(self) -> str:
        kind = "inf-norm" if math.isinf(self.norm_type) else f"{self.norm_type:g}-norm"
        after = self.clipped_norm
        words = [
            f"step {self.step}",
            f"{kind} {self.norm:.6g}" + (f" -> {after:.6g}" if self.clipped and after is not None else ""),
            f"coefficient {self.coefficient:.6g}",
            "clipped" if self.clipped else "not clipped",
            "stepped" if self.stepped else f"SKIPPED: {self.reason}",
        ]
        return f"StepReport({', '.join(words)})"

    def _repr_html_(self) -> str:
        """The step as a table, for notebooks."""
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{norm:.6g}</td></tr>" for name, norm in self.norms.items()
        )
        return f"<p>{escape(repr(self))}</p><table><tr><th>parameter</th><th>norm</th></tr>{rows}</table>"


class Recorder(Protocol):
    """Whoever wants to be told of every step: a file, a tracker, a test.

    ``record`` is called after each optimizer step, skipped ones included, on the training thread; one that raises is
    dropped with a `RecordWarning`. It should not read the report's numbers at once, for that syncs the host on an
    accelerator. A method ``before_step``, where there is one, is called when the step has been decided.
    """

    def record(self, report: StepReport) -> None:
        """Take note of one step."""

    def close(self) -> None:
        """Write what is still in memory; called by ``guard.detach()``."""
