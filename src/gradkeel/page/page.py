"""One self-contained HTML page: a title, words, sections with tables and figures; offline, light and dark."""

import html
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradkeel.errors import MissingExtraError
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
    """A heading, plain text, and under it a table, a figure, both or neither.

    Attributes:
        title: the heading.
        text: a paragraph, or nothing.
        table: what stands under the text.
        figure: a plotly figure, or None.
    """

    title: str
    text: str = ""
    table: Table | None = None
    figure: Any = None


def page(
    title: str,
    subtitle: str,
    lines: Sequence[Line],
    sections: Sequence[Section],
    *,
    script: str | None = None,
) -> str:
    """The page as HTML in the reader's language, with plotly's script in it once, if a section has a figure.

    Args:
        title, subtitle: what the page is about.
        lines: the result in words, on top.
        sections: in order.
        script: name of a file beside the page that `write_script` has written, instead of plotly's script in the page.

    Raises:
        MissingExtraError: a section has a figure, and plotly is not installed.
    """
    drawn = any(section.figure is not None for section in sections)
    plotly = (
        f'<script src="{script}"></script>' if script else f"<script>{_plotly_script()}</script>"
    ) * drawn
    heads = "".join(f"<dt>{escaped(line.label)}</dt><dd>{_text(line)}</dd>" for line in lines)
    body = "\n".join(_section(section, i) for i, section in enumerate(sections))
    return (
        f'<!doctype html>\n<html lang="{_TAGS[language()]}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n{plotly}\n</head>\n<body>\n<main>\n"
        f"<h1>{escaped(title)}</h1>\n<p class=subtitle>{escaped(subtitle)}</p>\n"
        f"<dl>{heads}</dl>\n{body}\n</main>\n{_linked() if drawn else ''}</body>\n</html>\n"
    )


def write_script(folder: Path) -> str:
    """Write plotly's script into a folder, for the pages there to share; its name."""
    script = _plotly_script()
    name = f"plotly-{zlib.crc32(script.encode()):08x}.min.js"
    if not (folder / name).exists():
        (folder / name).write_text(script, encoding="utf-8")
    return name


def _linked() -> str:
    return _LINKED.replace("%s", Path(__file__).with_name("rows.js").read_text(encoding="utf-8"))


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
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError("plotly", "report", "a page with figures") from None
    script: str = get_plotlyjs()
    return script


# Figures over the same x axis (their layout's meta) are zoomed together, and those over the steps have one width.
# On touch screens dragging scrolls the page.
_LINKED = """<script>
const plots = [...document.querySelectorAll(".js-plotly-plot")];
let linking = false;
const align = () => {
  const over = plots.filter((plot) => plot.layout.meta === "step");
  if (innerWidth < 700 || over.length < 2) return;
  const sides = over.map((plot) => ["l", "r"].map((side) => Math.round(plot._fullLayout._size[side])));
  const [l, r] = [0, 1].map((side) => Math.max(...sides.map((own) => own[side])));
  over.forEach((plot, i) => {
    if (sides[i][0] < l || sides[i][1] < r) Plotly.relayout(plot, { "margin.l": l, "margin.r": r });
  });
};
for (const plot of plots) {
  if (matchMedia("(pointer: fine)").matches) Plotly.relayout(plot, { dragmode: "zoom" });
  plot.on("plotly_relayout", async (change) => {
    const [low, high] = ["[0]", "[1]"].map((end) => change["xaxis.range" + end] ?? change["xaxis2.range" + end]);
    const all = change["xaxis.autorange"] || change["xaxis2.autorange"];
    if (linking || !plot.layout.meta || (low === undefined && !all)) return;
    linking = true;
    const same = plots.filter((one) => one !== plot && one.layout.meta === plot.layout.meta);
    const axes = (one) => ["xaxis", "xaxis2"].filter((axis) => one.layout[axis]);
    const update = (one) => Object.fromEntries(
      axes(one).map((axis) => all ? [axis + ".autorange", true] : [axis + ".range", [low, high]]));
    try { await Promise.all(same.map((one) => Plotly.relayout(one, update(one)))); } finally { linking = false; }
  });
}
%s
align();
</script>
"""

# plotly writes colours into its SVG's style attributes, which only !important can override from outside.
_STYLE = """
:root { --paper: #fff; --ink: #1d2430; --soft: #5b6675; --line: #dfe4ea; --card: #f5f7f9; --accent: #20699c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e4e8ed; --soft: #9aa6b4; --line: #323a44; --card: #1c2229; --accent: #79b8e8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 22px 60px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 40px 0 4px; }
h2 a { color: inherit; text-decoration: none; }
h2 a:hover::after { content: " #"; color: var(--soft); }
p { margin: 0 0 10px; max-width: 92ch; }
p, .subtitle { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 10px 18px; margin: 20px 0 0; padding: 18px 20px;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
dt { font-weight: 600; font-size: .8rem; letter-spacing: .05em; color: var(--accent); padding-top: 2px; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em/1.5 ui-monospace, "SFMono-Regular", Menlo, monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.figure { margin: 6px -6px 0; }
.figure > div { height: auto !important; } /* plotly's is that of the figure before its rows are chosen */
.rows { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin: 0 6px; font-size: .88rem; }
.rows, .rows input, .rows select { color: var(--ink); font: inherit; font-size: .88rem; }
.rows input[type=search], .rows select { background: var(--card); border: 1px solid var(--line); border-radius: 5px;
  padding: 4px 8px; max-width: 100%; }
.figure .main-svg text { fill: var(--ink) !important; }
.figure .hoverlayer text { fill: #fff !important; }
.figure .modebar { display: none; }
.figure:hover .modebar { display: block; opacity: .7; }
.figure .modebar-group { background: none !important; }
@media (max-width: 640px) {
  main { padding: 18px 14px 40px; }
  dl { grid-template-columns: 1fr; gap: 2px; padding: 14px; }
  dd { margin-bottom: 10px; }
  h1 { font-size: 1.3rem; }
  .figure:hover .modebar { display: none; }
}
"""
