"""Skipping steps whose norm or loss is an outlier."""

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar

from gradkeel.norms import Decision, GradientNorms, Needs, State
from gradkeel.policies.base import Policy
from gradkeel.policies.bounds.base import Bound
from gradkeel.policies.bounds.windowed import ZScore
from gradkeel.policies.clip import Clip, any_of, judge
from gradkeel.policies.compose.chain import Chain
from gradkeel.policies.forms import SkipAbove
from gradkeel.policies.numbers import Memory
from gradkeel.policies.recipes.named import NamedPolicy
from gradkeel.policies.scopes import Cells, LossCells, WrittenLoss
from gradkeel.policies.written import Verdict, Written


@dataclass(frozen=True)
class SkipOnLoss(Policy):
    """Skip the step when the loss is above a bound that follows from earlier losses; without a loss, do nothing.

    On several ranks the mean of their losses counts, so that they skip together.

    Args:
        bound: how large the loss may be; it sees losses where other bounds see norms.
    """

    bound: Bound

    @property
    def needs(self) -> Needs:
        """It needs the loss, and nothing of gradients."""
        return Needs(loss=True)

    @property
    def spec(self) -> str:
        """Raise: it is a part of `SkipStep`, which can be written as a string."""
        raise TypeError(f"{self!r} cannot be written as a spec string; use SkipStep")

    def init(self, norms: GradientNorms) -> State:
        return self.bound.init(Cells(norms, "global"))

    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        if norms.loss is None:
            return Decision(), state
        found: Any
        written = self._written
        if written is not None and (verdicts := written.on(norms, "global", state)) is not None:
            found, _, updated = verdicts
        else:
            found, _, updated = self._verdict(LossCells(norms, norms.loss), state)
        return Decision(skip=any_of(found)), updated

    @cached_property
    def _written(self) -> Written | None:
        return Written(self._verdict, WrittenLoss) if self.bound.on_numbers else None

    def _verdict(self, cells: Cells, state: Memory) -> Verdict:
        bound, updated = judge(self.bound, cells, state)
        return cells.valid & (cells.norms > bound), bound, updated


@dataclass(frozen=True, repr=False)
class SkipStep(NamedPolicy):
    """Skip the optimizer step when the gradient norm, or the loss, is an outlier among the last ones.

    The loss is looked at where it was passed (``guard.log(loss=loss)`` before the step): the mean over ranks, where
    there are several. Outliers enter the window too, so a lasting rise is skipped for a few steps only; by default
    hardened, they enter as if they were twice as far out as the bound, so that one does not hide the next.
    ``reference=True`` lets them in as they are. Skips less than one in 10,000 of stationary log-normal norms whose
    logarithm varies by up to 0.25. Does not sync the host.

    Formula:
        step only if n - mean <= sigma * std, over the last `window` norms, and the same for the loss

    Args:
        sigma: how many standard deviations above the mean the norm and the loss may be, above 0.
        window: how many norms and losses are looked at.
        warmup: how many must have been seen before a step is skipped, at least 2.
        reference: the published form instead of the hardened one.

    Cost:
        One read of the gradients and no second pass. State of ``2 * window`` numbers. On CPU a skip is known to the
        host; on an accelerator it goes into a fused optimizer without a sync.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source:
        Allen Institute for AI, OLMo-core's ``SkipStepOptimizer``, 2024.

    Example:
        >>> SkipStep()
        SkipStep()
    """

    spec_name: ClassVar[str] = "skip-step"
    _positive = ("sigma",)
    sigma: float = 6.0
    _: KW_ONLY
    window: int = 128
    warmup: int = 64
    reference: bool = False

    @property
    def parts(self) -> Chain:
        # Without patience: outliers widen the window's own spread, so no run of skips can be long.
        limited = not self.reference
        bound = ZScore(self.sigma, window=self.window, warmup=self.warmup, patience=None, limited=limited)
        return Chain(Clip("global", bound, SkipAbove()), SkipOnLoss(bound))
