"""The benchmarks of speed, on shapes so small that they take no time: every question is answered, and rightly."""

import functools

import pytest

from gradkeel import bench
from gradkeel.bench import Gradients, Quartiles
from gradkeel.kernels import native

from benchmarks import pages
from benchmarks.speed import __main__ as speed
from benchmarks.speed.answer import Curve, Target, markdown

pytest.importorskip("accelerate")

SMALL = [(6, 4), (6,), (3, 2, 5), (1,)]
# Those that train real models take minutes, however small the shapes.
QUICK = [
    question
    for question in speed.QUESTIONS
    if question not in {"training", "recording", "autopsy", "memory", "precision"}
]
# All of them clip in float32, or round to the gradient's own 16 bits.
RIGHT = 5e-3


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench.workload, "SHAPES", dict.fromkeys(bench.SHAPES, SMALL))
    for question in speed.QUESTIONS:
        module = __import__(f"benchmarks.speed.{question}", fromlist=["ask"])
        if hasattr(module, "SHAPES"):
            monkeypatch.setattr(module, "SHAPES", dict.fromkeys(bench.SHAPES, SMALL))
    from benchmarks.speed import answer, growth, small, tiny

    monkeypatch.setattr(answer, "SHAPES", dict.fromkeys(bench.SHAPES, SMALL))

    for module in (growth, small):
        monkeypatch.setattr(module, "TIMES", 1)
    monkeypatch.setattr(growth, "ENTRIES", (64, 1024))
    monkeypatch.setattr(growth, "TENSORS", (1, 64))
    monkeypatch.setattr(small, "TURNS", dict.fromkeys(small.SMALL, 5))
    monkeypatch.setattr(tiny.Cold, "block", tiny.Cold.block[:10])


@functools.cache
def asked(question):
    return speed.asked(question, 5)


@pytest.mark.parametrize("question", QUICK)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # optax's and Paddle's, where they are installed
def test_every_question_is_answered_and_every_contender_is_right(question):
    answer = asked(question)
    assert answer.tables or answer.curves or answer.rows
    for table in answer.tables:
        assert all(error < RIGHT for error in table.race.errors.values()), table.race.errors
    text = "\n".join(speed.section(question, answer))
    assert text.startswith("### ")
    assert text.count("**") == 2 * len(answer.tables)
    rows = [
        line
        for line in speed.targets({question: answer})
        if line.endswith((" met |", " MISSED |", " undecided |"))
    ]
    assert len(rows) == len(answer.targets)


@pytest.mark.skipif(native.kernels() is None, reason="torch's operations sum in float32 blocks")
def test_precision_is_that_of_the_dtype(monkeypatch):
    from benchmarks.speed import precision

    monkeypatch.setattr(precision, "ENTRIES", 2**18)
    (target,) = precision.ask(1).targets
    assert target.verdict == "met"


def test_a_target_is_met_or_missed_by_three_rounds_of_four():
    verdicts = [Target("", limit, Quartiles(0.4, 0.5, 0.6)).verdict for limit in (0.6, 0.5, 0.4, 0.39)]
    assert verdicts == ["met", "undecided", "undecided", "MISSED"]


def test_the_page_is_written_between_its_marks(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "images").mkdir()
    page = tmp_path / "benchmarks.md"
    page.write_text("above\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nbelow\n")
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    answers = {"step": asked("step"), "growth": asked("growth")}
    speed.write(answers)
    text = page.read_text()
    assert text.startswith("above\n<!--")
    assert text.endswith("-->\nbelow\n")
    assert "old" not in text
    assert "torch clip_grad_norm_ + step, again (control)" in text
    for name in ("entries", "tensors"):
        assert f"images/benchmarks-{name}.png" in text
        assert (tmp_path / f"images/benchmarks-{name}.png").stat().st_size > 5000


def test_a_race_becomes_a_table():
    gradients = Gradients(SMALL)
    race = bench.race([bench.Contender("a", list), gradients.read()], rounds=5)
    lines = markdown(bench.Table("title", race))
    assert lines[0] == "**title**"
    assert lines[2] == "|  | ms | x a | x one read | first run, ms |"
    assert len(lines) == 4 + 3 + 1


def test_curves_are_drawn_for_any_number_of_lines(tmp_path):
    pytest.importorskip("matplotlib")
    speed.draw([Curve("name", "title", "x", {"one": [(1.0, 2.0), (10.0, 3.0)]})], tmp_path)
    assert (tmp_path / "benchmarks-name.png").exists()
