"""One self-contained HTML page: a title, words, sections with tables and figures; offline, light and dark."""

import html
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradkeel.errors import import_extra
from gradkeel.language import language, shown

_TAGS = {"en": "en", "zh": "zh-Hans"}  # of languages, as HTML has them
CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "sendDataToCloud"],
}


@dataclass(frozen=True)
class Table:
    """Headers and rows of plain text; columns after the first are numbers, set to the right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Line:
    """A labelled line at the top of a page; a command is set as one."""

    label: str
    text: str
    command: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph of plain text, and under it a table, a figure, both or neither."""

    title: str
    text: str = ""
    table: Table | None = None
    figure: Any = None  # of plotly


def page(
    title: str,
    subtitle: str,
    lines: Sequence[Line],
    sections: Sequence[Section],
    *,
    script: str | None = None,
) -> str:
    """The page as HTML in the reader's language, with plotly's script in it once, if a section has a figure.

    ``script`` is the name of a file beside the page that `write_script` has written, instead of plotly's script in it.

    Raises:
        MissingExtraError: a section has a figure, and plotly is not installed.
    """
    drawn = any(section.figure is not None for section in sections)
    plotly = (
        f'<script src="{script}"></script>' if script else f"<script>{_plotly_script()}</script>"
    ) * drawn
    heads = "".join(f"<dt>{escaped(line.label)}</dt><dd>{_text(line)}</dd>" for line in lines)
    body = "\n".join(_section(section, i) for i, section in enumerate(sections))
    figures = f"<script>\n{_file('linked.js')}{_file('rows.js')}\nalign();\n</script>\n" * drawn
    return (
        f'<!doctype html>\n<html lang="{_TAGS[language()]}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{_file('page.css')}</style>\n{plotly}\n</head>\n<body>\n<main>\n"
        f"<h1>{escaped(title)}</h1>\n<p class=subtitle>{escaped(subtitle)}</p>\n"
        f"<dl>{heads}</dl>\n{body}\n</main>\n{figures}</body>\n</html>\n"
    )


def write_script(folder: Path) -> str:
    """Write plotly's script into a folder, for the pages there to share; its name."""
    script = _plotly_script()
    name = f"plotly-{zlib.crc32(script.encode()):08x}.min.js"
    if not (folder / name).exists():
        (folder / name).write_text(script, encoding="utf-8")
    return name


def _file(name: str) -> str:
    """What stands in a file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _text(line: Line) -> str:
    return f"<code>{escaped(line.text)}</code>" if line.command else escaped(line.text)


def escaped(text: str) -> str:
    """A text in the reader's language, as HTML has it."""
    return html.escape(shown(text))


def _section(section: Section, index: int) -> str:
    anchor = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")
    parts = [f'<h2><a href="#{anchor}">{escaped(section.title)}</a></h2>']
    if section.text:
        parts.append(f"<p>{escaped(section.text)}</p>")
    if section.table is not None:
        parts.append(_table(section.table))
    if section.figure is not None:
        inner = section.figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            config=CONFIG,
            div_id=f"figure-{index}",
            default_width="100%",
        )
        parts.append(f'<div class="figure" role="img" aria-label="{escaped(section.title)}">{inner}</div>')
    return f'<section id="{anchor}">' + "\n".join(parts) + "</section>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in table.headers)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _plotly_script() -> str:
    return import_extra("plotly.offline", "report", "a page with figures").get_plotlyjs()
