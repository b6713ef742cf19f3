"""What ``gradkeel compare`` shows: a table that fills while runs finish, and the four lines under the last one."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Group
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from gradkeel.cli.screen import console, sentences, tables
from gradkeel.language import padded, say, shown, width

if TYPE_CHECKING:
    from gradkeel.compare.plan import Comparison, Plan

# Seconds until the first provisional table, and between the others, where they cannot be drawn over each other.
FIRST, EVERY = 8.0, 20.0


class Progress:
    """A live display on stderr; provisional tables where stderr is no terminal; nothing at all when ``quiet``."""

    def __init__(self, plan: "Plan", *, quiet: bool) -> None:
        self._console = console(stderr=True)
        self._quiet = quiet
        self._live: Live | None = None
        self._due = time.monotonic() + FIRST
        self._total = len(plan.trials)
        self._what = f"{plan.target}: " if plan.target else ""
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn(shown(say("left"))), TimeRemainingColumn(elapsed_when_finished=False), console=self._console,
        )  # fmt: skip
        self._task = self._bar.add_task(self._what + shown(say("starting workers")), total=self._total)

    def __enter__(self) -> Self:
        """Start the display."""
        if not self._quiet and self._console.is_terminal:
            self._live = Live(self._bar, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        elif not self._quiet:
            self._console.print(self._what + shown(say("{n} runs ...", n=self._total)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the display away."""
        if self._live is not None:
            self._live.stop()

    def update(self, comparison: "Comparison") -> None:
        """Show what has finished so far."""
        if self._quiet:
            return
        done = len(comparison.runs)
        self._bar.update(self._task, completed=done, description=self._what + shown(say("running")))
        if self._live is not None:
            self._live.update(Group(_tables(comparison, say("so far"), self._console.width), self._bar))
        elif time.monotonic() > self._due and done < self._total:
            self._due = time.monotonic() + EVERY
            title = say("so far: {done} of {planned} runs", done=done, planned=self._total)
            self._console.print(_tables(comparison, title, self._console.width))


def print_result(comparison: "Comparison") -> None:
    """The final table and the four lines, on stdout."""
    from gradkeel.compare.findings import findings

    if not comparison.runs:
        print(shown(say("No run finished.")), file=sys.stderr)
        return
    here = console()
    here.print(_tables(comparison, comparison.plan.target or "", here.width))
    *lines, (label, command) = findings(comparison).lines()
    columns = max(width(shown(name)) for name in (label, *(name for name, _ in lines))) + 2
    here.print(sentences([(shown(name), text) for name, text in lines], style="bold cyan", label=columns - 1))
    # A command is not wrapped: it must survive being copied.
    here.print(Text(padded(shown(label), columns), style="bold cyan"), Text(command), sep="", soft_wrap=True)
    here.print()


def _tables(comparison: "Comparison", title: str, width: int) -> Padding:
    from gradkeel.compare.page import table
    from gradkeel.compare.summary import summarize

    cells = table(summarize(comparison.runs, comparison.plan.target_loss), comparison)
    pieces = list(tables(cells.headers, cells.rows, width=width, title=title))
    return Padding(Group(*[part for piece in pieces for part in (piece, "")][:-1]), (1, 0))
