"""Where benchmarks write what they have found: between two marks of a page."""

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def put(page: str, name: str, text: str) -> None:
    """Put a text between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` of a page of docs/, which has both."""
    path, begin, end = DOCS / page, f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
