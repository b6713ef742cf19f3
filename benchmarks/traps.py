"""Who falls into which trap: the same few lines of training code, run with gradkeel and with each installed peer.

    python -m benchmarks.traps            # prints the table
    python -m benchmarks.traps --write    # also writes it into docs/comparison.md

Nothing here is claimed, everything is run. The oracle is float64, one process, the window's items as one batch. A
peer is used as its own documentation shows it; where a trap is about something that a peer has no words for, the
cell says so.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import math
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradkeel as gk

from benchmarks.pages import put
from benchmarks.trap_trainers import TRAINERS, Batch, Train, exact, make_batches, make_model


@dataclass(frozen=True)
class Cell:
    """What a contender did in a trap: right, or what went wrong."""

    is_right: bool | None
    words: str

    def __str__(self) -> str:
        """The cell as it stands in the table."""
        mark = {True: "right", False: "**falls in**", None: "-"}[self.is_right]
        return f"{mark}: {self.words}" if self.words else mark

    @classmethod
    def of(cls, is_right: bool, wrong: str) -> "Cell":
        """A cell that needs words only for what went wrong."""
        return cls(is_right, "" if is_right else wrong)


def compare(
    train: Train, batches: list[Batch], counted: list[Batch], steps: int, bound: float | None
) -> Cell:
    """Train on micro-batches and compare the update with the oracle's on those that should count."""
    start = nn.utils.parameters_to_vector(make_model().parameters()).detach().double()
    want = exact(counted, steps, bound) - start
    got = train(batches, steps, bound).double() - start
    error = float((got - want).norm() / want.norm())
    # float32 on both sides of a few additions: rounding is some 1e-7, and what is counted wrongly 0.1 and more.
    return Cell.of(
        error < 1e-5, f"off by {error:.2g}" if math.isfinite(error) else "the weights are NaN from then on"
    )


def same_as_oracle(train: Train, counts: Sequence[int], steps: int, bound: float | None) -> Cell:
    """Micro-batches of these sizes, all of which count."""
    batches = make_batches(counts)
    return compare(train, batches, batches, steps, bound)


def skips_nonfinite(train: Train) -> Cell:
    """One NaN target in the first of two windows: the second one's update should be all that happens."""
    batches = make_batches([4, 4])
    batches[0] = (batches[0][0], torch.full((4, 1), math.nan))
    return compare(train, batches, batches[1:], 1, 1.0)


def both(trap: Callable[..., Cell]) -> tuple[Cell, Cell]:
    """A trap with the guard, and without."""
    return trap(guarded=True), trap(guarded=False)


TRAINING_TRAPS: dict[str, Callable[[Train], Cell]] = {
    "1 partition_invariance: micro-batches of 3 and 50 items": lambda t: same_as_oracle(t, [3, 50], 2, None),
    "1 the same, clipped": lambda t: same_as_oracle(t, [3, 50], 2, 0.5),
    "2 short_last_window: 7 equal micro-batches, window 4": lambda t: same_as_oracle(t, [4] * 7, 4, None),
    "3 zero_weight: a micro-batch without items": lambda t: same_as_oracle(t, [3, 0], 2, None),
    "8 clip_once_per_window: 4 equal micro-batches, clipped": lambda t: same_as_oracle(t, [4] * 4, 4, 0.5),
    "10 nonfinite_skip: one NaN batch": skips_nonfinite,
}


# ---- clipping functions: gradients in, clipped gradients out ---------------------------------------------------


def _leaf(values: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(
        torch.zeros_like(values), requires_grad=values.is_floating_point() or values.is_complex()
    )
    parameter.grad = values.clone()
    return parameter


def _clipped_norm(clip: Callable[..., Tensor], gradients: list[Tensor], norm: float) -> Cell:
    """Clip to norm 1: the returned norm should be ``norm``, the clipped one 1 (to the dtype's rounding)."""
    parameters = [_leaf(g) for g in gradients]
    returned = float(clip(parameters, 1.0))
    after = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
    is_right = math.isclose(returned, norm, rel_tol=1e-3) and math.isclose(after, 1.0, rel_tol=1e-2)
    return Cell.of(is_right, f"norm {returned:.4g}, after clipping {after:.4g}")


def _keeps_finite_entries(clip: Callable[..., Tensor]) -> Cell:
    parameters = [_leaf(torch.tensor([1.0, 2.0])), _leaf(torch.tensor([math.inf, 1.0]))]
    clip(parameters, 1.0)
    left = parameters[0].grad
    return Cell(
        is_right=bool(torch.equal(left, torch.tensor([1.0, 2.0]))),
        words=f"[1, 2] beside an inf becomes {left.tolist()}",
    )


def _tied(clip: Callable[..., Tensor]) -> Cell:
    parameter = _leaf(torch.tensor([3.0, 4.0]))
    norm = float(clip([parameter, parameter], 100.0))
    return Cell(is_right=norm == 5.0, words=f"norm of [3, 4] given twice is {norm:.4g}")


def _negative(clip: Callable[..., Tensor]) -> Cell:
    parameter = _leaf(torch.tensor([3.0, 4.0]))
    try:
        clip([parameter], -1.0)
    except (TypeError, ValueError) as error:
        return Cell(is_right=True, words=type(error).__name__)
    return Cell(
        is_right=False,
        words=f"max_norm=-1 turns [3, 4] into {[round(v, 3) for v in parameter.grad.tolist()]}",
    )


def _sparse(clip: Callable[..., Tensor]) -> Cell:
    parameter = nn.Parameter(torch.zeros(3, 1))
    parameter.grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 2]]), torch.tensor([[1.0], [2.0], [4.0]]), (3, 1)
    )
    try:
        norm = float(clip([parameter], 1.0))
    except (RuntimeError, NotImplementedError) as error:
        return Cell(is_right=False, words=type(error).__name__)
    return Cell(is_right=math.isclose(norm, 5.0, rel_tol=1e-6), words=f"norm {norm:.4g}")


def _complex_value(clip_value: Callable[..., None]) -> Cell:
    parameter = _leaf(torch.tensor([3.0 + 0.5j]))
    try:
        clip_value([parameter], 1.0)
    except RuntimeError as error:
        return Cell(is_right=False, words=type(error).__name__)
    return Cell(is_right=complex(parameter.grad[0]) == 1.0 + 0.5j, words="")


def function_traps() -> dict[str, tuple[Cell, Cell]]:
    """Each trap of the clipping functions for gradkeel and for torch, which the other peers call."""
    half = [torch.full((1000,), 3000.0, dtype=torch.float16)]
    tests: dict[str, Callable[[Callable[..., Tensor]], Cell]] = {
        "12 finite_overflow_fp32: 100 entries of 1e20": lambda c: _clipped_norm(
            c, [torch.full((100,), 1e20)], 1e21
        ),
        "12 finite_underflow_fp32: 100 entries of 1e-25, bound 1": _underflow,
        "13 finite_overflow_fp16: 1,000 entries of 3,000": lambda c: _clipped_norm(c, half, 94868.3),
        "10 one inf beside finite entries": _keeps_finite_entries,
        "19 tied_parameters: a parameter given twice": _tied,
        "23 inputs: a negative bound": _negative,
        "25 sparse: duplicate indices": _sparse,
        "12 one entry of 2e19, clipped by norm 1": lambda c: _clipped_norm(c, [torch.tensor([2e19])], 2e19),
        "43 conjugate_gradients: the gradient of w.conj() * x": _conjugate,
        "59 gradients in one place: those of p + q": _in_one_place,
        "59 a tiny factor: entries of 1e38, bound 1e-8": _tiny_factor,
    }
    table = {name: (test(gk.clip_grad_norm_), test(nn.utils.clip_grad_norm_)) for name, test in tests.items()}
    table["37 complex: clipped by value"] = (
        _complex_value(gk.clip_grad_value_),
        _complex_value(nn.utils.clip_grad_value_),
    )
    return table


def _conjugate(clip: Callable[..., Tensor]) -> Cell:
    parameter = nn.Parameter(torch.tensor([1.0 + 1.0j, 2.0]))
    (parameter.conj() * torch.tensor([3.0j, 4.0])).real.sum().backward()
    try:
        norm = float(clip([parameter], 1.0))
    except RuntimeError as error:
        return Cell(is_right=False, words=type(error).__name__)
    after = float(torch.linalg.vector_norm(parameter.grad))
    is_right = math.isclose(norm, 5.0, rel_tol=1e-6) and math.isclose(after, 1.0, rel_tol=1e-5)
    return Cell.of(is_right, f"norm {norm:.4g}, after clipping {after:.4g}")


def _in_one_place(clip: Callable[..., Tensor]) -> Cell:
    """``torch.autograd.grad`` gives one tensor for both."""
    parameters = [nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2)]
    found = torch.autograd.grad((parameters[0] + parameters[1]).square().sum(), parameters)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    clip(parameters, 1.0)
    after = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
    return Cell.of(math.isclose(after, 1.0, rel_tol=1e-5), f"clipped to 1 they have the norm {after:.3g}")


def _tiny_factor(clip: Callable[..., Tensor]) -> Cell:
    parameter = _leaf(torch.full((4,), 1e38))
    clip([parameter], 1e-8)
    after = float(parameter.grad.double().norm())
    return Cell.of(math.isclose(after, 1e-8, rel_tol=1e-5), f"after clipping {after:.3g}")


def _underflow(clip: Callable[..., Tensor]) -> Cell:
    norm = float(clip([_leaf(torch.full((100,), 1e-25))], 1.0))
    return Cell(is_right=math.isclose(norm, 1e-24, rel_tol=1e-5), words="" if norm else "norm 0")


# ---- mixed precision -------------------------------------------------------------------------------------------


def loss_scale_traps() -> dict[str, tuple[Cell, Cell]]:
    """The loss scale: torch's idiom, with its one line and without, against the guard, where there is no such line."""

    def update(*, guarded: bool, unscales: bool = False) -> Cell:
        weight = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        if guarded:
            gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        scaler.scale((weight * torch.tensor([30.0, 40.0])).sum()).backward()
        if unscales:
            scaler.unscale_(optimizer)
        if not guarded:
            nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        norm = float(weight.detach().norm())
        return Cell(is_right=math.isclose(norm, 1.0, rel_tol=1e-5), words=f"the update's norm is {norm:.2g}")

    def low_precision(*, guarded: bool, dtype: torch.dtype | None = None) -> Cell:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        parts = [1.0] + [0.003] * 256
        if guarded:
            accumulate = gk.Accumulator(gk.attach(optimizer, None), len(parts), accumulate_dtype=dtype)
            for micro in accumulate(parts):
                with micro:
                    micro.backward(weight.sum() * micro.batch, weight=1 / len(parts))
                if micro.closes_window:
                    optimizer.step()
        else:
            for part in parts:
                (weight.sum() * part).backward()
            optimizer.step()
        total = -float(weight.detach())
        asked = ", with accumulate_dtype=torch.float32" if dtype is not None else ""
        return Cell(is_right=math.isclose(total, 1.768, rel_tol=2**-8), words=f"sum {total:.4g}{asked}")

    return {
        "6 unscale_order: loss scale 65536, bound 1, scaler.unscale_ as torch's documentation shows it": both(
            partial(update, unscales=True)
        ),
        "6 the same, and that line forgotten": both(update),
        "14 low_precision_accumulation: 1 + 256 x 0.003 in bfloat16": (
            low_precision(guarded=True, dtype=torch.float32),
            low_precision(guarded=False),
        ),
        "14 the same, nothing asked for": both(low_precision),
    }


# ---- accumulation by hand --------------------------------------------------------------------------------------


class _OutOfMemory(torch.autograd.Function):
    """A backward that finds no memory at its first node, before any gradient has changed."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise torch.OutOfMemoryError


def accumulation_traps() -> dict[str, tuple[Cell, Cell]]:
    """What the idiom ``(loss / steps).backward()`` makes of windows that it has no words for."""

    def failed(*, guarded: bool) -> Cell:
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        losses = [
            lambda: 4.0 * weight.sum(),
            lambda: _OutOfMemory.apply(4.0 * weight.sum()),
            lambda: 4.0 * weight.sum(),
        ]
        if guarded:
            for micro in gk.Accumulator(gk.attach(optimizer, None), len(losses))(losses):
                with contextlib.suppress(torch.OutOfMemoryError), micro:
                    micro.backward(micro.batch(), weight=2)
        else:
            for loss in losses:
                with contextlib.suppress(torch.OutOfMemoryError):
                    (loss() / 2 / len(losses)).backward()
        optimizer.step()
        moved = -float(weight.detach())
        return Cell(is_right=math.isclose(moved, 2.0, rel_tol=1e-6), words=f"the update is {moved:.4g}")

    def two_denominators(*, guarded: bool) -> Cell:
        counts = [(3, 1), (50, 2)]  # tokens and sequences
        weight = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        if guarded:
            accumulate = gk.Accumulator(gk.attach(optimizer, None), len(counts), per=("token", "sequence"))
            for micro in accumulate(counts):
                tokens, sequences = micro.batch
                with micro:
                    micro.backward(weight[0] * tokens * sequences, weight=tokens, per="token")
                    micro.backward(weight[1] * sequences * tokens, weight=sequences, per="sequence")
        else:
            for tokens, sequences in counts:  # each term's mean, and the mean of these
                ((weight[0] * sequences + weight[1] * tokens) / len(counts)).backward()
        optimizer.step()
        want = torch.tensor([103 / 53, 103 / 3])  # sums over the window's tokens, and over its sequences
        error = float((-weight.detach() - want).norm() / want.norm())
        return Cell.of(error < 1e-6, f"off by {error:.2g}")

    return {
        "44 failed_micro_batch_is_not_counted: the second of 3 finds no memory": both(failed),
        "45 two denominators in one window: per token and per sequence": both(two_denominators),
    }


# ---- skips ------------------------------------------------------------------------------------------------------


class _Counting(torch.optim.SGD):
    """An optimizer that counts its steps in its groups, and turns missing gradients into zeros, as several do."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                parameter.mul_(1 - 0.1 / group["k"])
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad)


def skip_traps() -> dict[str, tuple[Cell, Cell]]:
    """A step that must not be made, under torch's GradScaler, whose skip is the only one that torch has."""

    def spoiled(*, guarded: bool) -> Cell:
        weight = nn.Parameter(torch.ones(2))
        optimizer = _Counting([weight], lr=1.0)
        if guarded:
            gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
        (weight * torch.tensor([1.0, math.nan])).sum().backward()
        if not guarded:
            nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        return Cell.of(torch.equal(weight.detach(), torch.ones(2)), f"the weights are {weight.tolist()}")

    def for_ever(*, guarded: bool) -> Cell:
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        if guarded:
            gk.attach(optimizer, None)
        scaler = torch.amp.GradScaler("cpu")
        for step in range(300):
            optimizer.zero_grad()
            scaler.scale((weight * math.nan).sum()).backward()
            try:
                scaler.step(optimizer)
            except gk.TooManySkipsError:
                return Cell(is_right=True, words=f"TooManySkipsError at step {step + 1}")
            scaler.update()
        return Cell(is_right=False, words="300 steps skipped without a word")

    def buffers(*, guarded: bool) -> Cell:
        model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if guarded:
            gk.attach(optimizer, None, model=model)
        scaler = torch.amp.GradScaler("cpu")
        for batch in (torch.randn(4, 2), torch.full((4, 2), math.inf), torch.randn(4, 2)):
            optimizer.zero_grad()
            scaler.scale(model(batch).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        found = model.eval()(torch.zeros(1, 2)).detach()
        return Cell.of(bool(found.isfinite().all()), "model.eval() gives NaN from then on")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.SkippedStepWarning)
        return {
            "47 skip_runs_no_step: NaN, an optimizer that counts its steps": both(spoiled),
            "48 scaler_is_not_an_excuse: a network that gives NaN for ever": both(for_ever),
            "56 buffers_on_skip: BatchNorm sees a batch with inf": both(buffers),
        }


# ---- the table ------------------------------------------------------------------------------------------------


def peer_cells(python: Path, peer: str) -> dict[str, Cell]:
    """What optax or Paddle does, run in the environment of the peers; empty where there is none."""
    if not python.exists():
        return {}
    script = Path(__file__).with_name(f"traps_{peer}.py")
    found = json.loads(subprocess.run([python, script], capture_output=True, text=True, check=True).stdout)
    cells = {name: Cell(is_right=right, words=words) for name, (right, words) in found["cells"].items()}
    return {**cells, "version": Cell(is_right=None, words=found["version"])}


def training_table() -> list[str]:
    """One row a trap, one column a contender."""
    lines = ["| trap | " + " | ".join(TRAINERS) + " |", "|---" * (len(TRAINERS) + 1) + "|"]
    for name, trap in TRAINING_TRAPS.items():
        cells = []
        for train in TRAINERS.values():
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    cells.append(str(trap(train)))
                except ImportError as error:
                    cells.append(str(Cell(is_right=None, words=f"{error.name} is not installed")))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def single_calls() -> dict[str, tuple[Cell, Cell]]:
    """The traps in which only torch is a peer, or what calls it."""
    return {**function_traps(), **loss_scale_traps(), **accumulation_traps(), **skip_traps()}


def function_table(optax: dict[str, Cell], paddle: dict[str, Cell]) -> list[str]:
    """The traps of single calls, where every other peer calls torch's function."""
    lines = ["| trap | gradkeel | torch (and whoever calls it) | optax | Paddle |", "|---|---|---|---|---|"]
    for name, (mine, theirs) in single_calls().items():
        others = [
            next((str(cell) for start, cell in peer.items() if name.startswith(start)), "-")
            for peer in (optax, paddle)
        ]
        lines.append(f"| {name} | {mine} | {theirs} | {' | '.join(others)} |")
    if "partition" in optax:
        lines.append(
            "| 1 partition_invariance: means of 3 and 50 items | right (above) | (above) | "
            f"{optax['partition']} | - |"
        )
    return lines


def versions() -> str:
    """What was run, in one line."""
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "accelerate", "lightning", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def main() -> None:
    """Run everything and print it."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--peers-python", type=Path, default=Path(".venv-peers/bin/python"), help="a Python that has optax"
    )
    arguments.add_argument("--write", action="store_true", help="write the tables into docs/comparison.md")
    chosen = arguments.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # peers warn of much that is not the trap
    optax, paddle = (peer_cells(chosen.peers_python, peer) for peer in ("optax", "paddle"))
    others = "".join(
        f", {name} {cells['version'].words}"
        for name, cells in (("optax", optax), ("paddlepaddle", paddle))
        if cells
    )
    lines = [
        f"Written by `python -m benchmarks.traps --write` on {datetime.now(UTC).date().isoformat()}",
        f"with {versions()}{others}.",
        "Each cell is a run; the oracle is float64, one process, the window's items as one batch.",
        "",
        "### Training loops, each as its own documentation shows it",
        "",
        *training_table(),
        "",
        "### Single calls",
        "",
        *function_table(optax, paddle),
    ]
    text = "\n".join(lines)
    sys.stdout.write(text + "\n")
    if chosen.write:
        put("comparison.md", "traps", text)


if __name__ == "__main__":
    main()
