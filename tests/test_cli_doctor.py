"""``gradkeel doctor``: the path in use, why, what to do about it, and whether it computes the right numbers."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("rich", reason="the command line needs the extra cli")

from typer.testing import CliRunner

import gradkeel as gk
from gradkeel import doctor
from gradkeel.apply import host
from gradkeel.cli.app import app
from gradkeel.kernels import library, native, triton_host
from gradkeel.measure import powers

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason=str(native.unavailable()))


@pytest.fixture(autouse=True)
def _one_thread():
    """Whatever the shell asks for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def told():
    """What it says, in one line of single spaces; it must not have complained."""
    result = run()
    assert result.exit_code == 0, result.output
    assert "check CPU right: 12 norms" in " ".join(result.stdout.split())
    return " ".join(result.stdout.split())


def diagnosed():
    """What it says as JSON."""
    return json.loads(run("--json").stdout)


@needs_kernels
def test_native_kernels(found):
    words, cpu = told(), diagnosed()["cpu"]
    level = native.kernels().level
    assert words.startswith(f"gradkeel {gk.__version__} with torch {torch.__version__}, Python ")
    assert f"CPU native kernels ({level}), on one thread" in words
    assert "why" not in words.split("GPU")[0]
    assert (cpu["path"], cpu["level"], cpu["threads"]) == ("native", level, 1)
    assert (cpu["reason"], cpu["remedy"]) == (None, None)


@needs_kernels
def test_how_many_threads_and_whose():
    torch.set_num_threads(2)
    route = doctor.cpu_route()
    shares = native.kernels().shares_threads
    assert (route.threads, route.shares_threads) == ((2, True) if shares else (1, False))


@needs_kernels
def test_a_torch_with_another_openmp_library(found):
    found.setattr(native, "openmp", lambda: None)
    assert "on one thread: torch's OpenMP library is of another kind" in told()
    assert diagnosed()["cpu"]["shares_threads"] is False


@needs_kernels
@pytest.mark.parametrize("value", ["baseline", "BASELINE"])
def test_a_named_level(found, value):
    found.setenv(native.VARIABLE, value)
    assert "CPU native kernels (baseline)" in told()


@needs_kernels
@pytest.mark.parametrize("value", ["on", "1", ""])
def test_the_best_level(found, value):
    found.setenv(native.VARIABLE, value)
    assert diagnosed()["cpu"]["path"] == "native"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("off", "turned off by GRADKEEL_NATIVE=off"),
        ("nonsense", "GRADKEEL_NATIVE=nonsense: must be off or one of baseline, avx2, avx512"),
    ],
)
def test_turned_off_by_the_environment(found, value, why):
    found.setenv(native.VARIABLE, value)
    words, data = told(), diagnosed()
    assert f"CPU torch's operations, on one thread; the native kernels would be faster why {why}" in words
    assert "to do unset GRADKEEL_NATIVE" in words
    assert (data["cpu"]["path"], data["cpu"]["reason"]) == ("torch", why)
    assert data["is_healthy"]


def test_not_built(found, tmp_path):
    found.setattr(library, "LIBRARY", tmp_path / "none.so")
    found.setattr(sys, "platform", "linux")
    words = told()
    assert "why not built: gradkeel was installed without a working C compiler" in words
    assert "to do install a C compiler such as gcc, then install gradkeel again" in words
    native._found.cache_clear()
    found.setattr(sys, "platform", "darwin")
    assert "why not built: they are for Linux" in told()


@needs_kernels
def test_a_processor_a_library_and_a_torch_that_do_not_fit(found):
    found.setattr(native, "LEVELS", ("baseline",))
    found.setenv(native.VARIABLE, "avx512")
    assert "must be off or one of baseline" in told()
    found.undo()
    native._found.cache_clear()
    found.setattr(library, "_INTERFACE", -1)
    assert "why built from other sources than these to do install gradkeel again" in told()
    found.undo()
    native._found.cache_clear()
    found.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert "has no C interface for DLPack to do install torch 2.13" in told()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert f"GPU none that torch {torch.__version__} can use" in told()
    assert diagnosed()["accelerator"] is None


def with_accelerator(monkeypatch):
    """Let the CPU pass for an accelerator."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))


@pytest.fixture
def triton(monkeypatch):
    """Look for the Triton kernels again, in this test and after it."""
    triton_host.kernels.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    triton_host.kernels.cache_clear()


def test_a_gpu_without_triton(triton):
    with_accelerator(triton)
    triton.setenv(triton_host.VARIABLE, "off")
    words, data = told(), diagnosed()
    assert "GPU torch foreach operations, on cpu why turned off by GRADKEEL_TRITON=off" in words
    assert "to do unset GRADKEEL_TRITON" in words
    assert data["accelerator"]["path"] == "foreach"
    assert len(data["checks"]) == 2


def test_a_gpu_whose_triton_is_wrong(triton):
    with_accelerator(triton)
    triton.setattr(triton_host, "unavailable", lambda device: "the Triton kernel for scale is wrong")
    assert "why the Triton kernel for scale is wrong" in told()


def test_a_gpu_with_triton(triton):
    with_accelerator(triton)
    triton.setattr(triton_host, "unavailable", lambda device: None)
    assert doctor.accelerator_route() == doctor.Route("cpu", "triton", "cpu")


def wrong_norms(monkeypatch):
    right = powers.read

    def read(*args, **kwargs):
        reading = right(*args, **kwargs)
        # A relative error of 1e-3 in one norm of many: beyond what any path may be off by, 5e-6.
        return powers.Read(reading.norms * torch.linspace(1, 1.001, len(reading.norms), dtype=torch.float64))

    monkeypatch.setattr(powers, "read", read)
    return "a norm is off by 1.0e-03"


def wrong_scaling(monkeypatch):
    def scale_naively(parameters, factor, *_):
        for parameter in parameters:
            parameter.grad[5:] *= factor

    monkeypatch.setattr(host, "scale", scale_naively)
    return "entries were scaled wrongly"


def blindness(monkeypatch):
    right = powers.read

    def read(*args, **kwargs):
        return powers.Read(right(*args, **kwargs).norms.nan_to_num(0.0, 0.0))

    monkeypatch.setattr(powers, "read", read)
    return "3 of 3 tensors with NaN or inf have a finite norm"


def a_kernel_that_raises(monkeypatch):
    def read(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(powers, "read", read)
    return "RuntimeError: no kernel image is available"


@pytest.mark.parametrize("fault", [wrong_norms, wrong_scaling, blindness, a_kernel_that_raises])
def test_a_wrong_path_is_told_and_exits_with_1(monkeypatch, fault):
    words = fault(monkeypatch)
    result = run()
    assert result.exit_code == 1
    assert "check CPU WRONG: " in " ".join(result.stdout.split())
    assert words in " ".join(result.stdout.split())
    assert "report this page as a bug" in result.stdout
    result = run("--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert not data["is_healthy"]
    assert not data["checks"][0]["is_right"]


@needs_kernels
def test_a_wrong_native_kernel_is_found_and_how_to_go_on_without_it(monkeypatch):
    right = native.Kernels.norms

    def norms(self, *args, **kwargs):
        found = right(self, *args, **kwargs)
        found.norms[0] = float("nan")
        return found

    monkeypatch.setattr(native.Kernels, "norms", norms)
    result = run()
    assert result.exit_code == 1
    assert "a norm is off by inf" in result.stdout
    assert "set GRADKEEL_NATIVE=off, and report" in result.stdout
    assert json.loads(run("--json").stdout)["checks"][0]["norm_error"] is None


def test_extras(monkeypatch):
    version = importlib.metadata.version

    def without_ray(package):
        if package in {"ray", "plotly"}:
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_ray)
    missing = doctor.missing_packages()
    assert missing["ray"] == ("ray",)
    assert missing["report"] == ("plotly",)
    assert missing["cli"] == ()
    assert {"all", "dev"}.isdisjoint(missing)
    assert "ray, report" in told()
    assert "pip install 'gradkeel[" in told()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1")
    assert "extras all installed" in told()


def test_extras_of_a_package_that_is_not_installed(monkeypatch):
    def metadata(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    assert "extras unknown: gradkeel is imported without being installed" in told()


def test_json_is_all_that_goes_to_stdout():
    done = subprocess.run(
        [sys.executable, "-m", "gradkeel", "doctor", "--json"], capture_output=True, text=True, check=False
    )
    data = json.loads(done.stdout)
    assert done.returncode == 0
    assert set(data) == {
        "version", "gradkeel", "torch", "python", "platform", "cpu", "accelerator", "checks", "missing", "is_healthy",
    }  # fmt: skip
    (check, *_) = data["checks"]
    assert (check["tensors"], check["wrong_entries"], check["unseen"], check["is_right"]) == (12, 0, 0, True)
