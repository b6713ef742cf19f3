"""The table of series in docs/record.md is the one in the code; `python tests/record/test_docs.py` writes it."""

from pathlib import Path

from gradkeel.record.schema import SCALAR, SERIES

PAGE = Path(__file__).resolve().parents[2] / "docs/record.md"
BEGIN, END = "<!-- series:begin -->\n", "<!-- series:end -->"


def table():
    rows = [
        f"| `{s.name}` | {str(s.dtype).removeprefix('torch.')} {s.shape} | {s.unit} | {s.meaning} |"
        for s in (*SERIES.values(), SCALAR)
    ]
    return "\n".join(["| series | dtype and shape | unit | meaning |", "|---|---|---|---|", *rows, ""])


def test_the_documented_series_are_those_of_the_code():
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0] == table()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
