"""What several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer

TASKS = "char-lstm, exploding-linear, simple-mlp, simple-mlp-adam, tiny-transformer"
"""Those of `gradkeel.compare.task.BUILTIN`, which is not imported here: help would wait for torch."""

TASK = f"{TASKS}, or yours: mypkg.mymodule:make_task"


def json_option(what: str) -> Any:
    """The option of a command that can print something as JSON."""
    return typer.Option("--json", help=f"print {what} as JSON, and nothing else, to stdout")


AsJson = Annotated[bool, json_option("the result")]

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="a record, such as runs/exp1.keel", show_default=False)
]
