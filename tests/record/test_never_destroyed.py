"""A record is never destroyed: whatever happens to a run or its file, older rows stay readable."""

import os
import shutil

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.errors import RecordError, RecordWarning
from gradkeel.record import Reader, Recorder, bucket_norms, export

from tests.record.processes import kill, run_script
from tests.record.test_robustness import check_rows, record, weights_run


def norms_of(steps, offset=0.0):
    """What `make_report` gives the first parameter at these steps, plus ``offset``."""
    return [step + offset for step in steps]


def shifted(make_report, offset, **options):
    """Reports that are told apart from those of another run by their norms."""
    return lambda step: make_report(step, norms=[step + offset + i / 10 for i in range(3)], **options)


@pytest.mark.parametrize("resumed_at", [1, 2, 64, 65, 100, 130])
def test_steps_that_are_recorded_again_stay_readable(tmp_path, make_report, resumed_at):
    """F3: a script that resumes without the guard's state made 21 steps of 41."""
    path = tmp_path / "run.keel"
    record(path, make_report, range(1, 131))
    record(path, shifted(make_report, 1000), range(resumed_at, resumed_at + 40))
    old = list(range(resumed_at, 131))
    with Reader(path, superseded=True) as run:
        assert run.steps().tolist() == old
        assert run.norms()[:, 0].tolist() == norms_of(old)
        assert run.totals(start=120, stop=125).tolist() == pytest.approx(
            [torch.tensor([s, s + 0.1, s + 0.2]).norm().item() for s in range(120, 125) if s >= resumed_at]
        )
        assert run.names == ("a.weight", "b.weight", "b.bias")
    with Reader(path) as run:
        assert run.norms()[resumed_at - 1 :, 0].tolist() == norms_of(range(resumed_at, resumed_at + 40), 1000)
        (rollback,) = run.rollbacks
        assert (rollback.session, rollback.step, rollback.last_step, rollback.rows) == (
            2,
            resumed_at,
            130,
            len(old),
        )
        with run.before(rollback) as before:
            assert before.steps().tolist() == list(range(1, 131))
            assert before.norms()[:, 0].tolist() == norms_of(range(1, 131))
            assert [s.number for s in before.sessions] == [1]


def test_rolling_back_again_and_again(tmp_path, make_report):
    """F4: each time what was recorded is kept, with what had led to it."""
    path = tmp_path / "run.keel"
    recorder = Recorder(path)
    history, live = [], {}
    for number, (first, last) in enumerate([(1, 100), (50, 90), (80, 85), (40, 110), (1, 5)]):
        history.append(dict(live))
        live = {step: norm for step, norm in live.items() if step < first}
        for step in range(first, last + 1):
            live[step] = step + 1000 * number
            recorder.record(shifted(make_report, 1000 * number)(step))
    recorder.close()
    with Reader(path) as run:
        assert dict(zip(run.steps().tolist(), run.norms()[:, 0].tolist(), strict=True)) == live
        assert [(r.session, r.step) for r in run.rollbacks] == [(2, 50), (3, 80), (4, 40), (5, 1)]
        for rollback, expected in zip(run.rollbacks, history[1:], strict=True):
            with run.before(rollback) as before:
                found = dict(zip(before.steps().tolist(), before.norms()[:, 0].tolist(), strict=True))
                assert found == expected
                assert len(bucket_norms(before, 5).first) == 5
    with Reader(path, superseded=True) as run:
        assert len(run) == sum(r.rows for r in run.rollbacks) == 51 + 11 + 46 + 110
        assert run.series("step", stop=45, stride=2).tolist() == [40, 42, 44, *range(2, 45, 2)]
        export(run, tmp_path / "old.csv")
    assert len((tmp_path / "old.csv").read_text().splitlines()) == 1 + 51 + 11 + 46 + 110


def test_a_run_of_another_model_leaves_the_first_ones_parameters(tmp_path, make_report):
    path = tmp_path / "run.keel"
    record(path, make_report, range(1, 100))
    record(path, lambda step: make_report(step, names=("x", "b.bias")), range(1, 4))
    with Reader(path) as run:
        assert run.names == ("x", "b.bias")
        with run.before(run.rollbacks[0]) as before:
            assert before.names == ("a.weight", "b.weight", "b.bias")
            assert before.norms()[:, 2].tolist() == pytest.approx(norms_of(range(1, 100), 0.2))
    record(path, make_report, range(1, 3))
    with Reader(path, superseded=True) as run:
        assert len(run) == 99 + 3
        x, bias = run.names.index("x"), run.names.index("b.bias")
        assert run.norms()[:, x].isnan().tolist() == [True] * 99 + [False] * 3
        assert run.norms()[99:, bias].tolist() == pytest.approx(norms_of(range(1, 4), 0.1))


@pytest.mark.filterwarnings("ignore::gradkeel.SkippedStepWarning")
def test_skips_and_samples_of_the_weights_stay_too(tmp_path):
    path = tmp_path / "run.keel"
    checkpoint = weights_run(path, range(1, 21), 2.0, spoilt={10, 20})
    weights_run(path, range(21, 41), 3.0, checkpoint, spoilt={21, 25, 40})  # lost in a crash
    weights_run(path, range(21, 31), 5.0, checkpoint, spoilt={27})
    with Reader(path, superseded=True) as run:
        assert [step for step, _ in run.skips()] == [21, 25, 40]
        steps, weights, _ = run.weight_samples()
        assert steps.tolist() == list(range(21, 41))
        assert weights.squeeze(1).tolist() == [3.0] * 20
    weights_run(path, range(1, 3), 7.0)
    with Reader(path) as run, run.before(run.rollbacks[0]) as before:
        steps, weights, _ = before.weight_samples()
        assert steps.tolist() == list(range(1, 41))  # in their order, though superseded at different times
        assert weights.squeeze(1).tolist() == [2.0] * 20 + [3.0] * 20
        assert [step for step, _ in before.skips()] == [10, 20, 21, 25, 40]
    with Reader(path, superseded=True) as run:
        steps, weights, _ = run.weight_samples()
        assert steps.tolist() == [*range(21, 41), *range(1, 31)]  # the first to be superseded come first
        assert weights.squeeze(1).tolist() == [3.0] * 20 + [2.0] * 20 + [5.0] * 10


@pytest.mark.parametrize("link", ["symlink", "hard link", "folder", "spelling"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_lock_is_on_the_file_whatever_its_name(tmp_path, make_report, link, elsewhere):
    """F5: a second run through a symlink destroyed the first one's rows."""
    path, other = tmp_path / "run.keel", tmp_path / "other.keel"
    first = Recorder(path)
    first.record(make_report(1))
    first.flush()
    if link == "folder":
        (tmp_path / "folder").symlink_to(tmp_path)
        other = tmp_path / "folder" / "run.keel"
    elif link == "spelling":
        other = tmp_path / "x" / ".." / "run.keel"
        (tmp_path / "x").mkdir()
    elif link == "symlink":
        other.symlink_to(path)
    else:
        os.link(path, other)
    if elsewhere:
        script = f"""
            import warnings
            from gradkeel.record import Recorder
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                Recorder({str(other)!r})
            print(*[w.message for w in caught])
        """
        assert "being written by another process or recorder" in run_script(script)
        first.record(make_report(2))
    else:
        second = Recorder(other)  # takes over
        second.record(make_report(2))
        second.close()
    first.close()
    check_rows(path, [1, 2])


def test_a_second_process_after_the_lock_was_lost(tmp_path, make_report):
    """Where a file system has no locks: whoever comes last goes on, and the other one hears of it."""
    path = tmp_path / "run.keel"
    first = Recorder(path)
    first.record(make_report(1))
    first.flush()
    script = f"""
        import gradkeel.record.lock, torch
        from gradkeel.guard.report import SelectionReport, StepReport
        from gradkeel.norms import Decision, GradientNorms
        from gradkeel.record import Recorder
        gradkeel.record.lock.fcntl = None
        recorder = Recorder({str(path)!r})
        norms = torch.tensor([2.0], dtype=torch.float64)
        measured = GradientNorms(("a.weight",), norms, norms[0], 2.0, (0,), 2, (4,))
        recorder.record(StepReport(2, (SelectionReport("main", "None", measured, Decision(), (True,)),), 1.0, {{}}))
        recorder.close()
    """
    run_script(script)
    first.record(make_report(3))
    with pytest.warns(RecordWarning, match="another recorder writes to it now"):
        first.flush()
    first.close()
    check_rows(path, [1, 2])


def test_a_record_that_is_deleted_is_said_once_and_comes_back(tmp_path, make_report):
    """C5: nothing was recorded, and nothing said."""
    path = tmp_path / "runs" / "run.keel"
    recorder = Recorder(path)
    for step in range(1, 70):
        recorder.record(make_report(step))
    recorder.flush()
    shutil.rmtree(path.parent)
    recorder.record(make_report(70))
    with pytest.warns(RecordWarning, match="was deleted; all of it is written there again") as warned:
        recorder.flush()
    for step in range(71, 200):
        recorder.record(make_report(step))
        if step % 20 == 0:
            recorder.flush()
    recorder.close()
    assert len(warned) == 1
    check_rows(path, range(1, 200))
    assert [file.name for file in path.parent.iterdir()] == ["run.keel"]


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_record_that_is_moved_is_said_once_and_both_are_whole(tmp_path, make_report, whole_folder):
    path = tmp_path / "runs" / "run.keel"
    recorder = Recorder(path)
    for step in range(1, 70):
        recorder.record(make_report(step))
    recorder.flush()
    if whole_folder:
        path.parent.rename(tmp_path / "kept")
        moved = tmp_path / "kept" / "run.keel"
    else:
        moved = path.rename(tmp_path / "moved.keel")
    for step in range(70, 100):
        recorder.record(make_report(step))
    with pytest.warns(RecordWarning, match="was moved; recording goes on in a new file") as warned:
        recorder.flush()
    recorder.record(make_report(100))
    recorder.close()
    assert len(warned) == 1
    check_rows(moved, range(1, 70))
    check_rows(path, range(70, 101))


def test_a_folder_that_cannot_come_back_stops_the_record_and_not_the_training(tmp_path, make_report):
    path = tmp_path / "runs" / "run.keel"
    recorder = Recorder(path)
    recorder.record(make_report(1))
    recorder.flush()
    shutil.rmtree(path.parent)
    path.parent.touch()
    recorder.record(make_report(2))
    with pytest.warns(RecordWarning, match="recording stopped: the record"):
        recorder.flush()
    recorder.record(make_report(3))
    recorder.close()


def test_nothing_lies_beside_a_finished_record_that_was_read(tmp_path, make_report):
    """F8."""
    path = tmp_path / "run.keel"
    record(path, make_report, range(1, 70))
    for _ in range(2):
        with Reader(path) as run:
            run.norms()
    assert [file.name for file in tmp_path.iterdir()] == ["run.keel"]
    recorder = Recorder(path)
    with Reader(path) as run:  # still there when the run ends
        recorder.record(make_report(70))
        recorder.close()
        assert len(run) == 69
    assert [file.name for file in tmp_path.iterdir()] == ["run.keel"]
    check_rows(path, range(1, 71))


@pytest.mark.parametrize("name", ["run.keel", "link.keel", "run.keel-wal", "other.csv"])
def test_an_export_onto_a_record_is_refused(tmp_path, make_report, name):
    path = tmp_path / "run.keel"
    record(path, make_report, [1])
    record(tmp_path / "other.csv", make_report, [1])
    (tmp_path / "link.keel").symlink_to(path)
    with (
        Reader(path) as run,
        pytest.raises((RecordError, ValueError), match=r"that is a record|must end in \.csv"),
    ):
        export(run, tmp_path / name)
    check_rows(path, [1])
    check_rows(tmp_path / "other.csv", [1])


def test_restarts_in_one_process_keep_every_step(tmp_path):
    """A notebook: cells run again, with new models, optimizers and guards, and nobody detaches."""
    path, trained = tmp_path / "run.keel", 0
    for attempt in range(20):
        torch.manual_seed(attempt)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        guard = gk.attach(optimizer, "global-norm:1.0", model=model, record=path)
        for _ in range(attempt + 1):
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            trained += 1
    guard.detach()
    with Reader(path) as run, Reader(path, superseded=True) as old:
        assert len(run) == 20
        assert len(run) + len(old) == trained
        assert len(run.rollbacks) == 19


def kill_and_restart(path, times):
    """Runs of one record, each killed and begun again somewhere; what each had told to be on disk is there."""
    runs = kill(path, times, one_record=True)
    expected = {offset + step for _, offset, first, last in runs for step in range(first, last + 1)}
    with Reader(path) as run, Reader(path, superseded=True) as old:
        live, superseded = run.norms()[:, 0].tolist(), old.norms()[:, 0].tolist()
        assert run.steps().tolist() == sorted(set(run.steps().tolist()))
    assert sum(last > 0 for *_, last in runs) > times / 2
    assert len(set(live) | set(superseded)) == len(live) + len(superseded)
    assert expected <= {*live, *superseded}
    assert len(expected) > 100
    assert superseded
    print(
        f"{len(expected):,} steps had been told to be on disk, {len(live) + len(superseded):,} are readable, "
        f"{len(superseded):,} of them superseded"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_kills_and_restarts_of_one_record_lose_nothing(tmp_path):
    kill_and_restart(tmp_path / "run.keel", 15)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_200_kills_and_restarts_of_one_record_lose_nothing(tmp_path):
    kill_and_restart(tmp_path / "run.keel", 200)
