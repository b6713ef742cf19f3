"""``gradkeel export``: a record as CSV or Parquet."""

from pathlib import Path
from typing import Annotated

import typer

from gradkeel.cli.common import Run, note_damage, reported
from gradkeel.language import count, say, shown


@reported
def command(
    run: Run,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PATH", help="where to: a path that ends in .csv or .parquet"),
    ],
    parameters: Annotated[
        bool, typer.Option("--parameters/--no-parameters", help="columns for each parameter")
    ] = True,
    long: Annotated[
        bool, typer.Option("--long", help="a row a step and parameter, instead of a row a step")
    ] = False,
) -> None:
    """Write a recorded run as a table: norms, coefficients, weights, updates, and what was logged."""
    from gradkeel.record import Reader, export

    if out.suffix not in {".csv", ".parquet"}:
        told = say("{path} must end in .csv or .parquet", path=out)
        raise typer.BadParameter(shown(told), param_hint="--out")
    with Reader(run) as reader:
        rows = export(reader, out, parameters=parameters, long=long)
        note_damage(reader.damage)
    steps = count(rows, "{n:,} step", "{n:,} steps")
    print(shown(say("Wrote {steps} to {path}", steps=steps, path=out)))
