"""What people read, in their language: sentences are English in the sources, and translated where they are shown.

``say`` makes an English string that remembers its parts, and ``shown`` gives it in the reader's language by the table
``zh.json``, whose keys are the English sentences. So JSON, records and code that compares strings have English.
"""

import functools
import json
import locale
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

LANGUAGES = ("en", "zh")
VARIABLE = "GRADKEEL_LANG"
OTHERS = "words of others"
"""The table's section of sentences that are known by their shape: Typer's, and those that stand in records."""

_WIDE = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"
# What a line may not be broken within: a word, or a Chinese character, with the punctuation that belongs to it.
_PIECE = rf"[（《“]*(?:[^\s{_WIDE}“”]+|[{_WIDE}])[，。；：、）》”！？]*\s*|\s+"

# A space of the template beside Chinese that was filled in, where a number or a name was expected.
_GAP = rf" \0(?=[{_WIDE}])|(?<=[{_WIDE}])\0 "

_chosen: dict[str, str] = {}


class Said(str):
    """An English sentence that knows what it was made from."""

    # With names in braces for what was filled in; None for sentences one after the other.
    template: str | None
    values: Mapping[str, object]  # what was filled in, by name

    def __new__(cls, english: str, template: str | None, values: Mapping[str, object]) -> "Said":
        """The English text, and its parts."""
        self = super().__new__(cls, english)
        self.template, self.values = template, values
        return self

    def __getnewargs__(self) -> tuple[str, str | None, Mapping[str, object]]:  # type: ignore[override]
        return str(self), self.template, self.values


def say(template: str, /, **values: object) -> str:
    """A sentence in English, which `shown` translates; values that are sentences themselves are translated with it."""
    return Said(template.format(**values) if values else template, template, values)


def count(n: int, one: str, many: str, **values: object) -> str:
    """The sentence for one, or for any other number; ``{n}`` in it is the number."""
    return say(one if n == 1 else many, n=n, **values)


def join(sentences: Iterable[str]) -> str:
    """Sentences one after the other; empty ones are left out."""
    kept = [sentence for sentence in sentences if sentence]
    return Said(" ".join(kept), None, {str(i): sentence for i, sentence in enumerate(kept)})


def heard(text: str) -> str:
    """A sentence that was not made here: one of a record, an error or a docstring; translated if the table has it."""
    return text if isinstance(text, Said) else Said(text, text, {})


def shown(text: str) -> str:
    """A sentence in the reader's language; a string that nobody said as a sentence stays as it is."""
    if not isinstance(text, Said):
        return text
    if language() == "en":
        return str(text)
    if not text.values:
        return _translated(text.template or "")
    values = {
        name: f"\0{shown(value)}\0" if isinstance(value, Said) else value
        for name, value in text.values.items()
    }
    if text.template is None:
        result = "".join(map(str, values.values()))
    else:
        result = _table().get(text.template, text.template).format(**values)
    return re.sub(_GAP, "", result).replace("\0", "")


def language() -> str:
    """``zh`` or ``en``: the one that was chosen, else by GRADKEEL_LANG, else by the locale."""
    if _chosen:
        return _chosen["language"]
    values = (os.environ.get(name) for name in (VARIABLE, "LC_ALL", "LC_MESSAGES", "LANG"))
    value = next((value for value in values if value), None) or locale.getlocale()[0] or ""
    return "zh" if value.lower().startswith(("zh", "chinese")) else "en"


def choose(language: str | None) -> None:
    """Speak this language from now on; None leaves it to the environment."""
    _chosen.clear()
    if language is not None:
        _chosen["language"] = language


def readable(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent from 0.0001 up to a billion: 5,180 rather than 5.18e+03."""
    short = float(f"{value:.{digits}g}")
    if not math.isfinite(value) or not 1000 <= abs(short) < 1e9:
        return f"{value:.{digits}g}"
    return f"{short:,.0f}"


def width(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def padded(text: str, columns: int, *, right: bool = False) -> str:
    """The text with spaces after it, or before it, up to so many columns."""
    spaces = " " * (columns - width(text))
    return spaces + text if right else text + spaces


def aligned(rows: Iterable[Sequence[str]], *, words: int) -> list[str]:
    """Lines of a table in the reader's language; the columns after the first so many ``words`` are set to the right."""
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(padded(row[i], widths[i], right=i >= words) for i in range(len(row))).rstrip()
        for row in cells
    ]


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of so many columns, which together are the text.

    Chinese is broken between any two characters, but not before its punctuation. Spaces at a line's end may stand out.
    """
    lines = [""]
    for piece in re.findall(_PIECE, text):
        if width(lines[-1] + piece.rstrip()) > columns and lines[-1]:
            lines.append("")
        for character in piece:
            if width(lines[-1] + character) > columns and character.strip():
                lines.append("")
            lines[-1] += character
    return lines


def _translated(text: str) -> str:
    """By its words or, where it is somebody else's, by its shape; as it is where neither is known."""
    table = _table()
    if text in table:
        return table[text]
    for shape, translation in _shapes():
        if found := shape.fullmatch(text):
            return translation.format(**{name: _translated(part) for name, part in found.groupdict().items()})
    return text


@functools.cache
def _sections() -> dict[str, dict[str, str]]:
    return json.loads(Path(__file__).with_name("zh.json").read_bytes())


@functools.cache
def _table() -> dict[str, str]:
    return {english: chinese for section in _sections().values() for english, chinese in section.items()}


@functools.cache
def _shapes() -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.*?)", re.escape(english)), re.DOTALL), chinese)
        for english, chinese in _sections()[OTHERS].items()
        if "{" in english
    ]
