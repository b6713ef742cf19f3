"""``gradkeel explain``: why a recorded run blew up, what hardly learns, and what a bound would do."""

from pathlib import Path
from typing import Annotated

import typer

from gradkeel.cli.errors import reported


@reported
def command(
    run: Annotated[Path, typer.Argument(help="a record, such as runs/exp1.keel", show_default=False)],
    bound: Annotated[
        list[float] | None, typer.Option(help="another bound to weigh up; may be given several times")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the explanation as JSON, and nothing else, to stdout")
    ] = False,
) -> None:
    """Say where a recorded run exploded and how that spread, what hardly learns, and what bounds would do."""
    from gradkeel.explain import explain

    for value in bound or ():
        if not 0 < value < float("inf"):
            raise typer.BadParameter(f"{value} is not a positive finite number", param_hint="--bound")
    explanation = explain(run, bounds=bound or ())
    if as_json:
        import json

        print(json.dumps(explanation.to_json(), allow_nan=False))
    else:
        import shlex

        print(explanation)
        print(f"\nSee it: gradkeel report {shlex.quote(str(run))}")
