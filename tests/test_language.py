"""The table of Chinese sentences: whole, used, and with the same blanks as the English ones."""

import ast
import json
import re
from pathlib import Path

import pytest

from gradkeel.language import choose

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "gradkeel"
TABLE = json.loads((PACKAGE / "language" / "zh.json").read_bytes())
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(autouse=True)
def chinese():
    choose("zh")
    yield
    choose(None)


def said(path):
    """The sentences of a file, and what it says that is put together before it can be looked up."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = {"say", "count"} & {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "gradkeel.language"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name in made or name == "language.say":
            for argument in node.args:
                yield from sentences(argument, f"{path.relative_to(PACKAGE)}:{node.lineno}")


def sentences(node, where):
    if isinstance(node, ast.IfExp):
        yield from sentences(node.body, where)
        yield from sentences(node.orelse, where)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, where
    else:
        assert not isinstance(node, ast.JoinedStr | ast.BinOp), (
            f"{where}: say() takes a template, and its values by name"
        )


def of_sources():
    return {sentence: where for path in sorted(PACKAGE.rglob("*.py")) for sentence, where in said(path)}


def of_help():
    typer = pytest.importorskip("typer", reason="the command line needs the extra cli")
    pytest.importorskip("rich", reason="the command line needs the extra cli")
    from gradkeel.cli.app import app

    group = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        yield " ".join(command.help.split())
        yield from (parameter.help for parameter in command.params if parameter.help)


def of_policies():
    """What ``gradkeel policies`` takes from docstrings, the sources aside, which are citations."""
    from gradkeel.policies import descriptions

    for one in descriptions():
        yield from (one.summary, *one.details.split("\n\n"), one.formula, one.spec, one.cost)
        yield from (parameter.meaning for parameter in one.parameters)


def is_prose(text):
    """Whether there is anything to translate: some formulas and specs hold none."""
    return re.search(r"[a-z]{2,} [a-z]{2,}|[A-Z][a-z]+ ", text) is not None
