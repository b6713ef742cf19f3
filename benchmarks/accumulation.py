"""What accumulation costs and buys, and what the usual ways of doing it get wrong.

    python -m benchmarks.accumulation            # prints the tables
    python -m benchmarks.accumulation --write    # also writes them into docs/accumulation.md

Each row is a process of its own, so that its peak of memory is its own. Every mode sees the same items in the same
order: K micro-batches of fixed size make a window; "full batch" takes the window's items in one backward.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

import gradkeel as gk
from gradkeel.compare.task import Task, endless
from gradkeel.compare.tasks.simple_mlp import SimpleMLP, SimpleMLPAdam
from gradkeel.compare.tasks.tiny_transformer import TinyTransformer

from benchmarks.pages import put

TASKS: dict[str, type[Task]] = {
    "simple-mlp": SimpleMLP,
    "simple-mlp-adam": SimpleMLPAdam,
    "tiny-transformer": TinyTransformer,
}
MODES = ("exact", "full batch", "mean of means", "undivided sum")


def window_loss(task: Task, model: nn.Module, window: list[Any], mode: str, accumulate: Any) -> float:
    """Backward over one window; returns its mean loss per item."""
    weights = [task.weight(batch) for batch in window]
    if mode == "exact":
        for micro in accumulate(window):
            with micro:
                micro.backward(task.loss(model, micro.batch), weight=task.weight(micro.batch))
        return float(accumulate.loss)
    losses = [task.loss(model, batch) for batch in window] if mode == "full batch" else []
    if mode == "full batch":  # one graph over all items of the window
        loss = sum((a * w for a, w in zip(losses, weights, strict=True)), torch.zeros(())) / sum(weights)
        loss.backward()
        return float(loss.detach())
    total = 0.0
    for batch, weight in zip(window, weights, strict=True):
        loss = task.loss(model, batch)
        (loss / len(window) if mode == "mean of means" else loss).backward()
        total += float(loss.detach()) * weight
    return total / sum(weights)


def train(name: str, mode: str, micro_batches: int, updates: int, bound: float | None) -> dict[str, Any]:
    """Train, and tell final weights, losses, seconds an update and the process's peak of memory."""
    torch.set_num_threads(1)
    task = TASKS[name]()
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(model, task.learning_rates[0])
    guard = gk.attach(optimizer, None if bound is None else gk.ClipByGlobalNorm(bound), model=model)
    accumulate = gk.Accumulator(guard, micro_batches, reduction="mean") if mode == "exact" else None
    source = endless(task, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses, seconds = [], []
    for _ in range(updates):
        window = [next(source) for _ in range(micro_batches)]
        start = time.perf_counter()
        losses.append(window_loss(task, model, window, mode, accumulate))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    late = losses[len(losses) // 2 :]
    changes = [abs(b - a) for a, b in itertools.pairwise(late)]
    return {
        "weights": nn.utils.parameters_to_vector(model.parameters()).tolist(),
        "milliseconds": 1e3 * statistics.median(seconds),
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "volatility": statistics.fmean(changes) / statistics.fmean(late),
        "loss": statistics.fmean(losses[-5:]),
        "variance": gradient_variance(task, model, micro_batches),
    }


def gradient_variance(task: Task, model: nn.Module, micro_batches: int, windows: int = 20) -> float:
    """Mean squared distance of a window's gradient from the mean over windows, at the trained weights."""
    source = endless(task, 1)
    gradients: list[Tensor] = []
    for _ in range(windows):
        window = [next(source) for _ in range(micro_batches)]
        window_loss(task, model, window, "full batch", None)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    stacked = torch.stack(gradients).double()
    return float((stacked - stacked.mean(0)).square().sum(1).mean())


def run(*arguments: object) -> dict[str, Any]:
    """One row, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.accumulation", "--row", json.dumps(arguments)]
    result: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return result


def cost_table(name: str, updates: int) -> list[str]:
    """Rows of one task: K micro-batches accumulated, and the same items in one batch."""
    lines = [
        f"`{name}`, {updates} updates:",
        "",
        "| window | ms an update | peak memory, MiB above the start | gradient variance | volatility of the loss "
        "| final loss |",
        "|---|---|---|---|---|---|",
    ]
    for size in (1, 2, 4):
        for mode in ("exact", "full batch"):
            if size == 1 and mode == "full batch":
                continue
            row = run(name, mode, size, updates, None)
            title = (
                f"{size} micro-batches accumulated"
                if mode == "exact"
                else f"the same items in one batch ({size}x)"
            )
            lines.append(
                f"| {title} | {row['milliseconds']:.2f} | {row['memory']:.0f} | {row['variance']:.2g} | "
                f"{row['volatility']:.1%} | {row['loss']:.3g} |"
            )
    return [*lines, ""]


def apart(name: str, weights: list[float], others: list[float]) -> float:
    """Distance of two trainings' final weights, relative to the way that the second has gone."""
    torch.manual_seed(0)
    start = nn.utils.parameters_to_vector(TASKS[name]().model().parameters()).detach().double()
    one, other = (torch.tensor(values, dtype=torch.float64) for values in (weights, others))
    return float((one - other).norm() / (other - start).norm())


def mode_table(updates: int) -> list[str]:
    """How far each way of accumulating ends from the full batch, relative to the distance trained."""
    lines = [
        "Distance of the final weights from those of full-batch training, relative to the way that these have gone:",
        "",
        "| task, bound | exact | mean of means | undivided sum |",
        "|---|---|---|---|",
    ]
    for name in TASKS:
        for bound in (None, 0.2):
            rows = {mode: run(name, mode, 4, updates, bound)["weights"] for mode in MODES}
            cells = [
                f"{apart(name, rows[mode], rows['full batch']):.1e}" for mode in MODES if mode != "full batch"
            ]
            title = f"{name}, {'not clipped' if bound is None else f'global norm {bound}'}"
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run everything and print it."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--write", action="store_true", help="write the tables into docs/accumulation.md")
    arguments.add_argument("--row", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.row is not None:
        sys.stdout.write(json.dumps(train(*json.loads(chosen.row))))
        return
    lines = [
        f"Written by `python -m benchmarks.accumulation --write` on {datetime.now(UTC).date().isoformat()}, "
        f"torch {torch.__version__}, one thread; times are medians, to be compared within a table.",
        "",
        *cost_table("simple-mlp", 40),
        *cost_table("tiny-transformer", 30),
        *mode_table(40),
    ]
    text = "\n".join(lines)
    sys.stdout.write(text + "\n")
    if chosen.write:
        put("accumulation.md", "costs", text)


if __name__ == "__main__":
    main()
