"""Plants small faults in the core, one at a time, and says which of them no test notices."""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.mutants import cover, find, page
from benchmarks.mutants import tree as trees
from benchmarks.mutants.choose import plan, tests_of
from benchmarks.mutants.judge import Judge, Verdict

TREE = Path(__file__).resolve().parents[2]
DOCS = "docs/mutants.md"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    result.add_argument(
        "--seed", type=int, help="decides the sample; drawn, and printed, where it is left out"
    )
    result.add_argument("--sample", type=int, default=150, metavar="N", help="how many mutants (150)")
    result.add_argument(
        "--only", metavar="PATTERN", help="of modules whose path this regular expression matches"
    )
    result.add_argument(
        "--tests", nargs="+", default=[], metavar="PATH", help="which tests must notice (all)"
    )
    result.add_argument("--list", action="store_true", help="show the sample and run nothing")
    result.add_argument("--write", action="store_true", help=f"write {DOCS}")
    result.add_argument(
        "--budget", type=float, default=page.BUDGET, metavar="SECONDS", help="of tests for a mutant (60)"
    )
    result.add_argument("--workers", type=int, default=2, metavar="N", help="mutants at a time (2)")
    return result


def main() -> None:
    """Draw the sample, draw the map where there is none, judge, report."""
    arguments = parser().parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    paths = find.selected(find.core(TREE), arguments.only)
    if not paths or arguments.sample < 1 or arguments.workers < 1:
        sys.exit(
            "nothing to do: --only must match a module of the core, --sample and --workers be at least 1"
        )
    mutants, lines = find.sample(TREE, paths, seed, arguments.sample)
    print(f"seed {seed}: {len(mutants)} mutants of {lines} lines in {len(paths)} modules", flush=True)
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.path}:{mutant.line}: {mutant.operator}: {mutant.diff}")
        return
    run = page.Run(seed, len(mutants), arguments.only, arguments.budget, 0.0, lines, tuple(arguments.tests))
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        judged(mutants, run, arguments)
    except (cover.MapError, trees.TreeError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def stop(number: int, frame: object) -> None:
    """Handle the first signal; a second one must not disturb the cleaning up."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


def judged(mutants: Sequence[find.Mutant], run: page.Run, arguments: argparse.Namespace) -> None:
    """Judge the mutants in copies of the tree, which go at the end, and say what came of them."""
    begin = time.monotonic()
    processes = trees.Processes()
    with tempfile.TemporaryDirectory(prefix="gradkeel-mutants-") as name:
        folder = Path(name)
        key = cover.key_of(TREE, arguments.tests)
        copies = [folder / f"tree-{i}" for i in range(arguments.workers)]
        for copy in copies:
            trees.copy(TREE, copy)
        found = the_map(copies[0], key, processes, arguments)
        judge = Judge(found, processes, copies, folder)
        cases = []
        for mutant in mutants:
            source = (copies[0] / mutant.path).read_text(encoding="utf-8")
            cases.append(
                (mutant, plan(tests_of(found, mutant, source), mutant.path, found, arguments.budget))
            )
        said = Said(len(cases))
        try:
            verdicts = doubted(judge.all(cases, said), judge)
        except KeyboardInterrupt:
            print("\n".join(page.table(said.verdicts)))
            raise
    report(verdicts, replace(run, minutes=(time.monotonic() - begin) / 60), arguments.write)


def the_map(copy: Path, key: str, processes: trees.Processes, arguments: argparse.Namespace) -> cover.Map:
    """The map of this tree, from build/ or drawn."""
    found = cover.load(TREE / cover.FOLDER, key)
    if found is None:
        cover.writable(TREE / cover.FOLDER)
        print("running the tests once, to see which test runs which line ...", flush=True)
        begin = time.monotonic()
        found = cover.draw(copy, processes, arguments.workers, arguments.tests)
        cover.save(found, TREE / cover.FOLDER, key)
        print(f"... {len(found.seconds)} tests in {time.monotonic() - begin:.0f} seconds", flush=True)
    if found.failed:
        print("left out, for they fail without any fault:", *found.failed, sep="\n  ", flush=True)
    return found


class Said:
    """Prints each verdict when it comes."""

    def __init__(self, count: int) -> None:
        self.verdicts: list[Verdict] = []
        self._count = count

    def __call__(self, verdict: Verdict) -> None:
        """Note the verdict and print it on a line."""
        self.verdicts.append(verdict)
        words = f"{len(self.verdicts)}/{self._count} {verdict.outcome} in {verdict.seconds:.0f} s"
        by = f"  [{verdict.by}]" if verdict.by else ""
        mutant = verdict.mutant
        print(f"{words}: {mutant.path}:{mutant.line}: {mutant.diff}{by}", flush=True)


def doubted(verdicts: Sequence[Verdict], judge: Judge) -> list[Verdict]:
    """The verdicts, unclear where the test that spoke fails without the fault as well."""
    witnesses = sorted({one.by for one in verdicts if one.outcome != "survived" and "::" in one.by})
    failing = set(judge.failing(witnesses)) if witnesses else set()
    return [replace(one, outcome="unclear") if one.by in failing else one for one in verdicts]


def report(verdicts: Sequence[Verdict], run: page.Run, is_written: bool) -> None:
    """Print the survivors and the table, and write the page."""
    survivors = sorted(page.survivor(one) for one in verdicts if one.outcome == "survived")
    print("\nsurvivors:", *survivors, "", *page.table(verdicts), sep="\n")
    print(f"\n{run.minutes:.1f} minutes; the same again: {run.command}")
    if is_written:
        (TREE / DOCS).write_text(page.page(verdicts, run, TREE), encoding="utf-8")


if __name__ == "__main__":
    main()
