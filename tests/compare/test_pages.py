"""The pages that explain clipping: their code runs in both languages, and their commands exist."""

import doctest
import re
from pathlib import Path

import pytest

from experiments.theory import EXPERIMENTS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ["understanding.md", "tutorials-line-by-line.md"]


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, *(f"zh/{page}" for page in PAGES)])
def test_the_code_gives_what_the_page_says(page):
    result = doctest.testfile(str(DOCS / page), module_relative=False, encoding="utf-8")
    assert result.attempted > 5
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_the_experiments_that_a_page_names_exist(page):
    named = set(re.findall(r"\bR\d+\b", read(page)))
    assert named
    assert named <= set(EXPERIMENTS)


@pytest.mark.parametrize("page", PAGES)
def test_the_pictures_are_there(page):
    for name in re.findall(r"images/[\w-]+\.png", read(page)):
        assert (DOCS / name).is_file(), name


def test_the_commands_that_a_page_names_exist():
    pytest.importorskip("typer")
    from gradkeel.cli.app import app

    known = {command.name for command in app.registered_commands}
    named = {word for page in PAGES for word in re.findall(r"`gradkeel (\w+)", read(page))}
    assert named <= known
