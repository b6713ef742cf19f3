"""Policies made of policies: one after the other, and one until the other is ready."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import mul, or_
from typing import Any, ClassVar

from gradkeel.norms import Decision, GradientNorms, Needs, State
from gradkeel.policies.base import Policy, count, decide, is_own
from gradkeel.policies.clip import Clip
from gradkeel.policies.states import JoinedState


class Composite(Policy):
    """A policy made of policies; the state of each is kept under a prefix of its own."""

    spec_name: ClassVar[str]

    @property
    def _policies(self) -> Mapping[str, Policy]:
        """The policies by these prefixes."""
        raise NotImplementedError

    @cached_property
    def needs(self) -> Needs:
        """It needs what any of its policies needs."""
        return union(type(self).__name__, list(self._policies.values()))

    def init(self, norms: GradientNorms) -> State:
        """Return the states of its policies, each under its prefix."""
        return JoinedState({key: policy.init(norms) for key, policy in self._policies.items()})

    @cached_property
    def _is_own(self) -> bool:
        return is_own(self)

    def _decided(
        self, part: Policy, norms: GradientNorms, state: State, *, may_clamp: bool
    ) -> tuple[Decision, State]:
        """What a part decides, which another part, or the same one again, does not write to."""
        decision, after = decide(part, norms, state, may_clamp=may_clamp)
        return decision if self._is_own else decision.apart(), after


@dataclass(frozen=True, init=False, repr=False)
class Chain(Composite):
    """Apply several policies in turn, each to what the one before leaves.

    The later ones see norms that are scaled as the gradients will be; gradients themselves are scaled once, by the
    product. A step is skipped if any of them asks for it. After a clamp of single entries the norms are unknown, so a
    clamp must come last. All of them share one norm type.

    Formula:
        coefficient = product of the stages' coefficients

    Spec:
        STAGE+STAGE+..., such as skip-step+zclip+value:1.0

    Args:
        stages: the policies, in order.

    Cost:
        That of the stages; still one read of the gradients, and at most one second pass.

    Raises:
        ValueError: for stages that cannot follow each other, with the reason.

    Source:
        optax, ``chain``.

    Example:
        >>> Chain(ClipByNorm(0.5), ClipByGlobalNorm(1.0)).spec
        'norm:0.5+global-norm:1.0'
    """

    spec_name: ClassVar[str] = "chain"
    stages: tuple[Policy, ...]

    def __init__(self, *stages: Policy) -> None:
        object.__setattr__(self, "stages", stages)
        _ = self.needs  # which says what does not fit together
        if len(stages) < 2:
            raise ValueError(f"{self!r}: a chain needs at least two policies; use one alone as it is")
        for stage in stages[:-1]:
            if stage.needs.peaks:
                raise ValueError(
                    f"{self!r}: {brief(stage)} clamps single entries, after which norms are unknown; put it last"
                )

    @property
    def _policies(self) -> Mapping[str, Policy]:
        return {str(i): stage for i, stage in enumerate(self.stages)}

    @property
    def spec(self) -> str:
        """The stages' specs, joined by ``+``."""
        return "+".join(nested(stage) for stage in self.stages)

    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        """Let each stage decide on what the one before leaves."""
        total, decision, states = Decision(), Decision(), {}
        for i, stage in enumerate(self.stages):
            norms = norms.after(decision)
            is_last = i == len(self.stages) - 1
            decision, states[str(i)] = self._decided(stage, norms, part(state, str(i)), may_clamp=is_last)
            total = _product(total, decision)
        return total, JoinedState(states)

    def __repr__(self) -> str:
        return f"Chain({', '.join(brief(stage) for stage in self.stages)})"


@dataclass(frozen=True, repr=False)
class Warmup(Composite):
    """Use one policy for the first steps and another from then on, which watches from the first.

    So the second one's statistics are ready when it takes over.

    Formula:
        before while step <= steps, then after

    Spec:
        warmup:STEPS/BEFORE/AFTER, such as warmup:100/global-norm:1.0/zclip

    Args:
        steps: how many steps the first policy has.
        before: the first policy; None to clip nothing meanwhile.
        after: the second one; None to clip nothing from then on.

    Cost:
        That of both, in the first steps; then that of the second. The host counts the steps, so a captured CUDA graph
        stays with the policy that was in force when it was captured.

    Raises:
        ValueError, TypeError: for a number of steps that is not positive, or policies with different norm types.

    Source:
        Wang et al., "AdaGC: Improving training stability for large language model pretraining", 2025, algorithm 1.

    Example:
        >>> Warmup(100, ClipByGlobalNorm(1.0), ZClip()).spec
        'warmup:100/global-norm:1.0/zclip'
    """

    spec_name: ClassVar[str] = "warmup"
    steps: int
    before: Policy | None
    after: Policy | None

    def __post_init__(self) -> None:
        count("Warmup", "steps", self.steps)
        _ = self.needs  # which says what does not fit together

    @property
    def _policies(self) -> Mapping[str, Policy]:
        phases = {"before": self.before, "after": self.after}
        return {key: policy for key, policy in phases.items() if policy is not None}

    @property
    def spec(self) -> str:
        """``warmup:STEPS/BEFORE/AFTER``."""
        return f"warmup:{self.steps}/{nested(self.before)}/{nested(self.after)}"

    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        """Let the policy in force decide; the second one learns in any case."""
        decision, before, after = Decision(), part(state, "before"), part(state, "after")
        if self.after is not None:
            decision, after = self.after.decide(norms, after)
        if norms.step <= self.steps:
            decision = Decision()
            if self.before is not None:
                decision, before = self.before.decide(norms, before)
        return decision, JoinedState({"before": before, "after": after})

    def __repr__(self) -> str:
        return f"Warmup({self.steps}, {brief(self.before)}, {brief(self.after)})"


def _product(first: Decision, second: Decision) -> Decision:
    return Decision(
        coefficients=both(mul, first.coefficients, second.coefficients),
        unit_coefficients=both(mul, first.unit_coefficients, second.unit_coefficients),
        clamp=second.clamp,
        skip=both(or_, first.skip, second.skip),
        bound=first.bound if second.bound is None else second.bound,
    )


def both(operation: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
    """What an operation makes of the two; the one that is there where the other is None."""
    if first is None or second is None:
        return second if first is None else first
    return operation(first, second)


def union(owner: str, policies: Sequence[Policy]) -> Needs:
    """What any of the policies needs; refuses what is no policy, and needs that one measurement cannot serve."""
    for policy in policies:
        if not isinstance(policy, Policy):
            raise TypeError(f"{owner}({policy!r}): must be made of policies, such as ClipByGlobalNorm(1.0)")
    needs = [policy.needs for policy in policies]
    types = {need.norm_type for policy, need in zip(policies, needs, strict=True) if not _clamps_only(policy)}
    dims = {need.unit_dim for need in needs if need.unit_dim is not None}
    for argument, values in (("norm_type", types), ("unit_dim", dims)):
        if len(values) > 1:
            shown = ", ".join(f"{brief(policy)}" for policy in policies)
            raise ValueError(
                f"{owner}({shown}): its policies have different values of {argument}, {sorted(values)}, but gradients "
                "are measured once; give them the same"
            )
    return Needs(
        norm_type=next(iter(types), 2.0),
        weights=any(need.weights for need in needs),
        unit_dim=next(iter(dims), None),
        peaks=any(need.peaks for need in needs),
        loss=any(need.loss for need in needs),
    )


def _clamps_only(policy: Policy) -> bool:
    parts = getattr(policy, "parts", policy)
    return isinstance(parts, Clip) and parts.scope == "value"


def brief(policy: Policy | None) -> str:
    """The call that makes a policy, without the comment."""
    return repr(policy).partition("  # ")[0]


def nested(policy: Policy | None) -> str:
    """Spec of a policy that is part of another; a composite one stands in parentheses."""
    if policy is None:
        return "none"
    return f"({policy.spec})" if isinstance(policy, Composite) else policy.spec


def part(state: State, prefix: str) -> State:
    """The state of the part with this prefix, out of a `JoinedState` or a saved one."""
    if isinstance(state, JoinedState):
        return state.parts.get(prefix, {})
    return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(f"{prefix}.")}
