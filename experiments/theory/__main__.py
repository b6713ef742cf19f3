"""``make theory``: run the experiments, print criterion, measurement and verdict, and write the page."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gradkeel.errors import MissingExtraError

from experiments.theory import EXPERIMENTS
from experiments.theory.document import verdict, write


def command(
    only: Annotated[list[str] | None, typer.Option(help="an experiment, such as R5; may be repeated")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="leave out the trainings that take minutes")] = False,
    out: Annotated[Path, typer.Option(help="directory for theory.md and its pictures")] = Path(
        "gradkeel-theory"
    ),
) -> None:
    """Run the experiments on what clipping does, with criteria that were fixed beforehand."""
    chosen = only or [name for name, experiment in EXPERIMENTS.items() if experiment.quick or not quick]
    unknown = [name for name in chosen if name not in EXPERIMENTS]
    if unknown:
        print(
            f"unknown experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    results = []
    for name in chosen:
        result = EXPERIMENTS[name].run()
        results.append(result)
        print(f"{result.id:4} {verdict(result):7} {result.title}\n{'':12} criterion: {result.criterion}")
        print(f"{'':12} measured:  {result.measured}", flush=True)
    missed = [result.id for result in results if not result.passed]
    print(
        f"{len(results) - len(missed)} of {len(results)} criteria met"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    try:
        print(f"Written: {', '.join(map(str, write(results, out)))}")
    except MissingExtraError as error:
        print(f"No page was written: {error}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(command)
