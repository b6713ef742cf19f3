"""What another policy would have done to recorded norms, by the very policy objects that run live.

Open-loop: the norms are those of the recorded run, and would have been others under another policy. So it is exact
for the policy that was live, and for any other it says what it would have done to this trajectory only.
"""

import fnmatch
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.errors import RecordError, check_kind
from gradkeel.guard import SkipReason
from gradkeel.norms import Decision, GradientNorms, Needs, combine
from gradkeel.outcome import Outcome
from gradkeel.policies import Policy, parse
from gradkeel.policies.base import decide
from gradkeel.record import Reader

# Nothing was decided on gradients of a real step, and no new state kept.
_NOT_COMMITTED = {SkipReason.NO_GRADIENT, SkipReason.EMPTY_WINDOW, SkipReason.LOSS_SCALE}
_CHUNK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """What a policy would have done, step by step; open-loop.

    Attributes:
        policy: its spec, with the patterns of what it leaves out.
        is_live: whether it is the one that was live.
        steps: [k] int64 numbers of the steps.
        coefficients: [k] what it would have multiplied gradients by; the smallest one where parameters have their own.
        clipped: [k] bool: it would have made some gradient smaller.
        skipped: [k] bool: it would have asked to skip the step, or the guard skipped it whatever the policy.
        bounds: [k] its bound, the smallest one; inf: none yet; NaN: it has none.
        norms: [k] norm of what it looks at, before clipping.
        clipped_norms: [k] the same after clipping; NaN where single entries are clamped.
        differs: [k] bool: its coefficient is not the live one (beyond a rounding), or one would have skipped.
    """

    policy: str
    is_live: bool
    steps: Tensor
    coefficients: Tensor
    clipped: Tensor
    skipped: Tensor
    bounds: Tensor
    norms: Tensor
    clipped_norms: Tensor
    differs: Tensor

    @property
    def clip_rate(self) -> float:
        """Share of the steps at which it would have clipped."""
        return float(self.clipped.double().mean()) if len(self.steps) else 0.0

    @property
    def skip_rate(self) -> float:
        """Share of the steps that it would have skipped."""
        return float(self.skipped.double().mean()) if len(self.steps) else 0.0

    @property
    def mean_coefficient(self) -> float:
        """Mean coefficient over the steps that it would not have skipped; NaN if there are none."""
        return float(self.coefficients[~self.skipped].mean())


def replay(reader: Reader, policy: Policy | str, *, exclude: Sequence[str] = ()) -> Replay:
    """Let a policy decide on every step of a record; open-loop.

    It looks at the parameters that the live main policy looked at. With ``exclude`` (or a spec that has it) it looks
    at these and the live run's excluded ones, but for those that match.

    Args:
        reader: an open record.
        policy: a policy, or a spec string such as ``"zclip"`` or ``"norm:1.0,exclude=*.bias"``.
        exclude: name patterns of parameters that it leaves out.

    Raises:
        PolicySpecError: the spec cannot be read.
        RecordError: the policy looks at something that the record does not hold, with the reason.
    """
    check_kind(
        reader, Reader, "replay(reader=...)", "reader must be an open Reader, such as Reader('run.keel')"
    )
    rule = "policy must be a policy such as ClipByGlobalNorm(1.0), or a spec string such as 'zclip' or 'none'"
    check_kind(policy, Policy | str, "replay(policy=...)", rule)
    if isinstance(policy, str):
        spec = parse(policy)
        chosen, exclude = spec.policy, (*spec.exclude, *exclude)
        name = spec.spec
    else:
        chosen, name = policy, _name(policy)
    columns = _columns(reader, exclude)
    same_columns = columns == reader.main.nonzero().flatten().tolist()
    if chosen is not None:
        _check(reader, chosen, name, columns)
    rows = list(_rows(reader, chosen, columns, live_totals=same_columns))
    table = torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, 6)
    coefficients, clipped, asked, bounds, norms, after = table.unbind(1)
    skipped = asked.bool() | _skipped(reader, set(SkipReason) - {SkipReason.POLICY})  # whatever the policy
    coefficients = torch.where(skipped, 1.0, coefficients)
    return Replay(
        policy=name,
        is_live=same_columns and name == reader.policy,
        steps=reader.steps(),
        coefficients=coefficients,
        clipped=clipped.bool() & ~skipped,
        skipped=skipped,
        bounds=bounds,
        norms=norms,
        clipped_norms=torch.where(skipped, norms, after),
        # Coefficients are float64 quotients of the same numbers; one may have been multiplied on the way.
        differs=((coefficients - reader.coefficients()).abs() > 1e-12) | (skipped == reader.stepped()),
    )


def _name(policy: Policy) -> str:
    try:
        return policy.spec
    except TypeError:
        return repr(policy)


def _columns(reader: Reader, exclude: Sequence[str]) -> list[int]:
    """Positions of the parameters that a replayed policy looks at."""
    labels = {"main", "excluded"} if exclude else {"main"}
    return [
        i
        for i, parameter in enumerate(reader.parameters)
        if parameter.selection in labels and not any(fnmatch.fnmatchcase(parameter.name, p) for p in exclude)
    ]


def _check(reader: Reader, policy: Policy, name: str, columns: list[int]) -> None:
    """Refuse a policy that looks at something that was not recorded."""
    needs = policy.needs
    if needs.norm_type != reader.norm_type:
        raise RecordError(
            f"replay of {name!r}: it looks at {needs.norm_type:g}-norms, and {reader.path} holds "
            f"{reader.norm_type:g}-norms"
        )
    if needs.unit_dim is not None:
        raise RecordError(
            f"replay of {name!r}: it looks at the norm of each unit, which records do not hold (they would be as "
            "large as the model has rows, at each step); train with it instead, as with gradkeel compare"
        )
    for wanted, series, what in (
        (needs.weights, "weights", "each parameter's weight norm"),
        (needs.peaks, "peaks", "the highest entry of each gradient"),
    ):
        # Beside a norm that is not finite, NaN may have been measured.
        measured = torch.isfinite(reader.norms()[:, columns])
        if wanted and bool(reader.series(series)[:, columns][measured].isnan().any()):
            raise RecordError(
                f"replay of {name!r}: it looks at {what} at each step, which is recorded only where the live policy "
                f"looks at it; here that was {reader.policy!r}"
            )


def _rows(
    reader: Reader, policy: Policy | None, columns: list[int], *, live_totals: bool
) -> Iterator[tuple[float, ...]]:
    """Coefficient, clipped, skipped, bound, norm and clipped norm of each step.

    The policy is asked, and its state kept, as by the guard.
    """
    needs, state = Needs() if policy is None else policy.needs, None
    committed = ~reader.nonfinite() & ~_skipped(reader, _NOT_COMMITTED)
    steps = _steps(reader, needs, columns, live_totals=live_totals)
    for norms, commit in zip(steps, committed.tolist(), strict=True):
        decision = Decision()
        if policy is not None:
            decision, after = decide(policy, norms, policy.init(norms) if state is None else state)
            state = after if commit else state
        outcome = Outcome(norms, decision)
        clipped, bound, left = bool(outcome.is_clipped()), outcome.bound(), outcome.total()
        if left is None and not clipped:  # what a clamp leaves is known only where it changes nothing
            left = norms.total
        yield (
            outcome.coefficient(),
            float(clipped),
            float(decision.skip is not None and bool(decision.skip)),
            math.nan if bound is None else float(bound),
            float(norms.total),
            math.nan if left is None else float(left),
        )


def _skipped(reader: Reader, reasons: Collection[SkipReason]) -> Tensor:
    """[k] bool: steps that were skipped for one of these reasons."""
    steps = [step for step, why in reader.skip_reasons().items() if why in reasons]
    return torch.isin(reader.steps(), torch.tensor(steps, dtype=torch.int64, device="cpu"))


def _steps(reader: Reader, needs: Needs, columns: list[int], *, live_totals: bool) -> Iterator[GradientNorms]:
    """Each step's norms of the chosen parameters, as they were measured."""
    names = tuple(reader.names[i] for i in columns)
    groups = tuple(reader.parameters[i].optimizer_group for i in columns)
    sizes = tuple(reader.parameters[i].size for i in columns)
    for first in range(0, len(reader), _CHUNK):
        last = min(first + _CHUNK, len(reader))

        def rows(series: str, first: int = first, last: int = last) -> Tensor:
            return reader.store.series(series, first, last)

        norms = rows("norms")[:, columns]
        totals = rows("total") if live_totals else [combine(row, reader.norm_type) for row in norms]
        weights = rows("weights")[:, columns] if needs.weights else None
        peaks = rows("peaks")[:, columns] if needs.peaks else None
        losses = rows("scalar:loss").float()  # as the guard hands it on
        for i, step in enumerate(rows("step").tolist()):
            yield GradientNorms(
                names=names,
                norms=norms[i],
                total=totals[i],
                norm_type=reader.norm_type,
                groups=groups,
                step=step,
                sizes=sizes,
                weights=None if weights is None else weights[i],
                peaks=None if peaks is None else peaks[i],
                loss=None if math.isnan(float(losses[i])) else losses[i],
            )
