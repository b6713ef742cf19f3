"""What a run says: the score by folder and the survivors, on the terminal and in docs/mutants.md."""

import importlib.metadata
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.mutants.find import OUTSIDE
from benchmarks.mutants.judge import Verdict

OUTCOMES = ("killed", "timed out", "survived", "unclear")
TOOLS = ("mutmut", "coverage", "pytest", "hypothesis")


BUDGET = 60.0
"""Seconds of tests for a mutant, unless told otherwise."""


@dataclass(frozen=True)
class Run:
    """What was asked, and what it took."""

    seed: int
    sample: int
    only: str | None
    budget: float
    minutes: float
    lines: int
    tests: Sequence[str] = ()

    @property
    def command(self) -> str:
        """The command that gives the same sample."""
        only = f" --only '{self.only}'" if self.only else ""
        tests = f" --tests {' '.join(self.tests)}" if self.tests else ""
        budget = "" if self.budget == BUDGET else f" --budget {self.budget:g}"
        return f'make mutants ARGS="--seed {self.seed} --sample {self.sample}{only}{tests}{budget}"'


def score(verdicts: Sequence[Verdict]) -> str:
    """The share of mutants that were noticed."""
    clear = [one for one in verdicts if one.outcome != "unclear"]
    noticed = sum(one.outcome != "survived" for one in clear)
    return f"{noticed / len(clear):.0%}" if clear else "-"


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Counts by folder, as Markdown."""
    outcomes = [one for one in OUTCOMES if one != "unclear" or any(v.outcome == one for v in verdicts)]
    lines = [
        f"| folder | mutants | {' | '.join(outcomes)} | noticed |",
        "|---|" + "---:|" * (len(outcomes) + 2),
    ]
    folders = sorted({one.mutant.folder for one in verdicts})
    rows = [(f"`{folder}`", [one for one in verdicts if one.mutant.folder == folder]) for folder in folders]
    for name, some in [*rows, ("all", list(verdicts))]:
        counts = (sum(one.outcome == outcome for one in some) for outcome in outcomes)
        lines.append(f"| {name} | {len(some)} | {' | '.join(map(str, counts))} | {score(some)} |")
    return lines


def survivor(verdict: Verdict) -> str:
    """One survivor on one line: place and difference."""
    mutant = verdict.mutant
    note = f" ({verdict.by})" if verdict.by else ""
    return f"{mutant.path}:{mutant.line}: {mutant.diff}{note}"


def _survivors(verdicts: Sequence[Verdict]) -> list[str]:
    some = sorted(
        (one for one in verdicts if one.outcome == "survived"), key=lambda v: (v.mutant.path, v.mutant.line)
    )
    if not some:
        return ["None."]
    lines = []
    for one in some:
        note = f" ({one.by})" if one.by else ""
        ticks = "``" if "`" in one.mutant.diff else "`"
        lines.append(f"- {one.mutant.path}:{one.mutant.line}{note}: {ticks}{one.mutant.diff}{ticks}")
    return lines


def where(tree: Path) -> str:
    """Date, commit, versions and machine, in one sentence."""
    import torch

    from gradkeel.bench.machine import machine

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=tree, capture_output=True, text=True, check=False
        ).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "no commit"
    changed = " and changes" if git("status", "--porcelain", "--", "src", "tests") else ""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in TOOLS)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}{changed}: {versions}; {machine(torch.device('cpu'))}."
    )


def page(verdicts: Sequence[Verdict], run: Run, tree: Path) -> str:
    """The whole of docs/mutants.md."""
    from benchmarks.mutants.operators import LEFT_OUT

    only = f" whose path matches `{run.only}`" if run.only else ""
    outside = ", ".join(f"`{name}`" for name in OUTSIDE)
    lines = [
        "# Do the tests notice a fault?",
        "",
        "<!-- written by `make mutants ARGS=--write` -->",
        "",
        "A mutation test plants small faults, one at a time, and runs the tests that touch the faulty line.",
        "A fault that no test notices, a survivor, is a question to the tests, or changes nothing that can be seen.",
        "",
        "<!-- figures -->",
        "```",
        run.command,
        "```",
        "",
        where(tree),
        f"Seed {run.seed}: {len(verdicts)} mutants, one a line, of the core's {run.lines} lines that can be mutated"
        f"{only}; {run.minutes:.0f} minutes.",
        *(["Only some of the tests were asked, so that others may notice a survivor."] if run.tests else []),
        "",
        *table(verdicts),
        "<!-- end of figures -->",
        "",
        "A mutant that makes tests hang has timed out and counts as noticed.",
        "`.` stands for the modules in no folder.",
        "",
        "## Survivors",
        "",
        "<!-- survivors -->",
        *_survivors(verdicts),
        "<!-- end of survivors -->",
        "",
        "## How it is done",
        "",
        "mutmut finds the mutations; the seed draws lines, and one mutant of each.",
        f"The core is `src/gradkeel` without {outside}.",
        "The suite runs once under coverage, whose map says which tests run which line, in the ranks' processes too.",
        "For a line that runs at import the tests of its function, class or module are taken.",
        "The fastest tests are taken, up to the seconds of `--budget`, and rather those of the mutant's own folder; a "
        "survivor says so where slower tests were left out.",
        "A test that fails without the fault as well makes its mutants unclear: they count on neither side.",
        *LEFT_OUT,
    ]
    return "\n".join(lines) + "\n"
