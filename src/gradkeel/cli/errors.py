"""How commands fail: one line on stderr and exit code 2 for what the user can fix, a traceback for the rest."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from gradkeel.language import heard, shown

P = ParamSpec("P")


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
