"""Asks the questions, each in a process of its own, prints the answers, and writes them into docs/benchmarks.md."""

import argparse
import importlib.metadata
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch

from gradkeel.bench.machine import machine

from benchmarks import pages
from benchmarks.speed.answer import Answer, Curve, Target, asked, markdown, ratio

QUESTIONS = (
    "clip", "step", "bf16", "tiny", "small", "adaptive", "agc", "accumulate", "recording", "autopsy", "training",
    "growth", "memory", "precision", "ranks",
)  # fmt: skip
PEERS = ("accelerate", "jax", "optax", "paddlepaddle")


def in_words(question: str) -> str:
    """The question itself, which is its module's docstring."""
    return (import_module(f"benchmarks.speed.{question}").__doc__ or "").strip()


def section(question: str, answer: Answer) -> list[str]:
    """What is said of one question."""
    lines = [f"### {in_words(question)}", ""]
    for table in answer.tables:
        lines += markdown(table)
    for curve in answer.curves:
        lines += [f"![Time over {curve.xlabel}](images/benchmarks-{curve.name}.png)", ""]
    return [*lines, *answer.rows, *[""] * bool(answer.rows)]


def targets(answers: Mapping[str, Answer]) -> list[str]:
    """All targets in one table."""
    found = [target for answer in answers.values() for target in answer.targets]
    if not found:
        return []
    lines = ["| target | at most | measured | |", "|---|---|---|---|"]
    lines += [f"| {one.words} | {one.limit:g} | {measured(one)} | {one.verdict} |" for one in found]
    return [*lines, ""]


def measured(one: Target) -> str:
    """Median and quartiles, or the number that there is."""
    if one.limit < 1e-3:
        return f"{one.measured.median:.0e}"
    return ratio(one.measured, digits=2 if round(one.limit, 2) == one.limit else 4)


def where() -> str:
    """The machine and the versions, in one sentence."""
    installed = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    versions = [f"{name} {installed[name]}" for name in PEERS if name in installed]
    return f"{datetime.now(UTC):%Y-%m-%d}: {', '.join([machine(torch.device('cpu')), *versions])}."


def noise(answers: Mapping[str, Answer]) -> str:
    """How far the controls are off, in one sentence."""
    tables = [table for answer in answers.values() for table in answer.tables]
    off = [table.title for table in tables if not 0.95 <= table.race.control.median <= 1.05]
    words = f"Baselines against themselves: medians within 5% of 1 in {len(tables) - len(off)} of {len(tables)} tables"
    return f"{words}; where they are not, ratios mean nothing: {'; '.join(off)}." if off else f"{words}."


def draw(curves: Sequence[Curve], folder: Path) -> None:
    """Write each curve as a picture."""
    from matplotlib.ticker import EngFormatter

    from gradkeel.explain.smoothness.figures import picture, plain_ticks, save
    from gradkeel.page.figures import COLORS

    for curve in curves:
        figure = picture(6.4, 4.2)
        axes = figure.add_subplot()
        for (name, points), color in zip(curve.lines.items(), COLORS, strict=False):
            axes.loglog(*zip(*points, strict=True), "o-", color=color, label=name, markersize=4)
        axes.set(xlabel=curve.xlabel, ylabel="ms", title=curve.title)
        plain_ticks(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(frameon=False)
        save(figure, folder / f"benchmarks-{curve.name}.png")


def main() -> None:
    """Ask, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"some of: {', '.join(QUESTIONS)}")
    parser.add_argument(
        "--rounds", type=int, default=30, metavar="N", help="how often each contender is timed"
    )
    parser.add_argument(
        "--write", action="store_true", help="write docs/benchmarks.md; all questions are asked"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.questions) - set(QUESTIONS)
    if unknown or (arguments.write and arguments.questions):
        parser.error(
            f"unknown question {unknown.pop()}" if unknown else "--write takes no questions: it asks all"
        )
    answers: dict[str, Answer] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for question in arguments.questions or QUESTIONS:
            answers[question] = processes.submit(asked, question, arguments.rounds).result()
            print("\n".join(section(question, answers[question])), flush=True)
    print("\n".join(targets(answers)))
    if arguments.write:
        write(answers)


def write(answers: Mapping[str, Answer]) -> None:
    """Put everything between the marks of docs/benchmarks.md, and the pictures beside it."""
    lines = [where(), noise(answers), "", *targets(answers)]
    for question, answer in answers.items():
        lines += section(question, answer)
    found = "\n".join(lines).rstrip()
    pages.put("benchmarks.md", "benchmarks", f"\n{found}\n")
    draw([curve for answer in answers.values() for curve in answer.curves], pages.DOCS / "images")


if __name__ == "__main__":
    main()
