"""The wheel, installed where nothing but torch is, guards an optimizer; and no extra is imported unasked."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import gradkeel

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# What the extras install, by the names under which Python imports it.
EXTRAS = {
    "accelerate",
    "lightning",
    "matplotlib",
    "mlflow",
    "plotly",
    "pyarrow",
    "pytorch_lightning",
    "ray",
    "rich",
    "sklearn",
    "tensorboard",
    "transformers",
    "typer",
    "wandb",
}

GUARDED_STEP = """
import json, sys
import torch
import gradkeel as gk

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
(100 * model(torch.ones(3, 2)).sum()).backward()
optimizer.step()
report = guard.report
print(json.dumps({
    "file": gk.__file__,
    "version": gk.__version__,
    "clipped": report.clipped,
    "clipped_norm": report.clipped_norm,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def run(*command, env=None):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd="/", env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def requirements(name, found):
    """Add to ``found`` the distribution ``name`` and all that it requires here, extras left out."""
    from packaging.requirements import Requirement

    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    found[key] = importlib.metadata.distribution(name)
    for text in found[key].requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirements(requirement.name, found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRADKEEL_")}
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, env=kept)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python_with_torch_alone(wheel, tmp_path_factory):
    """An environment that holds the wheel, torch and what torch requires: links, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    found = {}
    requirements("torch", found)
    for distribution in found.values():
        for top in {
            file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    )
    return python


def test_wheel_holds_the_types_marker_the_version_and_the_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    assert "gradkeel/py.typed" in names
    pages = {
        f"gradkeel/{name}" for name in ("page/page.css", "page/linked.js", "page/rows.js", "explain/renew.js")
    }
    assert pages <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert f"Version: {gradkeel.__version__}" in lines
    assert [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line] == [
        "Requires-Dist: torch>=2.6"
    ]
    assert not [name for name in names if not name.startswith(("gradkeel/", "gradkeel-"))]


@pytest.mark.skipif(not (os.environ.get("CC") or shutil.which("cc")), reason="no C compiler")
def test_the_wheel_is_for_every_python_where_there_is_a_compiler(wheel):
    """And pure without one: tests/kernels/test_native.py builds that."""
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    assert libraries == ["gradkeel/kernels/_native.so"]


def test_sdist_holds_what_git_does(tmp_path):
    known = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if known.returncode:
        pytest.skip("no git, or no clone")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {name for name in known.stdout.splitlines() if (ROOT / name).exists()}
    assert {name for name in files - names if not name.startswith(".")} == set()


def test_wheel_guards_an_optimizer_with_torch_alone(python_with_torch_alone):
    result = json.loads(run(python_with_torch_alone, "-I", "-c", GUARDED_STEP))
    assert Path(result["file"]).is_relative_to(python_with_torch_alone.parents[1])
    assert result["version"] == gradkeel.__version__
    assert result["clipped"] is True
    # One fp32 multiplication rounds the norm of 1 by 6e-8 at most per entry.
    assert result["clipped_norm"] == pytest.approx(1.0, rel=1e-6)


def test_no_extra_is_imported_unasked():
    result = json.loads(run(sys.executable, "-I", "-c", GUARDED_STEP))
    assert EXTRAS.isdisjoint(result["modules"])


def test_every_extra_is_watched():
    requirement = re.compile(r"[A-Za-z0-9_-]+")
    extras = PROJECT["optional-dependencies"]
    named = {
        requirement.match(text)[0].replace("scikit-learn", "sklearn").removesuffix("-skinny")
        for extra, texts in extras.items()
        if extra not in ("all", "dev")
        for text in texts
    }
    assert named - {"gradkeel"} <= EXTRAS  # an extra may ask for another one
    assert set(re.findall(r"\w+", extras["all"][0].partition("[")[2])) == set(extras) - {"all", "dev"}


def test_the_command_line_starts_and_names_what_is_missing(python_with_torch_alone):
    done = subprocess.run(
        [python_with_torch_alone.parent / "gradkeel", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'gradkeel[cli" in done.stderr
    assert "Traceback" not in done.stderr
