"""What commands take, and how they fail: one line and exit code 2 where the user can fix it, a traceback else."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from gradkeel.language import heard, shown

P = ParamSpec("P")

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


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Print gradkeel's own errors, and those about values, as one line, and exit with 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from gradkeel.errors import GradkeelError

        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            # Whoever read stdout has gone; what is still to be flushed goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (GradkeelError, OSError) as error:
            told = error.args[0] if isinstance(error, GradkeelError) else str(error)
            complain(heard(told))
            sys.exit(2)

    return wrapped


def complain(words: str) -> None:
    """Say something on stderr, in the reader's language."""
    print(f"gradkeel: {shown(words)}", file=sys.stderr, flush=True)


def note_damage(damage: str | None) -> None:
    """Say on stderr what of a record could not be read."""
    if damage:
        complain(heard(damage))
