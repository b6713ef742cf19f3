"""What several commands take."""

from pathlib import Path
from typing import Annotated

import typer

TASKS = "char-lstm, exploding-linear, simple-mlp, simple-mlp-adam, tiny-transformer"
"""Those of `gradkeel.compare.task.BUILTIN`, which is not imported here: help would wait for torch."""

TASK = f"{TASKS}, or yours: mypkg.mymodule:make_task"

AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON, and nothing else, to stdout")]

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="a record, such as runs/exp1.keel", show_default=False)
]
