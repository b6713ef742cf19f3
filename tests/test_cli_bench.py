"""``gradkeel bench``: what it prints, as tables and as JSON, and how it refuses."""

import json

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("rich", reason="the command line needs the extra cli")

from typer.testing import CliRunner

from gradkeel.cli.app import app


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_tables():
    result = bench("simple-mlp", "--rounds", "5")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert words.startswith("simple-mlp: ")
    assert "float32" in words
    for title in ("clip, norm below the bound", "clip and AdamW step, norm above the bound"):
        assert title in words
    for name in ("torch clip_grad_norm_, again", "gradkeel guard + step", "one read of the gradients"):
        assert name in words
    assert "torch against itself is off by" in words


def test_json_is_all_that_goes_to_stdout():
    found = json.loads(bench("simple-mlp", "--dtype", "bfloat16", "--rounds", "5", "--json").stdout)
    assert found["dtype"] == "bfloat16"
    assert len(found["tables"]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet"], "did you mean 'resnet50'"),
        (["--device", "nonsense"], "'nonsense' cannot be used"),
        (["--device", "meta"], "'meta' cannot be used"),
        (["nonsense"], "unknown model 'nonsense'. Known models"),
        (["--rounds", "2"], "--rounds"),
        (["--dtype", "float8"], "--dtype"),
    ],
)
def test_errors_say_what_is_wrong_in_a_line(arguments, words):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
