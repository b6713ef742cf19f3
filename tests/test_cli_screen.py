"""What commands print on narrow terminals, and how fast help comes."""

import subprocess
import sys

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("rich", reason="the command line needs the extra cli")

from rich.console import Console
from typer.testing import CliRunner

import gradkeel
from gradkeel.cli.app import app
from gradkeel.cli.common import TASKS
from gradkeel.cli.screen import tables
from gradkeel.compare.task import BUILTIN
from gradkeel.language import readable
from scripted import scripted_run

HEAD = [
    "policy",
    "best lr",
    "val. loss",
    "range",
    "diverged",
    "clipped",
    "steps to 2",
    "volatility",
    "ms/step",
]
POLICY = "norm:1.0,exclude=*.weight"
ROW = [POLICY, "0.01", "diverged", "0.854–1.63", "2/2", "100%", "never", "98.7%", "0.8"]


def printed(width, head=HEAD, rows=(ROW,)):
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        for piece in tables(head, rows, width=width):
            console.print(piece)
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_no_column_is_lost_at_any_width(width):
    """At 80 columns the policies themselves were not to be seen."""
    lines = printed(width)
    assert max(map(len, lines)) <= width
    heads = [line for line in lines if line.startswith("policy")]
    rows = [line for line in lines if line.startswith("norm:1.0,exclude=")]
    assert len(heads) == len(rows)
    assert "  ".join(heads).count("policy") == len(heads)
    for head, cell in zip(HEAD, ROW, strict=True):
        assert any(head in line for line in heads)
        assert any(cell in line for line in lines)
    assert len(heads) == (1 if width >= 110 else 2 if width == 80 else 3)


def test_a_long_first_column_is_folded_rather_than_cut():
    name = "blocks." + "attention." * 9 + "weight"
    lines = printed(60, ["parameter", "norm"], [[name, "1.5"]])
    assert "".join(line.replace("1.5", "").strip() for line in lines[1:]) == name
    assert "1.5" in lines[1]


def run(*arguments, columns):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)})


@pytest.mark.parametrize("columns", [60, 80])
def test_explanations_and_policies_fit(tmp_path, columns):
    path = tmp_path / "run.keel"
    scripted_run(path, [[1.0 + 0.1 * (step % 3), 2.0] for step in range(200)])
    for command in (["explain", str(path)], ["policies"], ["policies", "zclip"]):
        result = run(*command, columns=columns)
        assert result.exit_code == 0, result.output
        long = [line for line in result.stdout.splitlines() if len(line) > columns]
        assert [
            line for line in long if not line.startswith("See it: ")
        ] == []  # commands are there to be copied


def test_help_does_not_load_torch():
    """Every press of Tab runs the program."""
    code = "import sys; from gradkeel.cli.app import app; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version():
    assert run("--version", columns=80).stdout == f"gradkeel {gradkeel.__version__}\n"


def test_help_names_every_built_in_task():
    assert TASKS.split(", ") == list(BUILTIN)


@pytest.mark.parametrize("port", ["-1", "70000"])
def test_a_port_that_is_none_is_said_in_one_line(tmp_path, port):
    result = run("report", str(tmp_path / "run.keel"), "--watch", "--port", port, columns=80)
    assert result.exit_code == 2
    assert "--port" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("value", "digits", "words"),
    [
        (5176.3, 3, "5,180"), (60_243_111.0, 3, "60,200,000"), (4.84, 3, "4.84"), (999.6, 3, "1,000"),
        (0.000217, 3, "0.000217"), (3.2e12, 3, "3.2e+12"), (-5176.3, 3, "-5,180"), (float("inf"), 3, "inf"),
        (12345.0, 4, "12,340"), (1054.2, 4, "1,054"), (float("nan"), 3, "nan"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(value, digits, words):
    assert readable(value, digits) == words
