"""``gradkeel compare --ray``: the same results from a real Ray of two CPUs, and what is said where there is none.

Ray runs in processes of its own, never in pytest's: it changes ``sys.path``, signal handlers and the environment.
"""

import importlib
import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import types

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("rich", reason="the command line needs the extra cli")

from typer.testing import CliRunner

from ctrl_c import interrupt_after_the_first_run, wait_until_gone
from gradkeel.cli import compare as command
from gradkeel.cli.app import app
from gradkeel.compare import TaskError, compare, make_plan, ray_pool
from gradkeel.compare.findings import document
from gradkeel.explain import explain

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
posix = pytest.mark.skipif(os.name != "posix", reason="process groups and SIGINT are as POSIX has them")
ENDS_WITHIN = 240  # seconds; Ray starts in some ten, on a machine that has nothing else to do
QUICK = ["exploding-linear", "--policy", "none", "--policy", "norm:1.0", "--seeds", "2", "--steps", "6"]

CLUSTER = """
import logging, sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()  # until the test closes it, or dies
ray.shutdown()
"""


@pytest.fixture(scope="module")
def environment():
    """Ray's files and its token in places that nobody else uses, so that no other Ray of this machine is joined."""
    # Short, and not pytest's: the path of a socket must not be longer than 107 characters.
    place = "/tmp" if os.name == "posix" else None
    with tempfile.TemporaryDirectory(prefix="ray-", dir=place, ignore_cleanup_errors=True) as folder:
        mine = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        yield kept | mine


@pytest.fixture(scope="module")
def cluster(environment, tmp_path_factory):
    """Address of a cluster that somebody else has started, in another directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        address = process.stdout.readline().strip()
        assert address
        yield address
        assert process.poll() is None, "whoever joined the cluster has ended it"
        process.stdin.close()
        process.wait(ENDS_WITHIN)
    wait_until_gone(process.pid)


@pytest.fixture
def gradkeel(environment, tmp_path):
    """Run ``gradkeel compare`` in an empty directory and a process of its own."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "gradkeel", "compare", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=ENDS_WITHIN,
            check=False,
        )

    return run


def untimed(data):
    """All of a compare.json that does not depend on how fast the machine is."""
    for row in [*data["runs"], *data["summary"]]:
        del row["seconds_per_step"]
    return data


def locally(target, **other):
    """What compare.json holds after the same runs in this process."""
    plan = make_plan(target, **{"policies": ["none", "norm:1.0"], "seeds": 2} | other)
    return untimed(json.loads(json.dumps(document(compare(plan, jobs=1)))))


@needs_ray
@posix
@pytest.mark.full  # in `make test` the next test holds the results, and Ctrl-C that a Ray of our own starts and ends
def test_ray_is_started_gives_the_same_results_as_json_alone_and_is_gone_afterwards(environment, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "gradkeel", "compare", *QUICK, "--json", "--ray"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        out, error = process.communicate(timeout=ENDS_WITHIN)
    assert (process.returncode, error) == (0, "")
    wait_until_gone(process.pid)
    assert untimed(json.loads(out)) == locally("exploding-linear", steps=6)


@needs_ray
def test_a_task_of_the_current_directory_runs_on_a_cluster_that_is_joined_and_is_recorded_here(
    gradkeel, cluster, tmp_path, monkeypatch
):
    (tmp_path / "ray_parts.py").write_text("STEPS = 7\n")
    (tmp_path / "ray_task.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from ray_parts import STEPS\n"
        "from gradkeel.compare.tasks.exploding_linear import ExplodingLinear\n"
        "class Mine(ExplodingLinear):\n"
        "    steps = STEPS\n"
        "    def model(self):\n"
        f"        died = Path({str(tmp_path / 'died')!r})\n"
        "        if not died.exists():\n"
        "            died.touch()\n"
        "            os._exit(1)\n"
        "        return super().model()\n"
    )
    arguments = ["ray_task:Mine", "--policy", "none", "--policy", "norm:1.0", "--seeds", "2", "--record"]
    done = gradkeel(*arguments, "--json", "--jobs", "1", f"--ray={cluster}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()  # the first worker, whose run was made again by another
    monkeypatch.chdir(tmp_path)
    assert untimed(json.loads(done.stdout)) == locally("ray_task:Mine")
    folder = tmp_path / "gradkeel-compare" / "runs"
    names = [f"{policy}-lr0.01-{seed}.keel" for policy in ("none", "norm_1.0") for seed in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert explain(folder / names[0]).explosion.kind == "initialization"


@needs_ray
def test_an_error_of_the_task_is_raised_as_it_is_without_ray(gradkeel, cluster, tmp_path):
    (tmp_path / "ray_fails.py").write_text(
        "from gradkeel.compare.tasks.exploding_linear import ExplodingLinear\n"
        "class Fails(ExplodingLinear):\n"
        "    def model(self):\n"
        "        1 / 0\n"
    )
    failed = gradkeel("ray_fails:Fails", "--ray", cluster)
    assert failed.returncode == 1
    assert failed.stderr.endswith("\nZeroDivisionError: division by zero\n")
    assert "1 / 0" in failed.stderr  # where in the worker it was


@needs_ray
@posix
def test_ctrl_c_keeps_what_has_finished_and_leaves_no_process(environment, tmp_path):
    arguments = ["exploding-linear", "--seeds", "5000", "--out", "o", "--ray"]
    code, out, error = interrupt_after_the_first_run(tmp_path, *arguments, env=environment)
    assert code == 130
    assert "Traceback" not in out + error
    assert "had finished, and are kept" in error
    data = json.loads((tmp_path / "o" / "compare.json").read_text())
    assert data["interrupted"]
    assert 0 < len(data["runs"]) < data["planned_runs"] == 20_000


@needs_ray
def test_an_address_that_nobody_answers_at_is_one_line(gradkeel):
    with socket.socket() as bound:  # and does not listen: nobody else can take the port
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        done = gradkeel(*QUICK, "--json", "--ray", address)
        with pytest.raises(TaskError, match=f"--ray=ray://{address}: nothing answers at {address}"):
            ray_pool.check(f"ray://{address}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"gradkeel: --ray={address}: nothing answers at {address} (Connection refused)\n"


@pytest.mark.parametrize("address", ["head-node", "head-node:", "ray://", "[::1", "head-node:x"])
def test_an_address_that_is_none_is_said_to_be_none(address):
    with pytest.raises(TaskError, match="an address is host:port, ray://host:port, auto or local"):
        ray_pool.check(address)


def test_without_the_extra_there_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["compare", *QUICK, "--json", "--ray"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "gradkeel: comparing on a Ray cluster needs ray, which is not installed; run: pip install 'gradkeel[ray]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_program_keeps_the_connection_that_it_has(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(TaskError, match="connected to Ray already"):
        compare(make_plan("exploding-linear"), ray="")


def test_a_command_of_ones_own_stays_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["compare", "--run", "python train.py", "--ray"])
    assert result.exit_code == 2
    assert (
        "gradkeel: --ray: a command of your own, its files and its record are on this machine"
        in result.stderr
    )


@pytest.mark.parametrize(
    ("words", "ray", "task"),
    [
        ("exploding-linear", None, "exploding-linear"),
        ("--ray", "", None),
        ("exploding-linear --ray", "", "exploding-linear"),
        ("--ray exploding-linear", "", "exploding-linear"),
        ("--ray my.module:make_task", "", "my.module:make_task"),
        ("--ray --seeds 3", "", None),
        ("--ray head:6379 exploding-linear", "head:6379", "exploding-linear"),
        ("--ray 10.0.0.1:6379", "10.0.0.1:6379", None),
        ("--ray [::1]:6379", "[::1]:6379", None),
        ("--ray ray://head:10001 my.module:make_task", "ray://head:10001", "my.module:make_task"),
        ("my.module:make_task --ray auto", "auto", "my.module:make_task"),
        ("--ray=head:6379", "head:6379", None),
        ("--ray= exploding-linear", "", "exploding-linear"),
    ],
)
def test_the_address_may_be_left_out(words, ray, task):
    given = command.Command("compare", params=parameters())
    values = given.make_context("compare", words.split()).params
    assert (values["ray"], values["task"]) == (ray, task)


def parameters():
    """Those of the real command."""
    from typer.main import get_command

    return get_command(app).commands["compare"].params


def test_modules_of_the_current_directory_go_along_and_no_others(tmp_path, monkeypatch):
    (tmp_path / "ray_alone.py").touch()
    (tmp_path / "ray_package").mkdir()
    (tmp_path / "ray_package" / "__init__.py").write_text("from ray_package import inner")
    (tmp_path / "ray_package" / "inner.py").touch()
    (tmp_path / "ray_namespace").mkdir()
    (tmp_path / "ray_namespace" / "inner.py").touch()
    (tmp_path / "ray_unused.py").touch()
    (tmp_path / "json").mkdir()  # a folder that only happens to be called like a module
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ray_alone", "ray_package", "ray_namespace.inner"):
        importlib.import_module(name)
    assert ray_pool.own_modules() == [
        str(tmp_path / name) for name in ("ray_alone.py", "ray_namespace", "ray_package")
    ]
