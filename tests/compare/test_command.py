"""``compare --run``: a script of the user's own, changed in nothing."""

import shlex
import sys

import pytest

import warm
from gradkeel.compare import TaskError, compare, make_command_plan
from gradkeel.compare.command import _filled
from gradkeel.compare.findings import findings
from gradkeel.compare.page import compare_page
from gradkeel.compare.run import Trial
from gradkeel.compare.summary import summarize
from gradkeel.record import Reader

SCRIPT = """
import os
import torch
import gradkeel as gk

torch.manual_seed(int(os.environ["GRADKEEL_SEED"]))
model = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 1))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
    model[0].weight.add_(2.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
guard = gk.attach(optimizer, gk.ClipByNorm(5.0), model=model)
for step in range(20):
    x = torch.randn(16, 1)
    loss = (model(x) - x - 3).square().mean()
    optimizer.zero_grad()
    loss.backward()
    {log}
    optimizer.step()
"""
LOG = "guard.log(loss=loss, lr=0.01)"


@pytest.fixture
def script(tmp_path):
    """The command that runs a script with this source, in Python or in a copy of one that has imported torch."""

    def write(source, python=None):
        path = tmp_path / "train.py"
        path.write_text(source, encoding="utf-8")
        python = python or (warm.python() if "import torch" in source else [sys.executable])
        return shlex.join([*python, str(path)])

    return write


def run(command, tmp_path, say=lambda words: None, **other):
    return compare(make_command_plan(command, **other), records=tmp_path / "runs", say=say)


def test_an_unmodified_script_is_run_under_each_policy_and_seed(script, tmp_path):
    result = run(script(SCRIPT.format(log=LOG)), tmp_path, policies=["none", "norm:1.0"], seeds=2)
    assert [(r.policy, r.seed, r.lr) for r in result.runs] == [
        ("none", 0, 0.01), ("norm:1.0", 0, 0.01), ("none", 1, 0.01), ("norm:1.0", 1, 0.01),
    ]  # fmt: skip
    none, clipped, other, _ = result.runs
    assert none.diverged
    assert none.diverged_at <= 4
    assert (none.onset.step, none.optimizer, none.clip_rate) == (1, "SGD", 0.0)
    assert none.verdict == "diverged_from_start"
    assert not clipped.diverged
    assert clipped.verdict == "healthy"
    assert clipped.clip_rate > 0
    assert len(clipped.losses) == len(clipped.norms) == 20
    # The guard's own norm: all parameters, before clipping; the same weights and batch under both.
    assert clipped.norms[0] == none.norms[0] > 1
    assert clipped.losses[0] == none.losses[0] != other.losses[0]
    words = findings(result)
    assert words.found.startswith("At lr 0.01 unclipped training diverged in 2 of 2 seeds, norm:1.0 in 0.")
    assert words.next.startswith("gradkeel compare --run ")
    page = compare_page(result, summarize(result.runs), words)
    assert "gradkeel compare --run" in page
    outputs = sorted(path.name for path in (tmp_path / "runs").glob("*.log"))
    assert outputs == ["none-0.log", "none-1.log", "norm_1.0-0.log", "norm_1.0-1.log"]


def test_without_a_logged_loss_the_gradients_tell(script, tmp_path):
    command = script(SCRIPT.format(log=""), python=[sys.executable])  # once with the real one throughout
    result = run(command, tmp_path, policies=["none", "norm:1.0"])
    none, clipped = result.runs
    assert (none.losses, none.lr) == ([], 0.01)
    assert none.diverged
    assert not clipped.diverged
    assert "guard.log(loss=...)" in findings(result).found


def test_a_script_that_fails_shows_its_last_words(script, tmp_path):
    with pytest.raises(TaskError, match=r"exited with 1 under none(.|\n)*ZeroDivisionError"):
        run(script("1 / 0"), tmp_path)


def test_a_script_that_guards_nothing_says_which_line_it_needs(script, tmp_path):
    with pytest.raises(TaskError, match=r"guarded no step.*gradkeel\.attach"):
        run(script("pass"), tmp_path)


def test_a_command_that_is_not_there(tmp_path):
    with pytest.raises(TaskError, match="cannot be started"):
        run("no-such-program-anywhere", tmp_path)


def test_losses_between_the_logged_ones_are_the_last_logged():
    nan = float("nan")
    assert _filled([nan, 3.0, nan, 2.0, nan], [False] * 5) == [3.0, 3.0, 3.0, 2.0, 2.0]
    kept = _filled([3.0, nan, nan], [False, False, True])
    assert kept[:2] == [3.0, 3.0]
    assert kept[2] != kept[2]


# -- what a script of one's own does with seeds, files and the line ------------------------------------------------


def test_policies_never_share_files():
    """F10: `exclude=?.bias` and `exclude=*.bias` came from one run."""
    policies = [
        "norm:1.0",
        "norm:1.0,exclude=?.bias",
        "norm:1.0,exclude=*.bias",
        "norm:1.0_exclude=_.bias",
        "norm_1.0",
    ]
    policies += [
        "norm:1.0,exclude=a*",
        "norm:1.0,exclude=A*",
        f"norm:1,exclude={'x' * 300}",
        f"norm:1,exclude={'x' * 301}",
    ]
    trials = [
        Trial(policy, lr, seed) for policy in policies for lr in (None, 0.1, 0.1000000001) for seed in (0, 1)
    ]
    names = [trial.record_name.lower() for trial in trials]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 200
    assert Trial("norm:1.0", None, 0).record_name == "norm_1.0-0.keel"


def test_files_of_like_policies_hold_their_own_runs(script, tmp_path):
    policies = ["global-norm:0.5,exclude=?.bias", "global-norm:0.5,exclude=*.bias,exclude=0.weight"]
    result = run(script(SCRIPT.format(log=LOG)), tmp_path, policies=policies)
    records = sorted((tmp_path / "runs").glob("*.keel"))
    assert len(records) == 2
    assert result.runs[0].norms[0] != result.runs[1].norms[0]


def test_a_script_that_ignores_its_seed_is_found_out(script, tmp_path):
    source = SCRIPT.format(log=LOG).replace('int(os.environ["GRADKEEL_SEED"])', "7")
    result = run(script(source), tmp_path, policies=["none", "norm:1.0"], seeds=2)
    words = findings(result)
    assert words.caution.startswith("The script ignores GRADKEEL_SEED")
    assert "2 of 2" not in words.found
    assert "in 1 of 1 seed" in words.found


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (
            'int(os.environ["GRADKEEL_SEED"])',
            "every policy of a seed began with the same loss and gradient norm",
        ),
        ("os.getpid()", "not known to begin from the same weights and batches"),
    ],
)
def test_that_runs_began_alike_is_said_where_it_was_checked(script, tmp_path, seed, expected):
    source = SCRIPT.format(log=LOG).replace('int(os.environ["GRADKEEL_SEED"])', seed)
    result = run(script(source), tmp_path, policies=["norm:0.5", "norm:1.0"], seeds=1)
    words = findings(result)
    page = compare_page(result, summarize(result.runs), words)
    assert expected in page
    assert "the same initial weights" not in page
    assert ("did not begin with the same loss" in words.caution) == ("getpid" in seed)


def test_a_missing_line_is_said_before_the_first_run_is_over(script, tmp_path):
    """It was said after a whole run."""
    said = []
    with pytest.raises(TaskError, match="guarded no step"):
        run(script("import pathlib; assert not pathlib.Path('x').exists()"), tmp_path, said.append)
    assert len(said) == 1
    assert "do not speak of gradkeel" in said[0]


def test_a_script_that_attaches_late_or_never_is_said_while_it_runs(script, tmp_path, monkeypatch):
    monkeypatch.setattr("gradkeel.compare.command._ATTACHED_WITHIN", 0.2)
    said = []
    with pytest.raises(TaskError, match="guarded no step"):
        run(script("# gradkeel some day\nimport time; time.sleep(1)"), tmp_path, said.append)
    assert len(said) == 1
    assert "has attached no guard in 0.2 seconds" in said[0]


def test_a_script_of_several_guards_is_told_whose_figures_there_are(script, tmp_path):
    source = SCRIPT.format(log=LOG).replace(
        "for step",
        "other = gk.attach(torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]), None)\nfor step",
    )
    source += "    other.parameters[0].sum().backward()\n    other.optimizer.step()\n"
    said = []
    result = run(script(source), tmp_path, said.append, policies=["norm:0.5", "norm:1.0"])
    assert [one.optimizer for one in result.runs] == ["Adam", "Adam"]
    assert len(said) == 1
    assert "attaches several guards" in said[0]


TWO_GUARDS = """
import os
import torch
import gradkeel as gk

torch.manual_seed({seed})
one, other = torch.nn.Parameter(0.1 + 0.3 * torch.rand(2)), torch.nn.Parameter(torch.zeros(2))
rest = torch.rand(1)
guards = [gk.attach(torch.optim.SGD([p], lr=0.001), None) for p in (one, other)]
for step in range(12):
    for i, guard in enumerate(guards):
        loss = (100 * one.square() if i == 0 else other * one.detach() + rest).sum()
        guard.optimizer.zero_grad()
        loss.backward()
        guard.log(loss=loss)
        guard.optimizer.step()
"""


def test_what_another_guard_did_first_is_not_taken_for_a_seed_that_is_ignored(script, tmp_path):
    """Under the policy it clips, and the recorded guard's first norm is another one, with the same loss."""
    source = TWO_GUARDS.format(seed='int(os.environ["GRADKEEL_SEED"])')
    result = run(script(source), tmp_path, policies=["none", "norm:1.0"], seeds=3)
    none, clipped = [one for one in result.runs if one.seed == 0]
    assert none.losses[0] == clipped.losses[0]
    assert none.norms[0] != clipped.norms[0]
    words = findings(result)
    assert words.caution == (
        "norm:1.0 never clipped at its best learning rate in the guard that was attached last; whether the script's "
        "other guards clipped is not known."
    )
    page = compare_page(result, summarize(result.runs), words)
    assert "not known to begin from the same weights and batches" in page


def test_a_script_of_several_guards_that_ignores_its_seed_may_be_so(script, tmp_path):
    result = run(script(TWO_GUARDS.format(seed="os.getpid()")), tmp_path, policies=["none", "norm:1.0"])
    assert findings(result).caution.startswith(
        "Policies of one seed did not begin with the same loss and norm: other guards of the script have stepped "
        "before, or it does not set its weights and batches by GRADKEEL_SEED"
    )


def test_records_of_an_earlier_comparison_are_set_aside(script, tmp_path):
    command = script(SCRIPT.format(log=LOG))
    for _ in range(3):
        run(command, tmp_path, policies=["norm:1.0"])
    names = sorted(path.name for path in (tmp_path / "runs").glob("*.keel"))
    assert names == ["norm_1.0-0.before1.keel", "norm_1.0-0.before2.keel", "norm_1.0-0.keel"]
    for name in names:
        with Reader(tmp_path / "runs" / name) as reader:
            assert len(reader) == 20
