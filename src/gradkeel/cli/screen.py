"""What commands print: tables and wrapped sentences, on terminals of any width; imported when it is needed."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gradkeel.language import language, shown, wrapped
from gradkeel.language import width as cells_of

WIDTH = 110
"""Of what goes to no terminal, unless COLUMNS says otherwise."""

PIECES = "  "
"""Between columns."""


def console(*, stderr: bool = False) -> Console:
    """Where commands print, as wide as the terminal."""
    here = Console(stderr=stderr, highlight=False)
    if here.is_terminal or "COLUMNS" in os.environ:
        return here
    return Console(stderr=stderr, highlight=False, width=WIDTH)


def tables(
    head: Sequence[str], rows: Sequence[Sequence[str | Text]], *, width: int, title: str = "", left: int = 1
) -> Iterator[Table]:
    """A table, in pieces one under the other where it is too wide; each piece begins with the first column.

    The first so many columns, ``left``, are words; the others are numbers, set to the right.
    """
    cells = [[Text(shown(cell)) if isinstance(cell, str) else cell for cell in row] for row in (head, *rows)]
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    for columns in _pieces(widths, width):
        piece = Table(
            title=shown(title), title_justify="left", title_style="bold", box=None, padding=(0, len(PIECES), 0, 0),
            pad_edge=False, header_style="dim",
        )  # fmt: skip
        for i in columns:
            justify: Any = "left" if i < left else "right"
            piece.add_column(
                cells[0][i], justify=justify, overflow="fold", no_wrap=i > 0 and widths[i] < width
            )
        for row in cells[1:]:
            piece.add_row(*(row[i] for i in columns))
        yield piece
        title = ""


def _pieces(widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """The columns of each piece; the first one keeps its width up to two fifths of the terminal."""
    first = min(widths[0], max(12, width * 2 // 5))
    columns, used = [0], first
    for i, own in enumerate(widths[1:], start=1):
        if len(columns) > 1 and used + len(PIECES) + own > width:
            yield columns
            columns, used = [0], first
        columns.append(i)
        used += len(PIECES) + own
    yield columns


def sentences(lines: Sequence[tuple[str, str | Text]], *, style: str = "dim", label: int = 0) -> Table:
    """Labels and what they are about, wrapped beside them; ``label`` is the least width of the labels."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(min_width=label, no_wrap=True)
    grid.add_column(overflow="fold")
    for name, words in lines:
        grid.add_row(Text(shown(name), style=style), flowing(words))
    return grid


def flowing(words: str | Text) -> "Text | _Chinese":
    """A paragraph in the reader's language, wrapped as that language is."""
    text = Text(shown(words)) if isinstance(words, str) else words
    return text if language() == "en" else _Chinese(text)


class _Chinese:
    """Text broken between any two Chinese characters: rich breaks at spaces, of which Chinese has few."""

    def __init__(self, text: Text) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        ends = itertools.accumulate(map(len, wrapped(self._text.plain, options.max_width)))
        for line in self._text.divide(list(ends)[:-1]):
            line.rstrip()
            yield line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(20, options.max_width), min(cells_of(self._text.plain), options.max_width))
