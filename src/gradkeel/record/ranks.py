"""The files of several ranks of one run: where each lies, and what they come to together."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gradkeel.errors import RecordError
from gradkeel.norms import combine
from gradkeel.record.store import Store


def rank_path(path: str | os.PathLike[str], rank: int) -> Path:
    """Where a rank writes: rank 0 to ``run.keel`` itself, rank 1 to ``run.rank1.keel`` beside it."""
    path = Path(path)
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def beside(store: Store, path: Path) -> list[Store]:
    """The open files of all ranks, in their order; this one alone where others are missing or there are none."""
    if store.rank or store.ranks == 1:
        return [store]
    stores = [store]
    try:
        stores += [Store(rank_path(path, rank)) for rank in range(1, store.ranks)]
    except RecordError:  # lost, or nothing written yet
        for other in stores[1:]:
            other.close()
        return [store]
    return stores


def merged_samples(stores: Sequence[Store]) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [s], norms of the whole parameters [s, n] and of their updates [s, n], from each rank's pieces.

    Copies of a piece count once. Steps of which a rank has no sample, or which were recorded by ranks that had other
    pieces, are left out.
    """
    samples = [store.weight_samples() for store in stores]
    since = max(store.pieces_since for store in stores)
    known = set.intersection(*(set(steps.tolist()) for steps, _, _ in samples))
    steps = torch.tensor(sorted(step for step in known if step >= since), dtype=torch.int64)
    parts: dict[str, dict[tuple[int, ...], Tensor]] = {p.name: {} for p in stores[0].parameters}
    for store, (own, weights, updates) in zip(stores, samples, strict=True):
        both = torch.stack([weights, updates])[:, torch.searchsorted(own, steps)]
        for column, parameter in enumerate(store.parameters):
            key = store.piece(parameter.name)
            if key is not None and parameter.name in parts:
                parts[parameter.name].setdefault(key, both[:, :, column])
    unknown = torch.full((2, len(steps)), math.nan, dtype=torch.float64)
    columns = [
        combine(torch.stack([*own.values()], dim=2), 2.0) if own else unknown for own in parts.values()
    ]
    weights, updates = torch.stack([*columns, unknown], dim=2)[:, :, : len(columns)]
    return steps, weights, updates


def by_rank(stores: Sequence[Store], name: str, steps: Tensor) -> Tensor:
    """[k, ranks] what each rank recorded of a series of one number a step; NaN at steps that it has not."""
    result = torch.full((len(steps), len(stores)), math.nan, dtype=torch.float64)
    for column, store in enumerate(stores):
        own = store.series("step", 0, store.rows)
        found = torch.isin(steps, own)
        values = store.series(name, 0, store.rows).to(torch.float64)
        result[found, column] = values[torch.searchsorted(own, steps[found])]
    return result
