"""The engine: what is run, from where it starts, and what an interruption leaves."""

import pytest

from gradkeel.compare import TaskError, Trial, compare, make_command_plan, make_plan
from gradkeel.errors import PolicySpecError


def small(**other):
    values = {"policies": ["none", "norm:1.0"], "seeds": 2, "steps": 6}
    return make_plan("exploding-linear", **values | other)


def results(comparison):
    return {(run.policy, run.lr, run.seed): run.losses for run in comparison.runs}


def test_a_plan_takes_the_tasks_defaults():
    plan = make_plan("char-lstm")
    assert plan.policies == ("none", "value:0.01", "global-norm:0.25")
    assert plan.learning_rates == (4.0, 8.0, 16.0, 32.0)
    assert (plan.seeds, plan.steps, plan.batch_size, plan.sweep) == (tuple(range(5)), 200, None, None)
    assert plan.arguments == ("char-lstm",)


def test_a_plan_takes_what_the_user_says():
    plan = make_plan(
        "char-lstm", policies=["none", "norm:1", " tensor-norm:1.0 "], learning_rates=[2, 1, 2], seeds=1, steps=7,
        batch_size=4,
    )  # fmt: skip
    assert plan.policies == ("none", "norm:1")
    assert plan.learning_rates == (2, 1)
    assert plan.arguments == ("char-lstm", "--batch-size", "4", "--steps", "7")


def test_trials_go_seed_by_seed():
    plan = small(learning_rates=[0.1, 0.2])
    assert plan.trials[:5] == [
        Trial("none", 0.1, 0), Trial("norm:1.0", 0.1, 0), Trial("none", 0.2, 0), Trial("norm:1.0", 0.2, 0),
        Trial("none", 0.1, 1),
    ]  # fmt: skip


def test_a_sweep_takes_the_place_of_the_policies_and_of_all_learning_rates_but_the_highest():
    plan = make_plan("char-lstm", sweep="norm:0.1..10")
    assert plan.policies == ("none", "norm:0.1", "norm:0.316", "norm:1", "norm:3.16", "norm:10")
    assert plan.learning_rates == (32.0,)
    assert make_plan("char-lstm", sweep="norm:0.1..10", policies=["norm:1.0"]).policies[0] == "norm:1"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seeds": 0}, TaskError, "seeds=0: it must be 1 or more"),
        ({"steps": -1}, TaskError, "steps=-1"),
        ({"batch_size": 0}, TaskError, "batch_size=0"),
        ({"learning_rates": [0.0]}, TaskError, "lr=0.0: a learning rate must be a finite number above 0"),
        ({"learning_rates": [float("nan")]}, TaskError, "lr=nan"),
        ({"policies": ["nrom:1"]}, PolicySpecError, "unknown policy 'nrom'"),
        ({"sweep": "norm:1"}, PolicySpecError, "as in global-norm:0.01..100"),
    ],
)
def test_a_wrong_plan_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        small(**arguments)


@pytest.mark.parametrize("command", ["", "  ", "python 'train.py"])
def test_a_command_that_cannot_be_read(command):
    with pytest.raises(TaskError, match="--run"):
        make_command_plan(command)


def test_all_policies_of_a_seed_start_alike_and_see_the_same_batches():
    runs = {
        (run.policy, run.seed): run
        for run in compare(small(policies=["none", "norm:1", "norm:1e9"]), jobs=1).runs
    }
    for seed in (0, 1):
        assert runs["none", seed].losses[0] == runs["norm:1", seed].losses[0]
        # A bound that nothing reaches changes nothing.
        assert runs["none", seed].losses[:3] == runs["norm:1e9", seed].losses[:3]
    assert runs["none", 0].losses[0] != runs["none", 1].losses[0]


def test_worker_processes_compute_what_one_process_does():
    plan, seen = small(policies=["norm:1", "value:1"]), []
    several = compare(plan, jobs=2, on_run=lambda so_far: seen.append(len(so_far.runs)))
    assert seen == [1, 2, 3, 4]
    assert not several.interrupted
    assert results(several) == results(compare(plan, jobs=1))
    assert [(r.seed, r.policy) for r in several.runs] == [(t.seed, t.policy) for t in plan.trials]


def test_an_error_of_the_task_is_raised_and_ends_the_workers(tmp_path, monkeypatch):
    (tmp_path / "task_that_fails.py").write_text(
        "from gradkeel.compare import load_task\n"
        "def make_task():\n"
        "    task = load_task('exploding-linear')\n"
        "    task.loss = lambda model, batch: 1 / 0\n"
        "    return task\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        compare(make_plan("task_that_fails:make_task", seeds=1, policies=["none", "norm:1"]), jobs=2)


def test_batch_size_reaches_the_task():
    runs = [compare(small(batch_size=size), jobs=1).runs[0] for size in (16, 1000)]
    assert runs[0].losses[0] != runs[1].losses[0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interruption_keeps_what_has_finished(jobs):
    def interrupt(so_far):
        if len(so_far.runs) == 2:
            raise KeyboardInterrupt

    result = compare(small(seeds=20), jobs=jobs, on_run=interrupt)
    assert result.interrupted
    assert len(result.runs) == 2
