"""The norm on each layout of ranks: gradkeel, and torch's own clip, on the layouts that the tests lay out.

    python -m benchmarks.layouts            # prints the table
    python -m benchmarks.layouts --write    # also writes it into docs/comparison.md

Each cell is a run of gloo ranks: parameters of several shapes, float64 gradients, clipped by their global norm. Right
is the norm of the gathered gradients on every rank, and gradients that are clipped by it. torch's clip is used as
FSDP2's documentation shows it: ``clip_grad_norm_`` and, where it returns a DTensor, ``full_tensor()``.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

import gradkeel as gk

from benchmarks.pages import put
from tests.distributed import layouts
from tests.distributed.pool import Pool, RankError
from tests.policy_rows import GROUPS, Run, gradients

BOUND = 0.5
SECONDS = 20  # for a case; a rank that waits in vain gives up after half of them


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        words: what lies where.
        count: number of ranks.
        make: the layout, of the rank and the number of ranks.
        missing: name of a parameter that has no gradient on rank 1.
        nan: name of a parameter whose gradient has a NaN in its first row.
    """

    words: str
    count: int
    make: Callable[[int, int], layouts.Layout]
    missing: str | None = None
    nan: str | None = None


ROWS = [
    Row("FSDP2: rows sharded", 2, layouts.shards),
    Row("FSDP2: fewer rows than ranks", 4, layouts.shards),
    Row("tensor parallel: columns sharded", 2, layouts.column_shards),
    Row("replicated DTensors", 2, layouts.replicas),
    Row("replicated DTensors, gradients `Partial`", 2, layouts.partial_gradients),
    Row("DTensors and plain tensors", 2, layouts.mixed_with_plain),
    Row("HSDP", 4, layouts.hybrid),
    Row("two meshes", 4, layouts.two_meshes),
    Row("sharded along two dims", 4, layouts.both_dims),
    Row("tensor parallel and FSDP2 along one dim", 4, layouts.same_dim_twice),
    Row("plain expert-parallel pieces", 2, layouts.experts),
    Row("pipeline stages", 2, layouts.stages),
    Row("a weight tied across stages", 2, layouts.tied_stages),
    Row("pipeline stages of FSDP2 shards", 4, layouts.sharded_stages),
    Row("a gradient missing on one rank", 2, layouts.shards, missing="table"),
    Row("a NaN on one rank", 2, layouts.shards, nan="table"),
]


def with_torch(parameters: dict[str, Any], layout: layouts.Layout, norm_type: float) -> float:
    """Torch's clip."""
    norm: Any = torch.nn.utils.clip_grad_norm_(list(parameters.values()), BOUND, norm_type)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def with_gradkeel(parameters: dict[str, Any], layout: layouts.Layout, norm_type: float) -> float:
    """A guarded optimizer."""
    optimizer = torch.optim.SGD(list(parameters.items()), lr=1e-30, foreach=False)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND, norm_type), **layout.arguments)
    optimizer.step()
    return guard.report.norm


def case(rank: int, row: Row, norm_type: float, clip: Callable[..., float]) -> tuple[float, float, float]:
    """The norm that a contender tells, the right one, and how far its gradients are from the right ones."""
    warnings.simplefilter("ignore")
    layout = row.make(rank, row.count)
    whole = gradients(1.0, seed=7)
    del whole[
        "nothing"
    ]  # a parameter without entries is another matter: torch has no inf-norm of it anywhere
    if row.nan is not None:
        whole[row.nan][0] = math.nan
    start = Run(None).parameters
    placed = {
        name: layout.place(name, start[name].detach()) for group in GROUPS for name in group if name in whole
    }
    parameters = {name: torch.nn.Parameter(p) for name, p in placed.items() if p is not None}
    held = dict(whole)
    for name, parameter in parameters.items():
        parameter.grad = layout.gradient(name, whole[name].clone())
    if row.missing is not None:
        # What rank 1 does not have is missing from the whole.
        held[row.missing] = whole[row.missing].clone()
        held[row.missing][len(held[row.missing].chunk(row.count)[0]) :] = 0.0
        if rank == 1:
            parameters[row.missing].grad = None
    right = float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in held.values()]), norm_type))
    told = clip(parameters, layout, norm_type)
    return told, right, _distance(parameters, layout, held, right)


def _distance(
    parameters: dict[str, Any], layout: layouts.Layout, whole: dict[str, torch.Tensor], norm: float
) -> float:
    distance = 0.0
    for name, parameter in parameters.items():
        wanted: Any = layout.place(name, whole[name] * min(1.0, BOUND / norm))
        wanted = wanted.to_local() if hasattr(wanted, "to_local") else wanted
        if parameter.grad is None:
            continue
        gradient = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.redistribute(placements=parameter.placements).to_local()
        # A NaN that belongs there is no difference, any other is an infinite one.
        apart = torch.where(gradient.isnan() & wanted.isnan(), 0.0, (gradient - wanted).abs()).nan_to_num(
            math.inf
        )
        distance = max([distance, *apart.flatten().tolist()])
    return distance


def judge(pool: Pool, row: Row, norm_type: float, clip: Callable[..., float]) -> tuple[bool, str]:
    """Whether a contender is right on every rank, and what is wrong if not."""
    try:
        answers = pool.run(row.count, case, row, norm_type, clip, seconds=SECONDS)
    except RankError as error:
        return False, _failure(str(error), row.count)
    right = answers[0][1]
    if math.isnan(right):
        is_told = all(not math.isfinite(told) for told, _, _ in answers)
        kept = all(distance == 0.0 for _, _, distance in answers)
        return is_told and kept, "right: all ranks skip" if is_told and kept else "all gradients become NaN"
    errors = [abs(told - right) / right for told, _, _ in answers]
    if len({told for told, _, _ in answers}) > 1:
        return False, f"ranks disagree: {', '.join(f'{told:.4g}' for told, _, _ in answers)} for {right:.4g}"
    if max(errors) > 1e-5:  # torch adds 1e-6 to the norm
        return False, f"norm off by {max(errors):.2g}"
    if max(distance for _, _, distance in answers) > 1e-5:
        return False, "gradients clipped by something else"
    return True, "right"


def _failure(words: str, count: int) -> str:
    lines = [line.strip() for line in words.splitlines()]
    errors = [line for line in lines if ": " in line and line.split(":")[0].endswith(("Error", "Exception"))]
    in_vain = [line for line in errors if "imed out" in line or "closed by peer" in line]
    told = next((line for line in errors if line not in in_vain), "")
    where = (
        "on every rank"
        if len(errors) - len(in_vain) >= count
        else "on one rank, the others wait for it in vain"
    )
    kind = told.split(":")[0].rsplit(".", 1)[-1] or "no answer"
    return f"raises {kind} {where}" if told else "ranks wait for each other in vain"


def table() -> list[str]:
    """The table, line by line."""
    pool = Pool()
    lines = [
        "| parameters | ranks | torch, 2-norm | torch, inf-norm | gradkeel, both |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        theirs = [judge(pool, row, p, with_torch) for p in (2.0, math.inf)]
        mine = [judge(pool, row, p, with_gradkeel) for p in (2.0, math.inf)]
        cells = [words if is_right else f"**{words}**" for is_right, words in theirs]
        own = mine[0] if not mine[0][0] else mine[1]
        cells.append(own[1] if own[0] else f"**{own[1]}**")
        lines.append(f"| {row.words} | {row.count} | {' | '.join(cells)} |")
    pool.close()
    return lines


def main() -> None:
    """Run everything and print it."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--write", action="store_true", help="write the table into docs/comparison.md")
    chosen = arguments.parse_args()
    lines = [
        f"Written by `python -m benchmarks.layouts --write` on {datetime.now(UTC).date().isoformat()}",
        f"with torch {torch.__version__} on gloo ranks.",
        "Right is the norm of the gathered gradients, told on every rank, and gradients clipped by it.",
        "",
        *table(),
    ]
    text = "\n".join(lines)
    sys.stdout.write(text + "\n")
    if chosen.write:
        put("comparison.md", "layouts", text)


if __name__ == "__main__":
    main()
