"""Runs of a comparison that are recorded can be explained."""

import pytest

from gradkeel.compare import compare, make_plan
from gradkeel.explain import explain


@pytest.mark.parametrize("jobs", [1, 2])
def test_recorded_runs_are_explained(tmp_path, jobs):
    plan = make_plan("exploding-linear", policies=["none", "norm:1.0,exclude=*.bias"], seeds=1, record=True)
    for many in (1, jobs):  # again: the first records are set aside
        result = compare(plan, jobs=many, records=tmp_path)
    names = [trial.record_name for trial in plan.trials]
    before = [name.replace(".keel", ".before1.keel") for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, *names])
    for run, name in zip(result.runs, names, strict=True):
        explosion = explain(tmp_path / name).explosion
        assert explosion.kind == "initialization"
        assert (explosion.step, explosion.parameter) == (run.onset.step, run.onset.parameter)


def test_nothing_is_recorded_unless_asked_for(tmp_path):
    compare(make_plan("exploding-linear", policies=["none"], seeds=1), jobs=1, records=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
