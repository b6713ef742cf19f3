"""Measure into a JSON file, or write one into docs/benchmarks.md."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import pages


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
    """Put the tables between the marks of docs/benchmarks.md: ratios of all, and all times of the first two."""
    lines = [f"{found['where']}; [all times](data/benchmarks-gpu.json).", ""]
    tables = found["tables"]
    kinds = {title.rsplit(", ", 2)[0]: None for title in tables if title.count(", ") > 2}
    for kind in kinds:
        lines += ratios(
            kind, {title: table for title, table in tables.items() if title.startswith(f"{kind}, ")}
        )
    whole = [title for title in tables if title.startswith("training")]
    for title in [*list(tables)[:2], *whole]:
        lines += rows(title, tables[title])
    text = "\n".join(lines).rstrip()
    pages.put("benchmarks.md", "gpu", f"\n{text}\n")
    data = pages.DOCS / "data" / "benchmarks-gpu.json"
    data.parent.mkdir(exist_ok=True)
    data.write_text(json.dumps(found, indent=1), encoding="utf-8")


def ratios(kind: str, tables: dict[str, dict[str, Any]]) -> list[str]:
    """The wall times of one kind as multiples of torch's: a column for each dtype and side of the bound."""
    heads = [title.removeprefix(f"{kind}, ").removesuffix(" the bound") for title in tables]
    lines = [
        f"**{kind}: wall time, x torch**",
        "",
        f"| | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for name in dict.fromkeys(name for table in tables.values() for name in table):
        cells = [f"{table[name]['ratio']:.2f}" if name in table else "" for table in tables.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    baseline = [next(iter(table.values()))["wall"] for table in tables.values()]
    return [*lines, f"| torch, ms | {' | '.join(f'{ms:.3g}' for ms in baseline)} |", ""]


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
