"""``gradkeel export``: a record as CSV or Parquet."""

from pathlib import Path
from typing import Annotated

import typer

from gradkeel.cli.errors import note_damage, reported
from gradkeel.cli.options import Run


@reported
def command(
    run: Run,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PATH", help="where to: a path that ends in .csv or .parquet"),
    ],
    parameters: Annotated[
        bool, typer.Option("--parameters/--no-parameters", help="a column for each parameter's norm")
    ] = True,
) -> None:
    """Write a recorded run as a table with a row a step."""
    from gradkeel.record import Reader, export

    if out.suffix not in {".csv", ".parquet"}:
        raise typer.BadParameter(f"{out} must end in .csv or .parquet", param_hint="--out")
    with Reader(run) as reader:
        rows = export(reader, out, parameters=parameters)
        note_damage(reader)
    print(f"Wrote {rows} steps to {out}")
