"""Who finds what in a run with a fault in it: explain, its autopsy, and other tools."""

import contextlib
import importlib.util
import math
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gradkeel.errors import TooManySkipsError
from gradkeel.explain import explain

from benchmarks.faults.held_out import HELD_OUT
from benchmarks.faults.plant import CAUSES, PROGRAMS, Run, Truth, plant

NEAR = 3
PEERS = ("threshold", "runmedic", "losslint", "anomaly mode", "sherlorch")


@dataclass(frozen=True)
class Score:
    """What was right on one run; None where nothing was to be said.

    Attributes:
        family, fault, optimizer: of the run.
        is_healthy, blew_up: what the run was.
        verdict: what explain said.
        is_found: whether it was anything but healthy.
        is_right, is_dated, is_placed, has_cause: verdict, onset, one of the first three parameters, cause.
        peers: who found that something was wrong, by name; those that could not be asked are left out.
    """

    family: str
    fault: str
    optimizer: str
    is_healthy: bool
    blew_up: bool
    verdict: str
    is_found: bool
    is_right: bool | None
    is_dated: bool | None
    is_placed: bool | None
    has_cause: bool | None
    peers: dict[str, bool]


def score(family: str, fault: str, seed: int) -> Score:
    """Train with the fault, and ask everybody."""
    with tempfile.TemporaryDirectory() as folder:
        truth = plant(family, fault, seed, Path(folder))
        found = explain(Path(folder) / f"{family}-{fault}-{seed}.keel")
        peers = _peers(truth, seed, Path(folder))
    diagnosis, healthy = found.diagnosis, fault.startswith("healthy")
    asked = bool(truth.verdicts)
    harmful = asked and not healthy
    samples = {truth.sample, *(one.sample for one in found.autopsies if one.cause == diagnosis.cause)}
    dated = (
        diagnosis.onset is not None and truth.step is not None and abs(diagnosis.onset - truth.step) <= NEAR
    )
    return Score(
        family, fault, truth.optimizer, healthy, truth.blew_up and not healthy, str(diagnosis.verdict),
        diagnosis.verdict != "healthy", str(diagnosis.verdict) in truth.verdicts if asked else None,
        dated if harmful and truth.step is not None else None,
        bool(set(diagnosis.where) & set(truth.place)) if harmful and truth.place else None,
        diagnosis.cause in CAUSES[fault] and len(samples) == 1 if harmful and fault in CAUSES else None, peers,
    )  # fmt: skip


def _peers(truth: Truth, seed: int, folder: Path) -> dict[str, bool]:
    found = {"threshold": _threshold(truth.norms)}
    table = folder / "run.csv"
    rows = (
        f"{i},{a!r},{b!r}" for i, (a, b) in enumerate(zip(truth.losses, truth.norms, strict=False), start=1)
    )
    table.write_text("\n".join(["step,loss,grad_norm", *rows]), encoding="utf-8")
    for name, arguments, wrong in (
        ("runmedic", ["diagnose", str(table), "--json", "--fail-on", "critical"], 1),
        ("losslint", ["check", str(table)], 1),
    ):
        program = Path(sys.executable).parent / name
        if program.exists():
            done = subprocess.run([program, *arguments], capture_output=True, check=False)  # a peer
            found[name] = done.returncode == wrong
    bad = not all(map(math.isfinite, (*truth.losses, *truth.norms)))
    found["anomaly mode"] = bad and _again(truth, seed, folder / "anomaly", _anomaly)
    if importlib.util.find_spec("sherlorch"):
        found["sherlorch"] = bad and _again(truth, seed, folder / "sherlorch", _sherlorch)
    return found


def _threshold(norms: Sequence[float]) -> bool:
    """An alert at ten times the median of the fifty norms before."""
    for i in range(8, len(norms)):
        past = [n for n in norms[max(0, i - 50) : i] if math.isfinite(n)]
        if not math.isfinite(norms[i]) or (past and norms[i] > 10 * statistics.median(past)):
            return True
    return False


def _again(truth: Truth, seed: int, folder: Path, step: Callable[[Run], bool]) -> bool:
    """Whether a tool that watches each pass speaks up in the same run again."""
    folder.mkdir()
    run = Run(truth.family, truth.fault, seed, folder)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(run.guard.detach)
        for run.now in range(1, len(truth.losses) + 1):
            run.prepare()
            if step(run):
                return True
            try:
                for one in run.optimizers:
                    one.step()
            except TooManySkipsError:
                return False
            for one in run.optimizers:
                one.zero_grad()
    return False


def _anomaly(run: Run) -> bool:
    try:
        with torch.autograd.set_detect_anomaly(True):
            run.loss(run.batch()).backward()
    except RuntimeError:
        return True
    return False


def _sherlorch(run: Run) -> bool:
    import sherlorch

    with sherlorch.trace() as tracker:
        loss = run.loss(run.batch())
        loss.backward()
    return bool(tracker.has_issue(loss))


def score_one(job: tuple[str, str, int]) -> Score:
    """The score of a family, fault and seed, on one thread."""
    torch.set_num_threads(1)
    return score(*job)


def share(values: Sequence[bool | None]) -> str:
    """How many of those that were asked."""
    known = [value for value in values if value is not None]
    return f"{sum(known)} of {len(known)}" if known else "–"


def tables(scores: Sequence[Score]) -> str:
    """The figures as Markdown."""
    groups = {
        "development": [s for s in scores if s.family not in HELD_OUT],
        "held out": [s for s in scores if s.family in HELD_OUT],
    }
    groups |= {name: [s for s in scores if s.family == name] for name in PROGRAMS}
    lines = [
        "| programs | blow-ups detected | verdict | onset | place | cause | false alarms |",
        "|" + "---|" * 7,
    ]
    for name, own in groups.items():
        if own:
            cells = (
                share([s.is_found for s in own if s.blew_up]), share([s.is_right for s in own if not s.is_healthy]),
                share([s.is_dated for s in own]), share([s.is_placed for s in own]), share([s.has_cause for s in own]),
                share([s.is_found for s in own if s.is_healthy]),
            )  # fmt: skip
            lines.append(f"| {name}{'*' if name in HELD_OUT else ''} | {' | '.join(cells)} |")
    lines += ["", "| fault | verdict | onset | place | cause |", "|" + "---|" * 5]
    for fault in dict.fromkeys(s.fault for s in scores):
        for label in ("development", "held out"):
            own = [s for s in groups[label] if s.fault == fault]
            if own:
                cells = (
                    share([getattr(s, key) for s in own])
                    for key in ("is_right", "is_dated", "is_placed", "has_cause")
                )
                lines.append(f"| {fault}, {label} | {' | '.join(cells)} |")
    lines += ["", "| who | blow-ups detected | of them, held out | false alarms |", "|" + "---|" * 4]
    everybody: dict[str, Callable[[Score], bool | None]] = {"gradkeel": lambda s: s.is_found}
    everybody |= {name: lambda s, name=name: s.peers.get(name) for name in PEERS}
    for name, ask in everybody.items():
        cells = (
            share([ask(s) for s in scores if s.blew_up]),
            share([ask(s) for s in groups["held out"] if s.blew_up]),
            share([ask(s) for s in scores if s.is_healthy]),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    wrong = [s for s in scores if s.is_right is False]
    lines += ["", "What was called wrongly: " + ("; ".join(
        f"{s.family}, {s.optimizer}, `{s.fault}`: `{s.verdict}`" for s in wrong) or "nothing") + "."]  # fmt: skip
    return "\n".join(lines)
