"""The mutation test itself: what it draws, which tests it chooses, and that nothing stays behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.mutants import choose, cover, find, judge, page, tree

SOURCE = """\
LIMIT = 3


class Table:
    wide: bool = True

    def size(self, factor=2):
        return (
            LIMIT
            * factor
        )

    def name(self):
        if self.wide:
            return "wide"
        return "narrow"


@functools.lru_cache(maxsize=None)
def kernels():
    return 4
"""
PATH = "src/gradkeel/record/table.py"


def mutant(line, path=PATH):
    return find.Mutant(path, line, "number", "", "")


@pytest.fixture
def found():
    """A map in which size() is run by tests a and b, name() by c and d, and kernels() by whoever came first."""
    tests = {"tests/record/test_a.py::a": 0.1, "tests/record/test_a.py::b": 3.0}
    tests |= {"tests/test_c.py::c": 0.2, "tests/lab/test_d.py::d": 50.0, "tests/test_e.py::e": 0.3}
    a, b, c, d, e = tests
    lines = {1: [e], 5: [e], 7: [e], 8: [a, b], 9: [a, b], 14: [c, d], 15: [c], 16: [d], 21: [e]}
    imports = {"tests/record/test_a.py": 1.0, "tests/test_c.py": 0.5, "tests/lab/test_d.py": 2.0}
    return cover.Map(tests, imports, {PATH: lines}, [])


def letters(tests):
    return "".join(sorted(test[-1] for test in tests))


@pytest.mark.parametrize(
    ("line", "tests"),
    [
        pytest.param(15, "c", id="its own line"),
        pytest.param(10, "ab", id="another line of its statement"),
        pytest.param(7, "ab", id="a default's function"),
        pytest.param(5, "abcd", id="a field's class"),
        pytest.param(1, "abcd", id="a constant's module"),
        pytest.param(21, "abcd", id="a line that runs once for all tests"),
    ],
)
def test_the_tests_that_run_a_line_are_chosen(found, line, tests):
    assert letters(choose.tests_of(found, mutant(line), SOURCE)) == tests


def test_no_test_is_chosen_for_a_line_that_none_runs(found):
    found.lines[PATH] = {8: found.lines[PATH][8]}
    assert choose.tests_of(found, mutant(16), SOURCE) == set()


def test_all_tests_are_chosen_for_a_module_that_holds_nothing_to_call(found):
    assert letters(choose.tests_of(found, mutant(1, "src/gradkeel/other.py"), "LIMIT = 3\n")) == "abcde"


def test_the_own_tests_go_first_then_those_of_other_files(found):
    plan = choose.plan(found.seconds, PATH, found, budget=100.0)
    assert [test[-1] for test in plan.first] == ["a", "b", "c", "e"]
    assert [test[-1] for test in plan.second] == ["d"]
    assert plan.is_whole


@pytest.mark.parametrize(("budget", "taken"), [(2.5, "ace"), (5.5, "abce"), (60.0, "abcde")])
def test_the_budget_leaves_out_the_slowest_and_says_so(found, budget, taken):
    plan = choose.plan(found.seconds, PATH, found, budget=budget)
    assert letters(plan.tests) == taken
    assert plan.is_whole == (taken == "abcde")


def test_the_budget_prefers_a_test_of_the_own_folder(found):
    found.seconds["tests/test_c.py::c"] = 1.0
    assert letters(choose.plan(found.seconds, PATH, found, budget=5.0).tests) == "abe"


def test_one_test_is_run_however_slow(found):
    assert letters(choose.plan(["tests/lab/test_d.py::d"], PATH, found, budget=1.0).tests) == "d"


PLACES = {("a.py", line): [f"{line}{kind}" for kind in "xyz"] for line in range(50)}


def test_a_seed_decides_the_sample():
    first, again, other = (list(find.drawn(PLACES, seed)) for seed in (5, 5, 6))
    assert first == again
    assert first[:10] != other[:10]


def test_a_sample_has_one_mutant_of_a_line():
    drawn = [mutation for _, mutation in find.drawn(PLACES, 5)]
    assert sorted(int(one[:-1]) for one in drawn) == list(range(50))
    assert {one[-1] for one in drawn} == {"x", "y", "z"}


def test_the_core_is_found_by_names_that_are_outside(tmp_path):
    inside = ["guard.py", "ranks/total.py", "kernels/native.py"]
    outside = [
        "__init__.py",
        "ranks/__init__.py",
        "cli/app.py",
        "compare/tasks/digits.py",
        "kernels/triton_host.py",
    ]
    for name in inside + outside:
        path = tmp_path / find.PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    core = find.core(tmp_path)
    assert core == sorted(f"{find.PACKAGE}/{name}" for name in inside)
    assert find.selected(core, "ranks|guard") == [
        f"{find.PACKAGE}/guard.py",
        f"{find.PACKAGE}/ranks/total.py",
    ]


def test_a_difference_is_told_on_one_line():
    old = "a = 1\nb = f(\n    2,\n    deep=True,\n)\n"
    assert find.first_difference(old, old.replace("2,", "3,")) == (3, "2, => 3,")
    assert find.first_difference(old, old.replace("    deep=True,\n", "")) == (4, "deep=True, => ")


def test_words_and_types_are_not_mutated():
    pytest.importorskip("mutmut", reason="`make mutants` installs mutmut")
    from benchmarks.mutants import operators

    source = """
def f(x: Literal[1], *, y=True):
    "Add 1."
    assert x > 0
    if x > 2:
        raise ValueError(f"{x + 1}" + str(x + 3))
    warnings.warn(str(x + 4), stacklevel=2)
    return g(x, scale=5)
"""
    module, found = operators.mutations(source)
    changes = [find.first_difference(source, operators.mutated(module, one))[1] for one in found]
    assert sorted(changes) == [
        "def f(x: Literal[1], *, y=True): => def f(x: Literal[1], *, y=False):",
        "if x > 2: => if x > 3:",
        "if x > 2: => if x >= 2:",
        "return g(x, scale=5) => return g(x, )",
        "return g(x, scale=5) => return g(x, scale=6)",
        "warnings.warn(str(x + 4), stacklevel=2) => pass",
    ]


def verdicts():
    outcomes = ("killed", "killed", "timed out", "survived", "unclear")
    return [judge.Verdict(mutant(line), outcome) for line, outcome in enumerate(outcomes)]


def test_an_unclear_mutant_counts_on_neither_side():
    assert page.score(verdicts()) == "75%"
    assert page.table(verdicts())[-1] == "| all | 5 | 2 | 1 | 1 | 1 | 75% |"


def test_the_page_names_the_survivors_and_the_command():
    pytest.importorskip("mutmut", reason="`make mutants` installs mutmut")
    survivor = find.Mutant(PATH, 7, "swap_op", "a < `b` => a <= `b`", "")
    some = [*verdicts(), judge.Verdict(survivor, "survived", "slower tests left out")]
    text = page.page(some, page.Run(5, 6, "record", 60.0, 12.3, 400), Path(__file__).parents[1])
    assert f"- {PATH}:7 (slower tests left out): ``a < `b` => a <= `b```\n" in text
    assert "make mutants ARGS=\"--seed 5 --sample 6 --only 'record'\"" in text
    assert "| `record` | 6 | 2 | 1 | 2 | 1 | 60% |" in text


def is_alive(pid):
    # A zombie that nobody has waited for yet is dead.
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def ends(pid, seconds=10):
    until = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("ending", ["exit 3", "sleep 60"])
@pytest.mark.parametrize("session", ["", "setsid"])
def test_what_a_command_has_started_ends_with_it(tmp_path, ending, session):
    child = "echo $$ > child.new; mv child.new child; exec sleep 60"
    command = ["sh", "-c", f"{session} sh -c '{child}' & while ! [ -e child ]; do sleep 0.05; done; {ending}"]
    status = tree.Processes().run(
        command, cwd=tmp_path, env=os.environ, output=tmp_path / "output", seconds=1
    )
    assert status == (3 if ending == "exit 3" else None)
    assert ends(int((tmp_path / "child").read_text()))


def test_nothing_starts_after_the_user_has_stopped(tmp_path):
    processes = tree.Processes()
    processes.stop()
    with pytest.raises(tree.StoppedError):
        processes.run(["touch", "file"], cwd=tmp_path, env=os.environ, output=tmp_path / "output")
    assert not (tmp_path / "file").exists()


@pytest.fixture
def checkout(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("one\n")
    return tmp_path


def test_a_map_serves_the_very_tree_it_was_drawn_of(checkout, found):
    folder = checkout / "build"
    cover.save(found, folder, cover.key_of(checkout))
    assert cover.load(folder, cover.key_of(checkout)) == found
    (checkout / "src/a.py").write_text("two\n")
    assert cover.load(folder, cover.key_of(checkout)) is None


def test_a_broken_map_is_named(tmp_path, found):
    path = cover.save(found, tmp_path, "key")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(cover.MapError, match=r"cannot be read.*remove it"):
        cover.load(tmp_path, "key")


def test_a_map_that_cannot_be_kept_is_named_before_it_is_drawn(tmp_path):
    (tmp_path / "build").write_text("a file")
    with pytest.raises(cover.MapError, match="cannot be kept in"):
        cover.writable(tmp_path / "build")
