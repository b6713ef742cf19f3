"""The page's table of layouts: gradkeel's column is right, and its lines are those of the benchmark."""

import math
from pathlib import Path

import pytest

from benchmarks.layouts import ROWS, judge, with_gradkeel, with_torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "comparison.md"


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.words)
def test_gradkeel_is_right(pool, row, norm_type):
    assert judge(pool, row, norm_type, with_gradkeel)[1].startswith("right")


def test_torch_is_right_on_shards_and_not_on_stages(pool):
    by_words = {row.words: row for row in ROWS}
    assert judge(pool, by_words["FSDP2: rows sharded"], 2.0, with_torch) == (True, "right")
    is_right, words = judge(pool, by_words["pipeline stages"], 2.0, with_torch)
    assert not is_right
    assert words.startswith("ranks disagree")


def test_the_page_has_these_lines():
    table = PAGE.read_text(encoding="utf-8").partition("layouts:begin")[2].partition("layouts:end")[0]
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert lines[1:] == [row.words for row in ROWS]
