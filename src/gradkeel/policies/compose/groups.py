"""One policy for each parameter group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import or_
from typing import ClassVar

import torch
from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, State, combine, expanded, index, per_tensor, take
from gradkeel.policies.base import Policy
from gradkeel.policies.compose.chain import Composite, both, brief, nested, part
from gradkeel.policies.scopes import group_members
from gradkeel.policies.states import JoinedState


@dataclass(frozen=True, init=False, repr=False)
class PerGroup(Composite):
    """Give each of the optimizer's parameter groups a policy of its own.

    Each policy sees its group as if there were no other: "all tensors together" are all of the group. The groups share
    one norm type. A clamp is one for all groups, so it has no place here; use the groups' own ``"clip"`` key for it.

    Formula:
        group i is clipped by policy i

    Spec:
        per-group:POLICY/POLICY/..., such as per-group:norm:0.1/none

    Args:
        policies: one for each parameter group, in the optimizer's order; None leaves a group as it is.

    Cost:
        That of the policies.

    Raises:
        ValueError: for a clamp, different norm types, or (when used) a different number of groups.

    Source:
        torch, ``torch.optim.Optimizer`` with parameter groups.

    Example:
        >>> PerGroup(ClipByNorm(0.1), None).spec
        'per-group:norm:0.1/none'
    """

    spec_name: ClassVar[str] = "per-group"
    policies: tuple[Policy | None, ...]

    def __init__(self, *policies: Policy | None) -> None:
        object.__setattr__(self, "policies", policies)
        _ = self.needs  # which says what does not fit together
        given = self._policies.values()
        if not given:
            raise ValueError(
                f"{self!r}: give at least one group a policy; to clip nothing pass None as the policy"
            )
        for policy in given:
            if policy.needs.peaks:
                raise ValueError(
                    f"{self!r}: {brief(policy)} clamps single entries, which can only be done to all groups alike; "
                    "give that parameter group a 'clip' key instead"
                )

    @property
    def _policies(self) -> Mapping[str, Policy]:
        return {str(g): policy for g, policy in enumerate(self.policies) if policy is not None}

    @property
    def spec(self) -> str:
        """``per-group:POLICY/POLICY/...``."""
        return f"per-group:{'/'.join(nested(policy) for policy in self.policies)}"

    def init(self, norms: GradientNorms) -> State:
        """Return the states of the policies, under ``0.``, ``1.``, ..."""
        return JoinedState(
            {str(g): policy.init(subset(norms, rows)) for g, policy, rows in self._members(norms)}
        )

    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        """Let each policy decide on its group."""
        decisions, states, members = [], {}, []
        for g, policy, rows in self._members(norms):
            own = part(state, str(g))
            decision, states[str(g)] = self._decided(policy, subset(norms, rows), own, may_clamp=False)
            decisions.append(decision)
            members.append(rows)
        return _assembled(norms, members, decisions), JoinedState(states)

    def _members(self, norms: GradientNorms) -> list[tuple[int, Policy, tuple[int, ...]]]:
        groups = sorted(set(norms.groups))
        if groups and groups[-1] >= len(self.policies):
            raise ValueError(
                f"{self!r}: its last policy is for parameter group {len(self.policies) - 1} (counted from 0), but the "
                f"optimizer has a group {groups[-1]}; give each group a policy or None"
            )
        found = zip(groups, group_members(norms.groups), strict=True)
        return [(g, policy, rows) for g, rows in found if (policy := self.policies[g]) is not None]

    def __repr__(self) -> str:
        return f"PerGroup({', '.join(brief(policy) for policy in self.policies)})"


def subset(norms: GradientNorms, rows: tuple[int, ...]) -> GradientNorms:
    """Return the norms of some of the parameters, as if there were no others."""
    own = take(norms.norms, rows)
    unit_rows = _unit_rows(norms, rows)
    return replace(
        norms,
        names=tuple(norms.names[i] for i in rows),
        norms=own,
        total=combine(own, norms.norm_type),
        groups=tuple(norms.groups[i] for i in rows),
        sizes=tuple(norms.sizes[i] for i in rows) if norms.sizes else (),
        weights=None if norms.weights is None else take(norms.weights, rows),
        units=None if norms.units is None else take(norms.units, unit_rows),
        unit_weights=None if norms.unit_weights is None else take(norms.unit_weights, unit_rows),
        unit_counts=tuple(norms.unit_counts[i] for i in rows) if norms.unit_counts else (),
        unit_sizes=tuple(norms.unit_sizes[i] for i in rows) if norms.unit_sizes else (),
        peaks=None if norms.peaks is None else take(norms.peaks, rows),
    )


def _assembled(
    norms: GradientNorms, members: Sequence[tuple[int, ...]], decisions: Sequence[Decision]
) -> Decision:
    """Make one decision for all parameters from decisions for some of them; the others are left alone."""
    result = Decision()
    for rows, decision in zip(members, decisions, strict=True):
        columns = _unit_rows(norms, rows)
        bound = decision.bound
        if bound is not None and bound.dim() and bound.shape[0] != len(rows):
            # [u]: the tightest of each tensor.
            bound = per_tensor(bound, subset(norms, rows), least=True)
        result = Decision(
            coefficients=_placed(result.coefficients, decision.coefficients, rows, norms.norms, 1.0),
            unit_coefficients=_placed(
                result.unit_coefficients, decision.unit_coefficients, columns, norms.units, 1.0
            ),
            skip=both(or_, result.skip, decision.skip),
            bound=_placed(result.bound, bound, rows, norms.norms, torch.inf),
        )
    return result


def _placed(
    so_far: Tensor | None, values: Tensor | None, rows: Sequence[int], like: Tensor | None, empty: float
) -> Tensor | None:
    if values is None or like is None:
        return so_far
    whole = torch.full_like(like, empty) if so_far is None else so_far
    return whole.index_copy(0, index(rows, whole.device), values.expand(len(rows)).to(whole))


def _unit_rows(norms: GradientNorms, rows: Sequence[int]) -> tuple[int, ...]:
    owners = expanded(tuple(range(len(norms.unit_counts))), norms.unit_counts)
    wanted = set(rows)
    return tuple(i for i, owner in enumerate(owners) if owner in wanted)
