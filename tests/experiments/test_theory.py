"""The experiments that take seconds run here, with their criteria; `make test-full` runs the trainings as well."""

import math
import subprocess
from pathlib import Path

import pytest
import torch

import warm

from experiments.theory import EXPERIMENTS
from experiments.theory.descent import best_fixed_step, cosh_problems, iterations, log_slope, quartic_problems
from experiments.theory.deterministic import random_problems, violations
from experiments.theory.document import document, explaining_pictures, table, write
from experiments.theory.experiment import Result
from experiments.theory.noise import where_clipped_noise_balances

ROOT = Path(__file__).resolve().parents[2]
QUICK = [name for name, experiment in EXPERIMENTS.items() if experiment.quick]
SLOW = [name for name in EXPERIMENTS if name not in QUICK]
# R6 asks for a weaker correlation without clipping than char-lstm shows; docs/theory.md says so.
MISSED = {"R6"}


def test_every_experiment_of_the_plan_is_there():
    assert list(EXPERIMENTS) == [f"R{i}" for i in (*range(1, 14), *range(17, 22))]


@pytest.mark.parametrize("name", QUICK)
def test_criterion_is_met(name):
    if name in {"R7", "R8"}:
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    result = EXPERIMENTS[name].run()
    assert result.passed, result.measured
    assert all(len(values) > 0 for values in result.series.values())


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SLOW)
def test_criterion_of_a_training_is_met(name):
    result = EXPERIMENTS[name].run()
    assert result.passed == (name not in MISSED), result.measured


def problems_of_each_kind():
    return random_problems(30, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", range(3))
def test_gradients_are_those_of_the_values(kind):
    problems = problems_of_each_kind()[kind]
    x = problems.start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problems.value(x).sum(), x)
    assert torch.allclose(problems.gradient(problems.start), gradient, rtol=1e-12)


@pytest.mark.parametrize("kind", range(3))
def test_hessians_are_bounded_as_the_problems_say(kind):
    problems = problems_of_each_kind()[kind]
    for scale in (0.0, 0.1, 0.5, 1.0):
        x = problems.start * scale
        # Every problem depends on its own row, so the Hessian of the sum is block diagonal.
        whole = torch.autograd.functional.hessian(lambda y: problems.value(y).sum(), x)
        blocks = torch.stack([whole[i, :, i, :] for i in range(len(x))])
        largest = torch.linalg.eigvalsh(blocks).abs().amax(1)
        allowed = problems.l0 + problems.l1 * torch.linalg.vector_norm(problems.gradient(x), dim=1)
        assert (largest <= allowed * (1 + 1e-9)).all()


def test_violations_are_seen_beyond_the_condition():
    problems = problems_of_each_kind()[0]
    bound = problems.l0 / problems.l1
    limit = 1 / (problems.l0 + problems.l1 * bound)
    assert not violations(problems, limit, bound, steps=50).any()
    assert violations(problems, 20 * limit, bound, steps=50).any()


def test_iterations_are_counted_until_the_accuracy_is_reached():
    # x <- (1 - 2 h) x on 2 cosh(x) near 0, where the gradient is 2 x: 0.5^k * 0.02 <= 0.001 first at k = 5.
    one = torch.ones(1, dtype=torch.float64)
    problem = cosh_problems(one, one, 0.01 * one)
    assert iterations(problem, lambda _: 0.25 * one, 0.001, limit=100).tolist() == [5]
    assert iterations(problem, lambda _: 0.25 * one, 0.001, limit=4).tolist() == [math.inf]
    rates = torch.tensor([0.01, 0.25, 3.0], dtype=torch.float64)

    def copies(k):
        return cosh_problems(one.expand(k), one.expand(k), 0.01 * one.expand(k))

    assert best_fixed_step(copies, rates, 0.001, limit=100) == 5


def test_a_rotation_changes_nothing():
    weights = torch.tensor([[1.0, 0.5, 0.25]], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    l1, x = torch.ones(1, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    turned = quartic_problems(weights, turn, l1, x)
    plain = quartic_problems(weights, torch.eye(3, dtype=torch.float64), l1, x @ turn)
    # Float64, a few roundings.
    assert torch.allclose(turned.value(turned.start), plain.value(plain.start), rtol=1e-12)
    assert torch.allclose(
        turned.gradient(turned.start).norm(), plain.gradient(plain.start).norm(), rtol=1e-12
    )


def test_log_slope_of_a_power():
    x = torch.tensor([1.0, 3.0, 10.0])
    assert log_slope(x, 5 * x**0.7) == pytest.approx(0.7)


def test_where_clipped_noise_balances_by_sampling():
    samples = torch.empty(10**6).exponential_(generator=torch.Generator().manual_seed(0)) - 1
    for bound in (0.1, 0.5, 2.0):
        x = where_clipped_noise_balances(bound)
        # A million samples in [-bound, bound]: standard error below bound / 1000.
        assert float((x + samples).clamp(-bound, bound).mean()) == pytest.approx(0, abs=4 * bound / 1000)


def a_result(name, *, passed=True, series=None):
    return Result(name, "claim | with a bar", "criterion", "‖g‖ measured", passed, series or {})


def test_the_table_tells_criteria_that_are_missed():
    lines = table([a_result("R1"), a_result("R2", passed=False)]).splitlines()
    assert lines[2] == "| R1 | claim \\| with a bar | criterion | ‖g‖ measured | met |"
    assert lines[3].endswith("| MISSED |")


def test_the_page_is_written_with_the_pictures_that_there_are(tmp_path):
    pytest.importorskip("matplotlib")
    results = [EXPERIMENTS[name].run() for name in ("R18", "R19")]
    written = {path.name for path in write(results, tmp_path)}
    assert written == {
        "theory.md",
        "theory-fixed-steps.png",
        "understanding-three-clips.png",
        "understanding-forms.png",
    }
    page = (tmp_path / "theory.md").read_text(encoding="utf-8")
    assert "(images/theory-fixed-steps.png)" in page
    assert "theory-depth" not in page
    assert "- **R18**: Curvatures up to L = 3" in page
    for path in (tmp_path / "images").iterdir():
        assert path.stat().st_size > 10_000


def test_a_page_without_pictures_names_none():
    assert "![" not in document([a_result("R1")], [])


def test_pictures_are_the_same_bytes_for_the_same_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        explaining_pictures(folder)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def run_command(*arguments):
    return subprocess.run(
        [*warm.python(), "-m", "experiments.theory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_criterion_and_measurement(tmp_path):
    pytest.importorskip("matplotlib")
    result = run_command("--only", "R19", "--only", "R4", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "R19  met" in result.stdout
    assert "criterion: relative error < 1e-6" in result.stdout
    assert "2 of 2 criteria met" in result.stdout
    assert (tmp_path / "theory.md").is_file()


def test_an_unknown_experiment_ends_with_one_line(tmp_path):
    result = run_command("--only", "R14", "--out", str(tmp_path))
    assert result.returncode == 2
    assert "unknown experiment 'R14'" in result.stderr
