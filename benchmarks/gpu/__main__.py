"""Measure into a JSON file, or write one into docs/benchmarks.md."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def measured(rounds: int, only: str) -> dict[str, Any]:
    """All tables whose title contains ``only``."""
    import torch

    from gradkeel.bench.machine import machine

    from benchmarks.gpu.contest import contest
    from benchmarks.gpu.workloads import all_tables

    tables = {}
    for title, entrants, count in all_tables(rounds):
        if only not in title:
            continue
        started = time.perf_counter()
        found = contest(list(entrants()), rounds=count)
        tables[title] = {name: dataclasses.asdict(times) for name, times in found.items()}
        print("\n".join(rows(title, tables[title])), f"({time.perf_counter() - started:.0f} s)", flush=True)
    where = f"{time.strftime('%Y-%m-%d')}: {machine(torch.device('cuda'))}, {rounds} rounds"
    return {"where": where, "tables": tables}


def rows(title: str, table: dict[str, Any]) -> list[str]:
    """One table in Markdown."""
    lines = [f"**{title}**", "", "| | wall, ms | x torch | host, ms | GPU, ms |", "|---|---|---|---|---|"]
    for name, one in table.items():
        low, high = one["quartiles"]
        ratio = f"{one['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {one['wall']:.3g} | {ratio} | {one['host']:.3g} | {one['device']:.3g} |")
    return [*lines, ""]


def write(found: dict[str, Any]) -> None:
    """Put the tables between the marks of docs/benchmarks.md."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    lines = [f"{found['where']}.", ""]
    for title, table in found["tables"].items():
        lines += rows(title, table)
    text = "\n".join(lines).rstrip()
    DOCS.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Measure or write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=sys.modules["benchmarks.gpu"].__doc__
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="measure into FILE; needs a CUDA GPU of 60 GB"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write FILE's tables into docs/benchmarks.md"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="how often each entrant is timed")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="only tables whose title contains these words"
    )
    arguments = parser.parse_args()
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps(measured(arguments.rounds, arguments.only), indent=1), encoding="utf-8"
        )
    if arguments.write is not None:
        write(json.loads(arguments.write.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
