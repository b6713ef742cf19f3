"""``gradkeel compare`` on the command line: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("rich", reason="the command line needs the extra cli")

from typer.testing import CliRunner

import warm
from ctrl_c import interrupt_after_the_first_run
from gradkeel.cli.app import app

ROOT = Path(__file__).parents[1]
QUICK = ["--seeds", "2", "--jobs", "1"]


@pytest.fixture
def gradkeel(tmp_path, monkeypatch):
    """Run a command in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["compare", *arguments])


def run(python, *arguments, cwd):
    return subprocess.run(
        [*python, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_table_the_four_lines_and_both_files(gradkeel, tmp_path):
    pytest.importorskip("plotly", reason="the page needs the extra report")
    result = gradkeel("exploding-linear", *QUICK)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for part in (
        "policy best lr val. loss range diverged clipped steps to 2 volatility ms/step",
        "FOUND At lr 0.01 unclipped training diverged in 2 of 2 seeds, norm:1.0 in 0.",
        "WHY Unclipped training, lr 0.01, seed 0: at step 1 the update of",
        "CAUTION Look at what is excluded: norm:1.0,exclude=*.",
        "NEXT gradkeel compare exploding-linear --sweep norm:0.1..10 --lr 0.01",
        "Written: gradkeel-compare/compare.json, gradkeel-compare/compare.html",
    ):
        assert part in words
    lines = [line.split()[0] for line in result.stdout.splitlines() if line.startswith(("no", "norm"))]
    assert lines == ["norm:1.0", "none", "norm:1.0,exclude=*.bias", "norm:1.0,exclude=*.weight"]
    assert {path.name for path in (tmp_path / "gradkeel-compare").iterdir()} == {
        "compare.json",
        "compare.html",
    }


def test_json_is_all_that_stdout_gets(gradkeel, tmp_path):
    result = gradkeel(
        "exploding-linear", "--policy", "none", "--policy", "norm:1.0", "--json", "--out", "o", *QUICK
    )
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert data == json.loads((tmp_path / "o" / "compare.json").read_text())
    assert [(r["policy"], r["seed"], r["diverged"]) for r in data["runs"]] == [
        ("none", 0, True), ("norm:1.0", 0, False), ("none", 1, True), ("norm:1.0", 1, False),
    ]  # fmt: skip


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_a_task_prints_does_not_get_into_the_json(tmp_path, jobs):
    (tmp_path / "chatty.py").write_text(
        "from gradkeel.compare.tasks.exploding_linear import ExplodingLinear\n"
        "print('imported')\n"
        "class Chatty(ExplodingLinear):\n"
        "    def model(self):\n"
        "        print('made', flush=True)\n"
        "        return super().model()\n"
    )
    command = [
        "-m",
        "gradkeel",
        "compare",
        "chatty:Chatty",
        "--json",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--jobs",
        jobs,
    ]
    done = run(warm.python(), *command, cwd=tmp_path)
    assert json.loads(done.stdout)["task"] == "chatty:Chatty"
    assert {"imported", "made"} <= set(done.stderr.split())


def test_options_reach_the_plan(gradkeel):
    result = gradkeel(
        "exploding-linear", "--policy", "norm:1", "--lr", "0.01", "--lr", "0.02", "--steps", "7", "--batch-size", "8",
        "--seeds", "1", "--jobs", "1", "--json",
    )  # fmt: skip
    data = json.loads(result.stdout)
    assert data["steps"] == 7
    assert [(run["lr"], len(run["losses"])) for run in data["runs"]] == [(0.01, 7), (0.02, 7)]
    assert " --batch-size 8 --steps 7 " in data["findings"]["next"]


def test_a_sweep(gradkeel):
    data = json.loads(gradkeel("exploding-linear", "--sweep", "norm:1..1000", "--json", *QUICK).stdout)
    assert [(point["bound"], point["region"]) for point in data["sweep"]][::6] == [
        (1, "works"),
        (1000, "too loose"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-task"], "gradkeel: unknown task 'no-such-task'"),
        (["nowhere:make_task"], "gradkeel: task 'nowhere:make_task': there is no module 'nowhere'"),
        (["exploding-linear", "--policy", "clip:1"], "gradkeel: unknown policy 'clip"),
        (["exploding-linear", "--policy", "norm:-1"], "gradkeel: policy 'norm:-1'"),
        (["exploding-linear", "--policy", "norm:__import__('os')"], "is not a number"),
        (["exploding-linear", "--sweep", "norm"], "gradkeel: sweep 'norm'"),
        (["exploding-linear", "--seeds", "0"], "gradkeel: seeds=0: it must be 1 or more"),
        (["exploding-linear", "--lr", "-1"], "gradkeel: lr=-1.0"),
        (["exploding-linear", "--run", "python x.py"], "TASK has no effect on a command of your own"),
        (["--run", "python x.py", "--lr", "1"], "--lr has no effect on a command of your own"),
        (["--run", ""], "gradkeel: --run ''"),
        (["exploding-linear", "--jobs", "0"], "gradkeel: jobs=0"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_exit_code_2(gradkeel, tmp_path, arguments, message):
    result = gradkeel(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["file", "file/below", "page"])
def test_where_to_is_checked_before_the_first_run(tmp_path, out, monkeypatch):
    """F9: hours were lost."""
    monkeypatch.setattr("gradkeel.compare.compare", None)  # nothing may be run
    (tmp_path / "file").touch()
    (tmp_path / "page" / "compare.html").mkdir(parents=True)
    result = CliRunner().invoke(app, ["compare", "exploding-linear", "--out", str(tmp_path / out)])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("gradkeel: ")
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "page"]


def test_without_plotly_everything_but_the_page(gradkeel, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = gradkeel("exploding-linear", *QUICK)
    assert result.exit_code == 0
    assert "No page was written" in result.stderr
    assert "pip install 'gradkeel[report]'" in result.stderr
    assert [path.name for path in (tmp_path / "gradkeel-compare").iterdir()] == ["compare.json"]


def test_a_policy_in_the_environment_does_not_take_the_place_of_those_compared(gradkeel, monkeypatch):
    monkeypatch.setenv("GRADKEEL_POLICY", "norm:1.0")
    data = json.loads(gradkeel("exploding-linear", "--policy", "none", "--json", *QUICK).stdout)
    assert all(run["diverged"] for run in data["runs"])


def test_the_example_task_runs(tmp_path):
    command = ["-m", "gradkeel", "compare", "examples.own_task:make_task", "--json", "--jobs", "1", "--out"]
    done = run(warm.python(), *command, os.fspath(tmp_path / "o"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["task"] == "examples.own_task:make_task"
    assert any(run["diverged"] for run in data["runs"] if run["policy"] == "none")
    assert len((ROOT / "examples" / "own_task.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_extra_there_is_one_line_with_the_command(tmp_path, module):
    code = f"import sys; sys.modules[{module!r}] = None\nfrom gradkeel.cli import main\nmain()"
    done = run([sys.executable], "-c", code, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"gradkeel's commands need {module}, which is not installed; run: pip install 'gradkeel[cli,report]'\n"
    )


def test_help_names_every_option(gradkeel):
    words = gradkeel("--help").output
    options = (
        "policy",
        "sweep",
        "lr",
        "batch-size",
        "accumulate",
        "seeds",
        "steps",
        "jobs",
        "run",
        "out",
        "json",
    )
    assert [option for option in options if f"--{option} " not in words] == []


def test_a_reader_that_leaves_is_no_error(tmp_path):
    command = [
        sys.executable,
        "-m",
        "gradkeel",
        "compare",
        "exploding-linear",
        "--json",
        "--seeds",
        "1",
        "--jobs",
        "1",
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        words = process.stderr.read()
    assert "Traceback" not in words
    assert "Broken pipe" not in words


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent as POSIX has it")
def test_ctrl_c_keeps_what_has_finished_and_leaves_no_process(tmp_path):
    arguments = ["exploding-linear", "--seeds", "5000", "--jobs", "2", "--out", "o"]
    code, out, error = interrupt_after_the_first_run(tmp_path, *arguments)
    assert code == 130
    assert "Traceback" not in out + error
    assert "had finished, and are kept" in error
    assert "FOUND" in out
    data = json.loads((tmp_path / "o" / "compare.json").read_text())
    assert data["interrupted"]
    assert 0 < len(data["runs"]) < data["planned_runs"] == 20_000
    assert data["findings"]["caution"].startswith("Interrupted: ")
