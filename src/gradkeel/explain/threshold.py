"""What recorded norms say about a clipping threshold, with intervals; and nothing that they cannot say.

Never given: a final loss, a best bound, a default, or smoothness constants; norms alone do not hold them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradkeel.errors import check_kind
from gradkeel.explain.explosion import Explosion
from gradkeel.language import readable, say
from gradkeel.record import Reader

SGD_LIKE = frozenset({"SGD", "ASGD"})
SCALE_FREE = frozenset({
    "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adafactor", "RMSprop", "Adagrad", "Adadelta", "Rprop", "Muon",
})  # fmt: skip
"""Optimizers in which a constant factor on all gradients cancels, but for their epsilon."""
NEARLY_ALWAYS = 0.9
LEVELS = (0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_CANDIDATES = (0.5, 0.9, 0.99)
_FEWEST = 20
_SAMPLE = 8192  # steps, evenly spread: intervals do not get narrower than what is of interest
_SAMPLE_NORMS = 65536  # norms, where each step has many
_RESAMPLES = 200
_COVERAGE = 0.95

Scope = Literal["global", "tensor"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95% interval, by a bootstrap of blocks of consecutive steps (norms are not independent)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a constant bound would have done to these very norms, open-loop.

    Attributes:
        bound: on the norm.
        origin: "live", "given", or the quantile that it is, such as "90%".
        clip_rate: share of the norms above it.
        mean_coefficient: mean of ``min(1, bound / norm)``.
        coefficient_spread: 5% and 95% quantile of the coefficients.
        effective_lr: median of learning rate times coefficient; None where the optimizer is not SGD or logs no rate.
        clips_nearly_always: more than 90% of the norms are above it, so that what acts is lr x bound.
    """

    bound: float
    origin: str
    clip_rate: Estimate
    mean_coefficient: Estimate
    coefficient_spread: tuple[float, float]
    effective_lr: Estimate | None
    clips_nearly_always: bool


@dataclass(frozen=True, slots=True)
class ThresholdAdvice:
    """The distribution of a run's raw norms, and what bounds would have done to it.

    Attributes:
        scope: "global": the norm of all gradients together; "tensor": that of each parameter.
        norm_type: the p of the norms.
        steps: how many steps this rests on: finite, above zero, and not in an explosion that did not end.
        optimizer: name of its class, or "".
        scale_cancels: True for Adam and its like, False for SGD, None where it is not known.
        quantiles: by level.
        log_median, log_mad: median and median absolute deviation of the natural log of the norm.
        drift: median norm of the last quarter of these steps over that of the first.
        candidates: bounds, ascending.
        remarks: what follows, and what cannot be said, in sentences.
    """

    scope: Scope
    norm_type: float
    steps: int
    optimizer: str
    scale_cancels: bool | None
    quantiles: dict[float, Estimate]
    log_median: float
    log_mad: float
    drift: Estimate | None
    candidates: tuple[Candidate, ...]
    remarks: tuple[str, ...]


def advise(
    reader: Reader,
    *,
    bounds: Sequence[float] = (),
    explosion: Explosion | None = None,
    scope: Scope | None = None,
) -> ThresholdAdvice | None:
    """Advice from a record; None where it holds fewer than 20 usable steps.

    Args:
        reader: an open record.
        bounds: more candidates.
        explosion: one that did not end: its steps are left out.
        scope: None takes that of the live policy: "tensor" for ``norm:...``, else "global".

    Raises:
        ValueError: a bound is not a positive finite number.
    """
    check_kind(
        reader, Reader, "advise(reader=...)", "reader must be an open Reader, such as Reader('run.keel')"
    )
    for bound in bounds:
        if not 0 < bound < math.inf:
            raise ValueError(f"bounds={bound!r}: a bound must be a positive finite number")
    scope = scope or ("tensor" if reader.policy.startswith("norm:") else "global")
    norms, rates, steps = _usable(reader, scope, explosion)
    if steps < _FEWEST or not norms.numel():
        return None
    optimizer = reader.session.optimizer
    cancels = True if optimizer in SCALE_FREE else False if optimizer in SGD_LIKE else None
    resampled = _blocks(len(norms))
    chosen = {float(norms.quantile(level)): f"{level:.0%}" for level in _CANDIDATES}
    chosen |= dict.fromkeys(bounds, "given") | _live_bound(reader)
    candidates = tuple(
        _candidate(bound, origin, norms, rates if cancels is False else None, resampled)
        for bound, origin in sorted(chosen.items())
    )
    logs = norms.log()
    return ThresholdAdvice(
        scope=scope,
        norm_type=reader.norm_type,
        steps=steps,
        optimizer=optimizer,
        scale_cancels=cancels,
        quantiles=_quantiles(norms, resampled),
        log_median=float(logs.median()),
        log_mad=float((logs - logs.median()).abs().median()),
        drift=_drift(norms),
        candidates=candidates,
        remarks=tuple(_remarks(cancels, candidates, optimizer)),
    )


def _usable(reader: Reader, scope: Scope, explosion: Explosion | None) -> tuple[Tensor, Tensor, int]:
    """Norms [s, 1] or [s, m], learning rates [s], and of how many steps these are an even sample."""
    stop = None
    if explosion is not None and explosion.ended != "recovered" and explosion.kind != "drift":
        stop = explosion.step
    totals = reader.totals(stop=stop)
    usable = torch.isfinite(totals) & (totals > 0) & ~reader.nonfinite(stop=stop)
    most = _SAMPLE if scope == "global" else max(256, _SAMPLE_NORMS // max(1, len(reader.names)))
    stride = max(1, math.ceil(len(usable) / most))
    kept = usable[::stride]
    if scope == "global":
        norms = totals[::stride][kept].unsqueeze(1)
    else:
        norms = reader.norms(stop=stop, stride=stride)[kept][:, reader.main]
        norms = norms[:, (norms > 0).all(dim=0)]
    return norms, reader.scalar("lr", stop=stop, stride=stride)[kept], int(usable.sum())


def _live_bound(reader: Reader) -> dict[float, str]:
    """The bound that was live, if it was one and the same."""
    bounds = reader.bounds()
    finite = bounds[torch.isfinite(bounds)].unique().tolist()
    return dict.fromkeys(finite, "live") if len(finite) == 1 else {}


def _blocks(rows: int) -> list[Tensor]:
    """Row indices of each bootstrap resample: blocks of about sqrt(rows) consecutive steps, drawn with replacement."""
    length = max(1, math.isqrt(rows))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(
        rows - length + 1, (_RESAMPLES, math.ceil(rows / length)), generator=generator, device="cpu"
    )
    return list((starts.unsqueeze(2) + torch.arange(length, device="cpu")).flatten(1)[:, :rows])


def _quantiles(norms: Tensor, resampled: list[Tensor]) -> dict[float, Estimate]:
    levels = torch.tensor(LEVELS, dtype=norms.dtype, device="cpu")
    values = norms.quantile(levels)
    again = torch.stack([norms[i].quantile(levels) for i in resampled])
    return {level: _estimate(again[:, i], values[i]) for i, level in enumerate(LEVELS)}


def _estimate(resampled: Tensor, value: Tensor) -> Estimate:
    tail = (1 - _COVERAGE) / 2
    return Estimate(float(value), float(resampled.quantile(tail)), float(resampled.quantile(1 - tail)))


def _candidate(
    bound: float, origin: str, norms: Tensor, rates: Tensor | None, resampled: list[Tensor]
) -> Candidate:
    coefficients = bound / norms.clamp(min=bound)
    mean = coefficients.mean(dim=1)

    def estimate(per_step: Tensor) -> Estimate:
        return _estimate(torch.stack([per_step[i].mean() for i in resampled]), per_step.mean())

    effective = None
    if rates is not None and not bool(rates.isnan().any()):
        acting = rates * mean
        effective = _estimate(torch.stack([acting[i].median() for i in resampled]), acting.median())
    clip_rate = estimate((norms > bound).double().mean(dim=1))
    return Candidate(
        bound=bound,
        origin=origin,
        clip_rate=clip_rate,
        mean_coefficient=estimate(mean),
        coefficient_spread=(float(coefficients.quantile(0.05)), float(coefficients.quantile(0.95))),
        effective_lr=effective,
        clips_nearly_always=clip_rate.value > NEARLY_ALWAYS,
    )


def _drift(norms: Tensor) -> Estimate | None:
    """Median norm of the last quarter over that of the first, each quarter resampled on its own."""
    quarter = len(norms) // 4
    if quarter < _FEWEST:
        return None
    first, last = norms[:quarter], norms[-quarter:]
    draws = _blocks(quarter)
    ratios = torch.stack(
        [last[i].median() / first[j].median() for i, j in zip(draws, draws[::-1], strict=True)]
    )
    return _estimate(ratios, last.median() / first.median())


def _remarks(cancels: bool | None, candidates: Sequence[Candidate], optimizer: str) -> Iterator[str]:
    yield say(
        "All of this describes the norms of this very run (open-loop): another bound would have led elsewhere, and "
        "loosening a bound near instability would clip more than is said here."
    )
    if cancels:
        yield say(
            "Under {optimizer} a constant factor on the gradients cancels: a bound acts only through the differences "
            "between steps, so look at the clip rate and the spread of the coefficients, not at an effective learning "
            "rate.",
            optimizer=optimizer,
        )
    elif cancels is None:
        yield say(
            "What a smaller gradient does under {optimizer} is not known here, so no effective learning rate is given.",
            optimizer=optimizer or say("this optimizer"),
        )
    meaning = say(
        "the size of the gradient hardly enters the update any more"
        if cancels is not False
        else "normalized SGD, effective lr = lr * bound / norm: what you tune is lr x bound"
    )
    for bound in (readable(one.bound) for one in candidates if one.clips_nearly_always):
        yield say(
            "The bound {bound} clips more than 90% of the steps: {meaning}.", bound=bound, meaning=meaning
        )
    yield say(
        "Which bound trains best, and to what loss, cannot be said from norms: compare them (gradkeel compare), or "
        "measure the smoothness (gradkeel smoothness)."
    )
