"""What ``gradkeel compare`` shows: a table that fills while runs finish, and the four lines under the last one."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Group
from rich.live import Live
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gradkeel.cli.screen import console, sentences, tables
from gradkeel.compare.findings import findings
from gradkeel.compare.page import table
from gradkeel.compare.plan import Comparison, Plan
from gradkeel.compare.summary import summarize
from gradkeel.language import count, padded, say, shown, width

# Seconds until the first provisional table, and between the others, where they cannot be drawn over each other.
FIRST, EVERY = 8.0, 20.0


@contextlib.contextmanager
def progress(plan: Plan) -> Iterator[Callable[[Comparison], None]]:
    """A live display on stderr, or provisional tables where that is no terminal; gives what shows the runs so far."""
    here, total = console(stderr=True), len(plan.trials)
    what = f"{plan.target}: " if plan.target else ""
    if here.is_terminal:
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn(shown(say("left"))), TimeRemainingColumn(elapsed_when_finished=False), console=here,
        )  # fmt: skip
        task = bar.add_task(what + shown(say("starting workers")), total=total)
        with Live(bar, console=here, refresh_per_second=8, transient=True) as live:

            def draw(comparison: Comparison) -> None:
                bar.update(task, completed=len(comparison.runs), description=what + shown(say("running")))
                live.update(Group(_tables(comparison, say("so far"), here.width), bar))

            yield draw
        return
    here.print(what + shown(count(total, "{n} run ...", "{n} runs ...")))
    due = time.monotonic() + FIRST

    def tell(comparison: Comparison) -> None:
        nonlocal due
        done = len(comparison.runs)
        if time.monotonic() > due and done < total:
            due = time.monotonic() + EVERY
            title = say("so far: {done} of {runs}", done=done, runs=count(total, "{n} run", "{n} runs"))
            here.print(_tables(comparison, title, here.width))

    yield tell


def print_result(comparison: Comparison) -> None:
    """The final table and the four lines, on stdout."""
    if not comparison.runs:
        print(shown(say("No run finished.")), file=sys.stderr)
        return
    here = console()
    here.print(_tables(comparison, comparison.plan.target or "", here.width))
    *lines, last = findings(comparison).lines()
    columns = max(width(shown(line.label)) for line in (*lines, last)) + 2
    here.print(sentences([(line.label, line.text) for line in lines], style="bold cyan", label=columns - 1))
    # A command is not wrapped: it must survive being copied.
    label = Text(padded(shown(last.label), columns), style="bold cyan")
    here.print(label, Text(last.text), sep="", soft_wrap=True)
    here.print()


def _tables(comparison: Comparison, title: str, width: int) -> Padding:
    cells = table(summarize(comparison.runs, comparison.plan.target_loss), comparison)
    pieces = list(tables(cells.headers, cells.rows, width=width, title=title))
    return Padding(Group(*[part for piece in pieces for part in (piece, "")][:-1]), (1, 0))
