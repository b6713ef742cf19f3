"""The pages that explain clipping: their code runs, the Chinese ones say the same, and their commands exist."""

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
def test_the_chinese_page_has_the_same_code_pictures_and_commands(page):
    def parts(text):
        code = re.findall(r"```pycon\n(.*?)```", text, flags=re.DOTALL)
        pictures = re.findall(r"images/[\w-]+\.png", text)
        return code, pictures, re.findall(r"`gradkeel ([^`]*)`", text), text.count("\n## "), text.count("\n|")

    assert parts(read(page)) == parts(read(f"zh/{page}"))


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


def test_the_chinese_readme_has_the_same_code_and_links():
    def parts(name):
        text = (DOCS.parent / name).read_text(encoding="utf-8")
        blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
        code = [re.sub(r"\s*#.*", "", line) for block in blocks for line in block.splitlines()]
        links = [link.replace("docs/zh/", "docs/") for link in re.findall(r"\]\((docs[^)]*)\)", text)]
        return (
            code,
            sorted(links),
            text.count("\n## "),
            text.count("\n|"),
            sorted(re.findall(r"`gk\.[^`]*`", text)),
        )

    assert parts("README.zh.md") == parts("README.md")
