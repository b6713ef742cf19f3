"""Resuming, readers during training, and everything that can go wrong with a disk."""

import contextlib
import copy
import gc
import linecache
import os
import shutil
import sqlite3
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel import policies as gp
from gradkeel.errors import RecordError, RecordWarning
from gradkeel.guard import hooks, other_clips
from gradkeel.norms import Decision, Needs
from gradkeel.record import Reader, Recorder, bucket_norms
from gradkeel.record.kept import Kept
from gradkeel.record.outbox import MOST_KEPT, Outbox
from gradkeel.record.rows import Batch
from gradkeel.record.schema import SCHEMA_VERSION

from tests.record.processes import kill, run_script


def record(path, make_report, steps, **options):
    recorder = Recorder(path, **options)
    for step in steps:
        recorder.record(make_report(step))
    recorder.close()


def check_rows(path, steps):
    """The file is sound, and holds these steps with their own numbers."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    with Reader(path) as run:
        assert run.steps().tolist() == list(steps)
        torch.testing.assert_close(run.norms()[:, 0], run.steps().double(), rtol=0, atol=0)
        assert len(run.totals()) == len(run.clipped()) == len(run)


@pytest.mark.parametrize("resumed_at", [1, 2, 64, 65, 66, 100, 129, 130, 131, 200])
def test_resuming_replaces_the_overlap(tmp_path, make_report, resumed_at):
    record(tmp_path / "run.keel", make_report, range(1, 131))
    record(
        tmp_path / "run.keel",
        lambda step: make_report(step, stepped=False),
        range(resumed_at, resumed_at + 40),
    )
    kept = [step for step in range(1, 131) if step < resumed_at]
    check_rows(tmp_path / "run.keel", [*kept, *range(resumed_at, resumed_at + 40)])
    with Reader(tmp_path / "run.keel") as run:
        assert run.stepped().tolist() == [True] * len(kept) + [False] * 40
        assert [step for step, _ in run.skips()] == list(range(resumed_at, resumed_at + 40))
        assert [s.first_step for s in run.sessions] == ([1, resumed_at] if kept else [1])


def test_what_is_implied_before_a_rollback_is_not_read_from_the_rows_after_it(tmp_path):
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    guard = gk.attach(optimizer, gp.Clip("tensor", gp.Constant(1.0), gp.Hard()), record=tmp_path / "run.keel")
    for step in range(1, 31):
        if step == 11:
            saved = guard.state_dict()
        parameters[0].grad = torch.full((1,), 0.5 if step < 20 else 4.0)
        parameters[1].grad = torch.ones(1) if step < 20 else None
        optimizer.step()
    guard.load_state_dict(saved)
    optimizer.step()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert (
            run.parameter_coefficients().tolist() == [[1.0, 1.0]] * 11
        )  # the last gradient is clipped already
        assert run.present().tolist() == [[True, True]] * 10 + [[True, False]]
        assert run.damage is None


def test_a_first_step_that_cannot_be_recorded_leaves_nothing_behind(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel")
    with pytest.raises(RuntimeError):
        recorder.record(make_report(1, odd=torch.tensor(1j)))
    recorder.record(make_report(1))
    recorder.close()
    check_rows(tmp_path / "run.keel", [1])


def test_a_file_is_closed_after_a_step_that_could_not_be_recorded(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel")
    with pytest.raises(RuntimeError):
        recorder.record(make_report(1, odd=torch.tensor(1j)))
    recorder.close()
    record(tmp_path / "run.keel", make_report, range(1, 3))  # it is free
    check_rows(tmp_path / "run.keel", [1, 2])


def weights_run(path, steps, weight, state=None, spoilt=()):
    """Steps of one parameter whose weight is ``weight`` and whose update is a tenth of it."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=weight / 10)
    guard = gk.attach(optimizer, None, record=path, nonfinite="skip")
    if state is not None:
        guard.load_state_dict(state)
    for step in steps:
        parameter.data.fill_(weight)
        parameter.grad = torch.full((1,), float("nan") if step in spoilt else 1.0, dtype=torch.float64)
        optimizer.step()
    state = guard.state_dict()
    guard.detach()
    return state


@pytest.mark.filterwarnings("ignore::gradkeel.SkippedStepWarning")
def test_resuming_replaces_skips_and_samples_of_the_weights_too(tmp_path):
    path = tmp_path / "run.keel"
    checkpoint = weights_run(path, range(1, 21), 2.0, spoilt={10, 20})
    weights_run(path, range(21, 41), 3.0, checkpoint, spoilt={21, 25, 40})  # lost in a crash
    weights_run(path, range(21, 31), 5.0, checkpoint, spoilt={27})
    with Reader(path) as run:
        assert run.steps().tolist() == list(range(1, 31))
        assert [step for step, _ in run.skips()] == [10, 20, 27]
        assert [reason.partition(":")[0] for _, reason in run.skips()] == ["step 10", "step 20", "step 27"]
        steps, weights, updates = run.weight_samples()
        assert steps.tolist() == list(range(1, 31))  # none of the lost ones, 31 to 40
        assert weights.squeeze(1).tolist() == [2.0] * 20 + [5.0] * 10
        expected = [0.0 if step in {10, 20, 27} else 0.2 if step <= 20 else 0.5 for step in range(1, 31)]
        assert updates.squeeze(1).tolist() == pytest.approx(expected)


def test_a_resumed_record_keeps_what_each_step_was(tmp_path, make_report):
    """Also in the block that is cut: all its series, however wide."""
    path = tmp_path / "run.keel"
    record(path, lambda step: make_report(step, loss=float(step)), range(1, 101))
    record(path, lambda step: make_report(step, accuracy=float(step)), range(81, 91))
    with Reader(path) as run:
        steps = run.steps().double()
        assert steps.tolist() == list(range(1, 91))
        assert run.losses()[:80].tolist() == list(range(1, 81))
        assert run.losses()[80:].isnan().all()
        assert run.scalar("accuracy")[:80].isnan().all()
        assert run.scalar("accuracy")[80:].tolist() == list(range(81, 91))
        for column in range(3):
            assert run.norms()[:, column].tolist() == [step + column / 10 for step in range(1, 91)]
        totals = torch.stack([steps, steps + 0.1, steps + 0.2]).norm(dim=0)
        # A root of a sum of three squares, either way.
        torch.testing.assert_close(run.totals(), totals, rtol=1e-12, atol=0)
        torch.testing.assert_close(run.coefficients(), 50 / totals.clamp(min=50), rtol=1e-12, atol=0)
        assert run.clipped().tolist() == (totals > 50).tolist()
        assert run.bounds().tolist() == [50.0] * 90
        buckets = bucket_norms(run, 1, 1, 81)
        assert (buckets.low[0, 0], buckets.high[0, 0]) == (1, 80)


def test_a_run_from_scratch_replaces_another_model(tmp_path, make_report):
    record(tmp_path / "run.keel", make_report, range(1, 100))
    record(tmp_path / "run.keel", lambda step: make_report(step, names=("x", "y")), range(1, 4))
    with Reader(tmp_path / "run.keel") as run:
        assert run.names == ("x", "y")
        assert run.norms().shape == (3, 2)


def test_going_back_within_a_process_replaces_too(tmp_path, make_report):
    record(tmp_path / "run.keel", make_report, [*range(1, 81), *range(70, 90), *range(5, 8)])
    check_rows(tmp_path / "run.keel", range(1, 8))


def test_a_guard_resumed_from_its_checkpoint_continues_the_record(tmp_path):
    path = tmp_path / "run.keel"

    def start():
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return model, optimizer, gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model, record=path)

    def go(model, optimizer, steps):
        for _ in range(steps):
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, guard = start()
    go(model, optimizer, 20)
    checkpoint = guard.state_dict()
    go(model, optimizer, 7)  # lost in a crash
    guard.detach()
    model, optimizer, guard = start()
    guard.load_state_dict(checkpoint)
    go(model, optimizer, 10)
    guard.detach()
    with Reader(path) as run:
        assert run.steps().tolist() == list(range(1, 31))
        assert [session.first_step for session in run.sessions] == [1, 21]


def test_a_reader_sees_the_past_while_training_goes_on(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel")
    for step in range(1, 101):
        recorder.record(make_report(step))
    recorder.flush()
    with Reader(tmp_path / "run.keel") as early:
        for step in range(101, 201):
            recorder.record(make_report(step))
        recorder.flush()
        assert len(early.steps()) == len(early) == 100  # one view, however long it is kept open
        with Reader(tmp_path / "run.keel") as late:
            assert len(late.totals()) == 200
    recorder.close()
    check_rows(tmp_path / "run.keel", range(1, 201))


def test_steps_are_on_disk_after_a_moment_without_closing(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel", flush_seconds=0.01)
    recorder.record(make_report(1))
    time.sleep(0.02)
    recorder.record(make_report(2))
    recorder._outbox.wait_for_sent()  # whatever was handed over by itself is written; nothing was closed or flushed
    with Reader(tmp_path / "run.keel") as run:
        assert len(run) == 2
    recorder.close()


def test_steps_are_written_when_the_process_ends(tmp_path):
    script = """
        import sys, torch, gradkeel as gk
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gk.attach(optimizer, None, model=model, record=sys.argv[1])
        for _ in range(5):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        raise SystemExit("no detach")
    """
    run_script(script, tmp_path / "run.keel", check=False)
    with Reader(tmp_path / "run.keel") as run:
        assert len(run) == 5


def test_steps_are_written_when_the_recorder_is_forgotten(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel")
    recorder.record(make_report(1))
    del recorder
    check_rows(tmp_path / "run.keel", [1])


def test_a_second_recorder_of_the_process_takes_over(tmp_path, make_report):
    """As of a cell that runs again; whoever goes on with the old one is told."""
    first = Recorder(tmp_path / "run.keel")
    first.record(make_report(1))
    second = Recorder(tmp_path / "run.keel")
    second.record(make_report(2))
    with pytest.warns(RecordWarning, match="another guard of this process records to") as warned:
        first.record(make_report(2))
    first.record(make_report(3))
    assert len(warned) == 1
    first.close()
    second.close()
    check_rows(tmp_path / "run.keel", [1, 2])
    record(tmp_path / "run.keel", make_report, [3])  # and the file is free again
    check_rows(tmp_path / "run.keel", [1, 2, 3])


@pytest.mark.parametrize(
    "content", [b"", b"not a database, but longer than a header of one hundred bytes " * 9]
)
def test_a_file_that_is_something_else_is_left_alone(tmp_path, make_report, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    if content:
        with pytest.warns(RecordWarning, match="is not a gradkeel record"):
            record(path, make_report, [1])
        assert path.read_bytes() == content
        with pytest.raises(RecordError, match="is not a gradkeel record"):
            Reader(path)
    else:
        with pytest.raises(RecordError, match="no step has been recorded yet"):
            Reader(path)
        record(path, make_report, [1])
        check_rows(path, [1])


def test_somebody_elses_database_is_left_alone(tmp_path, make_report):
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.warns(RecordWarning, match="is not a gradkeel record"):
        record(tmp_path / "other.db", make_report, [1])
    with pytest.raises(RecordError, match="is not a gradkeel record"):
        Reader(tmp_path / "other.db")


def test_a_record_of_the_future_is_refused(tmp_path, make_report):
    record(tmp_path / "run.keel", make_report, [1])
    connection = sqlite3.connect(tmp_path / "run.keel")
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(
        RecordError, match=f"schema version {SCHEMA_VERSION + 1}.*pip install --upgrade gradkeel"
    ):
        Reader(tmp_path / "run.keel")


def test_no_such_record(tmp_path):
    with pytest.raises(RecordError, match="there is no record at"):
        Reader(tmp_path / "run.keel")


def test_a_record_on_a_read_only_disk(tmp_path, make_report):
    record(tmp_path / "run.keel", make_report, [1, 2])
    (tmp_path / "run.keel").chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        check_rows(tmp_path / "run.keel", [1, 2])
    finally:
        tmp_path.chmod(0o755)


def test_an_unwritable_path_warns_once_and_training_goes_on(tmp_path):
    (tmp_path / "file").touch()
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(RecordWarning, match="training goes on without a record") as warned:
        guard = gk.attach(optimizer, None, model=model, record=tmp_path / "file" / "run.keel")
    for _ in range(3):  # warnings are errors here: no other one comes
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    guard.detach()
    assert len(warned) == 1
    assert guard.report.step == 3


def test_a_full_disk_stops_the_record_and_not_the_training(tmp_path):
    # A limit on the size of files gives a real write error, in a process of its own.
    script = """
        import resource, sys, warnings, torch, gradkeel as gk
        from gradkeel.record import Recorder
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(8)])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        recorder = Recorder(sys.argv[1])
        guard = gk.attach(optimizer, None, model=model, record=recorder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3000):
                model(torch.ones(1, 2)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 299:
                    recorder.flush()  # a fast machine takes all steps before the first write is due
            guard.detach()
        kinds = [w.category.__name__ for w in caught]
        print(guard.report.step, kinds.count("RecordWarning"), caught[0].message)
    """
    step, warned, message = run_script(script, tmp_path / "run.keel").split(maxsplit=2)
    assert (step, warned) == ("3000", "1")
    assert "recording stopped: the record" in message
    assert "training goes on" in message
    assert not (tmp_path / "run.keel-lock").exists()
    with Reader(tmp_path / "run.keel") as run:
        assert 300 <= len(run) < 3000
        assert run.steps().tolist() == list(range(1, len(run) + 1))
        assert run.norms().isfinite().all()


def to_batches():
    """A recorder that sends what waits where it is told to, and the batches that come of it."""
    sink, batches = Gate(), []
    sink.write = batches.append
    return Recorder(None, sinks=[sink], flush_seconds=1e3), batches


def steps_in(batches):
    return [step for rows in batches for step in rows.steps]


def test_an_interrupted_step_costs_no_other(make_report):
    """Ctrl-C at each line on the way of a step into the batch: it is there as a whole, or not at all."""
    recorder, batches = to_batches()
    lost = []
    step, line, tracing = 0, 0, sys.gettrace()
    while True:
        step, line = step + 1, line + 1
        report, seen = make_report(step, stepped=line % 3 > 0, loss=1.0), []
        if line % 2:
            report.selections[0].decision = Decision(clamp=(-1.0, 1.0))

        def interrupt(frame, event, _, seen=seen, last=line):
            if "/record/" not in frame.f_code.co_filename:
                return None
            if event == "line":
                seen.append(frame.f_lineno)
                if len(seen) == last:
                    raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            recorder.record(report)
        except KeyboardInterrupt:
            lost.append(step)
            recorder.record(make_report(step := step + 1))
        finally:
            sys.settrace(tracing)
        if len(seen) < line:
            break
    recorder.close()
    (rows,) = batches
    series = [rows.series[name].tolist() for name in ("clipped_total", "scalar:loss")]
    found = dict(zip(rows.steps, zip(*series, strict=True), strict=True))
    assert len(lost) > 20
    assert {*range(1, step + 1)} - found.keys() <= {*lost}
    assert {loss for step, (_, loss) in found.items() if step - 1 not in lost} == {1.0}
    for own in lost:
        norm, loss = found[own + 1]
        assert norm == pytest.approx(float(make_report(own + 1).selections[0].outcome.total()))
        assert loss != loss


def flushing(monkeypatch, flush):
    """From now on step 5 calls ``flush`` while it is taken."""
    taken = Kept.taken

    def slow(own, report, *rest):
        found = taken(own, report, *rest)
        if report.step == 5:
            flush()
        return found

    monkeypatch.setattr(Kept, "taken", slow)


def test_another_thread_may_flush_while_steps_are_taken(make_report, monkeypatch):
    """It waits, and no step is written twice or out of order."""
    recorder, batches = to_batches()
    flushes = []

    def flush():
        flushes.append(threading.Thread(target=recorder.flush))
        flushes[0].start()
        flushes[0].join(0.2)

    flushing(monkeypatch, flush)
    for step in range(1, 31):
        recorder.record(make_report(step))
    flushes[0].join()
    recorder.close()
    assert steps_in(batches) == list(range(1, 31))


def test_a_signals_handler_may_flush_while_a_step_is_taken(make_report, monkeypatch):
    recorder, batches = to_batches()
    flushing(monkeypatch, recorder.flush)
    for step in range(1, 9):
        recorder.record(make_report(step))
    recorder.close()
    assert steps_in(batches) == list(range(1, 9))


def test_an_interrupted_flush_loses_nothing(make_report, monkeypatch):
    recorder, batches = to_batches()
    interrupts = [KeyboardInterrupt]

    def interrupted(*rest):
        if interrupts:
            raise interrupts.pop()
        return Batch(*rest)

    monkeypatch.setattr("gradkeel.record.outbox.Batch", interrupted)
    for step in range(1, 11):
        recorder.record(make_report(step))
    with pytest.raises(KeyboardInterrupt):
        recorder.flush()
    for step in range(11, 14):
        recorder.record(make_report(step))
    recorder.close()
    assert steps_in(batches) == list(range(1, 14))


@pytest.mark.parametrize("method", ["flush", "close"])
def test_a_recorder_can_be_closed_after_ctrl_c_anywhere_in_it(make_report, method):
    """At each line and each return, its own and of the locks that it waits for."""
    place, lost, tracing = 0, [], sys.gettrace()
    while True:
        place += 1
        recorder, batches = to_batches()
        seen = 0

        def interrupt(frame, event, _, last=place):
            nonlocal seen
            name = frame.f_globals["__name__"]
            if name not in ("queue", "threading", "weakref") and not name.startswith("gradkeel.record."):
                return None
            source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            # At the end of a block CPython comes to its first line again, and looks for no signal there.
            if event in ("line", "return") and not source.lstrip().startswith("with "):
                seen += 1
                if seen == last:
                    raise KeyboardInterrupt
            return interrupt

        recorder.record(make_report(1))
        with contextlib.suppress(KeyboardInterrupt):
            sys.settrace(interrupt)
            try:
                getattr(recorder, method)()
            finally:
                sys.settrace(tracing)
        ends = threading.Thread(target=recorder.close, daemon=True)
        ends.start()
        ends.join(30)
        assert not ends.is_alive(), "a lock is held for ever"
        if steps_in(batches) != [1]:
            lost.append(place)
        if seen < place:
            break
    assert place > 30
    assert len(lost) <= 1  # between two lines, where CPython looks for no signal


@pytest.mark.parametrize("method", ["flush", "close"])
def test_a_sink_may_flush_and_close_the_recorder_that_calls_it(make_report, method):
    """It does not wait for itself; what was sent by then is written."""
    sink, batches = Gate(), []

    def write(rows):
        batches.append(rows)
        getattr(recorder, method)()

    sink.write = write
    recorder = Recorder(None, sinks=[sink], flush_seconds=1e3)
    recorder.record(make_report(1))
    began = time.monotonic()
    recorder.flush()
    recorder.close()
    assert time.monotonic() - began < 30
    assert steps_in(batches) == [1]


def test_a_recorder_may_be_collected_on_its_own_thread(make_report, tmp_path):
    """As where garbage happens to be collected while it writes."""
    collected, gone = threading.Event(), threading.Event()

    class Collecting(Gate):
        def write(self, rows):
            gone.wait(10)
            gc.collect()
            collected.set()

    recorder = Recorder(tmp_path / "run.keel", sinks=[Collecting()], flush_seconds=1e3)
    recorder.record(make_report(1))
    recorder._outbox.send()
    recorder.cycle = recorder
    threads = threading.active_count()
    del recorder
    gone.set()
    assert collected.wait(10)
    ends = time.monotonic() + 30
    while threading.active_count() >= threads and time.monotonic() < ends:
        time.sleep(0.01)
    assert threading.active_count() < threads
    check_rows(tmp_path / "run.keel", [1])


def interrupted_once(monkeypatch, owner, name):
    """Ctrl-C at the next call of this function; from then on it is as it was."""
    own = getattr(owner, name)

    def interrupted(*arguments):
        monkeypatch.setattr(owner, name, own)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("again", ["detach", "attach"])
@pytest.mark.parametrize("place", [(Outbox, "close"), (hooks.gate, "remove"), (other_clips.Canary, "remove")])
def test_after_a_detach_that_was_interrupted(tmp_path, monkeypatch, again, place):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    recorder = Recorder(tmp_path / "run.keel", flush_seconds=1e3)

    def steps():
        for _ in range(3):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    guard = gk.attach(optimizer, None, record=recorder)
    steps()
    interrupted_once(monkeypatch, *place)
    with pytest.raises(KeyboardInterrupt):
        guard.detach()
    if again == "detach":
        guard.detach()
        guard.detach()
        steps()  # nobody sees
    else:
        guard = gk.attach(optimizer, None, record=recorder)
        steps()
        guard.detach()
    assert not [name for name in vars(optimizer) if "gradkeel" in name]
    with Reader(tmp_path / "run.keel") as run, Reader(tmp_path / "run.keel", superseded=True) as old:
        assert len(run) + len(old) == (3 if again == "detach" else 6)


def test_a_guard_that_was_detached_leaves_a_recorder_to_the_next_one(tmp_path, monkeypatch):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    recorder = Recorder(tmp_path / "run.keel", flush_seconds=1e3)

    def steps(count):
        for _ in range(count):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    first = gk.attach(optimizer, None, record=recorder)
    interrupted_once(monkeypatch, Outbox, "close")
    with pytest.raises(KeyboardInterrupt):
        first.detach()
    second = gk.attach(optimizer, None, record=recorder)
    steps(2)
    first.detach()
    steps(3)
    second.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert len(run) == 5


class Closing:
    """A recorder of the user's own."""

    def __init__(self, close):
        self.closed, self._close = 0, close

    def record(self, report):
        """Nothing."""

    def close(self):
        self.closed += 1
        self._close()


def test_each_recorder_is_closed_once():
    def raises():
        raise RuntimeError("the disk is full")

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    guard = gk.attach(optimizer, None)
    guard.recorders += [Closing(guard.detach), Closing(raises), Closing(lambda: None)]
    with pytest.raises(RuntimeError, match="disk"):
        guard.detach()
    guard.detach()
    assert [recorder.closed for recorder in guard.recorders] == [1, 1, 1]
    with pytest.raises(gk.AttachError, match="detached"):
        guard.connect()


def test_a_change_of_parameters_that_is_interrupted_is_made_at_the_next_step(tmp_path, monkeypatch):
    parameters = [nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]
    optimizer = torch.optim.SGD(parameters[:2], lr=0.1)
    guard = gk.attach(optimizer, None, record=Recorder(tmp_path / "run.keel", flush_seconds=1e3))

    def step():
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    for _ in range(3):
        step()
    optimizer.add_param_group({"params": parameters[2:]})
    send = Outbox.send

    def interrupted(own):
        monkeypatch.setattr(Outbox, "send", send)
        raise KeyboardInterrupt

    monkeypatch.setattr(Outbox, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step()
    for _ in range(3):
        step()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        steps, norms = run.steps().tolist(), run.norms()
        assert steps == [1, 2, 3, 5, 6, 7]
        assert norms[:3, 2].isnan().all()
        assert norms[3:, 2].tolist() == [2.0] * 3


def test_steps_that_go_back_wait_for_the_next_batch_together(make_report):
    recorder, batches = to_batches()
    for step in (1, 2, 3, 1, 2, 3):
        recorder.record(make_report(step))
    recorder.close()
    assert [rows.steps for rows in batches] == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize("logged", [{}, {"loss": 1.0}])
def test_steps_that_wait_are_not_in_garbage_collections_way(make_report, logged):
    recorder, _ = to_batches()

    def tracked(steps):
        for step in steps:
            report = make_report(step, **logged)
            selection = report.selections[0]
            selection.measured.norms, selection.measured.total = bytearray(8 * 3), float(step)
            selection.decision = Decision(coefficients=1.0, bound=50.0)
            recorder.record(report)
            del report, selection
        for _ in range(4):
            gc.collect()
        return len(gc.get_objects())

    before = tracked(range(1, 201))
    assert tracked(range(201, 1201)) - before < 100  # of a thousand steps: not one object a step
    recorder.close()


class Bounded(gp.Policy):
    """A policy of one's own, with a bound that it makes or writes to as it likes."""

    needs, spec = Needs(), "bounded"

    def __init__(self, bound):
        self.bound = bound

    def init(self, norms):
        return {}

    def decide(self, norms, state):
        return Decision(bound=self.bound(norms.step)), state


def bounded_run(path, bound, steps):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight])
    guard = gk.attach(optimizer, Bounded(bound), record=path)
    for _ in range(steps):
        weight.grad = torch.ones(3)
        optimizer.step()
    guard.detach()


@pytest.mark.parametrize("given", [[0.0], torch.zeros(()), torch.zeros(1, dtype=torch.float64)])
def test_a_bound_that_is_written_to_later_is_recorded_as_it_was(tmp_path, given):
    def bound(step):
        if isinstance(given, list):
            given[0] = float(step)
        else:
            given.fill_(step)
        return given

    bounded_run(tmp_path / "run.keel", bound, 40)
    with Reader(tmp_path / "run.keel") as run:
        assert run.bounds().tolist() == list(range(1, 41))


class Reusing(gp.Policy):
    """A policy of one's own, which writes all of its decisions into the same places."""

    needs, spec = Needs(), "reusing"

    def __init__(self, given, field):
        self.given, self.field = given, field
        self.needs = Needs(unit_dim=0 if field == "unit_coefficients" else None)

    def init(self, norms):
        return {}

    def decide(self, norms, state):
        if isinstance(self.given, list):
            self.given[:] = [1.0 / norms.step] * len(self.given)
        else:
            self.given.fill_(1.0 / norms.step)
        return Decision(**{self.field: self.given}), state


@pytest.mark.parametrize("within", ["alone", "Chain", "Warmup", "PerGroup"])
@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("coefficients", [1.0, 1.0]),
        ("coefficients", torch.ones(())),
        ("coefficients", torch.ones(2, dtype=torch.float64)),
        ("unit_coefficients", torch.ones(4, dtype=torch.float64)),
    ],
)
def test_coefficients_that_are_written_to_later_are_recorded_and_reported_as_they_were(
    tmp_path, field, given, within
):
    own = Reusing(copy.copy(given), field)
    policies = {
        "alone": lambda: own,
        "Chain": lambda: gp.Chain(own, gp.ClipByNorm(1e9)),
        "Warmup": lambda: gp.Warmup(100, own, None),
        "PerGroup": lambda: gp.PerGroup(own),
    }
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]
    guard = gk.attach(torch.optim.SGD(weights), policies[within](), record=tmp_path / "run.keel")
    reports = []
    for _ in range(40):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        guard.optimizer.step()
        reports.append(guard.report)
    guard.detach()
    wanted = pytest.approx([1.0 / step for step in range(1, 41)], rel=1e-6)  # of float32
    assert [report.coefficient for report in reports] == wanted
    with Reader(tmp_path / "run.keel") as run:
        assert run.coefficients().tolist() == wanted


@pytest.mark.parametrize("given", ["high", [1.0, None]])
def test_a_bound_that_is_no_number_stops_the_record_and_not_the_training(tmp_path, given):
    with pytest.warns(RecordWarning, match="cannot be put together: .*; training goes on"):
        bounded_run(tmp_path / "run.keel", lambda step: given, 40)
    bounded_run(tmp_path / "run.keel", float, 3)  # the file is free
    with Reader(tmp_path / "run.keel") as run:
        assert len(run) == 3


def test_a_sink_that_fails_ends_alone(tmp_path, make_report):
    class Broken:
        def write(self, rows):
            raise ConnectionError("no route to host")

        def close(self):
            raise AssertionError("a sink that failed is not called again")

        def __repr__(self):
            return "the tracker"

    class Counting:
        steps = 0
        closed = False

        def write(self, rows):
            self.steps += len(rows.steps)

        def close(self):
            self.closed = True

    counting = Counting()
    recorder = Recorder(tmp_path / "run.keel", sinks=[Broken(), counting])
    for step in range(1, 50):
        recorder.record(make_report(step))
    with pytest.warns(RecordWarning, match="the tracker: no route to host; training goes on"):
        recorder.flush()
    for step in range(50, 101):
        recorder.record(make_report(step))
    recorder.close()
    recorder.record(make_report(101))  # after the end: nothing happens
    recorder.close()
    assert (counting.steps, counting.closed) == (100, True)
    check_rows(tmp_path / "run.keel", range(1, 101))


class Gate:
    """A sink that writes nothing until it may."""

    def __init__(self):
        self.go, self.begun, self.steps, self.closed = threading.Event(), threading.Event(), [], False

    def write(self, rows):
        self.begun.set()
        assert self.go.wait(60)
        self.steps += rows.steps

    def close(self):
        self.closed = True

    def __repr__(self):
        return "the slow disk"


@pytest.mark.parametrize("ends", ["flush", "close"])
def test_a_slow_sink_catches_up(tmp_path, make_report, monkeypatch, ends):
    """As many steps may wait as there is room for; whoever flushes or closes waits for all of them."""
    monkeypatch.setattr("gradkeel.record.outbox.MOST_WAITING", 64 * 3 + 10)
    monkeypatch.setattr("gradkeel.record.outbox.MOST_KEPT", 64)
    sink, other = Gate(), Gate()
    other.go.set()
    recorder = Recorder(tmp_path / "run.keel", sinks=[sink, other], flush_seconds=60)
    for step in range(1, 65):
        recorder.record(make_report(step))
    assert sink.begun.wait(60)  # one batch is being written
    for step in range(65, 64 * 4 + 11):  # three wait, and ten steps more are not sent yet
        recorder.record(make_report(step))
    assert sink.steps == []
    threading.Timer(0.2, sink.go.set).start()
    getattr(recorder, ends)()  # a warning would be an error
    assert sink.steps == other.steps == list(range(1, 64 * 4 + 11))
    assert sink.closed == other.closed == (ends == "close")
    for step in range(267, 270):
        recorder.record(make_report(step))
    recorder.close()
    assert sink.steps == list(range(1, 270 if ends == "flush" else 267))
    assert sink.closed
    check_rows(tmp_path / "run.keel", sink.steps)


def test_steps_wait_for_each_other_until_there_are_enough(make_report):
    sink = Gate()
    sink.go.set()
    recorder = Recorder(None, sinks=[sink], flush_seconds=600)
    for step in range(1, MOST_KEPT):
        recorder.record(make_report(step))
    recorder._outbox.wait_for_sent()
    assert sink.steps == []
    recorder.record(make_report(MOST_KEPT))
    recorder._outbox.wait_for_sent()
    assert sink.steps == list(range(1, MOST_KEPT + 1))
    recorder.close()


def test_a_disk_that_hangs_does_not_fill_the_memory(make_report, monkeypatch):
    monkeypatch.setattr("gradkeel.record.outbox.MOST_WAITING", 2 * 64)
    monkeypatch.setattr("gradkeel.record.outbox.MOST_KEPT", 64)

    sink = Gate()
    recorder = Recorder(None, sinks=[sink], flush_seconds=60)

    def train():
        for step in range(1, 64 * 6):
            recorder.record(make_report(step))

    with pytest.warns(RecordWarning, match="the slow disk does not keep up with 128 steps waiting") as warned:
        train()
    assert len(warned) == 1
    sink.go.set()
    recorder.close()
    # One batch was being written and two waited, or three waited at first; that it stopped, it was told once.
    assert sink.steps in ([], list(range(1, 65)))


def test_closing_does_not_wait_for_ever_for_a_disk_that_hangs(make_report, monkeypatch):
    for limit, value in (("MOST_KEPT", 1), ("CLOSE_SECONDS", 0.05)):
        monkeypatch.setattr(f"gradkeel.record.outbox.{limit}", value)
    sink = Gate()
    recorder = Recorder(None, sinks=[sink])
    recorder.record(make_report(1))
    assert sink.begun.wait(60)
    recorder.record(make_report(2))  # which waits
    recorder.close()
    assert sink.steps == []
    sink.go.set()


def test_a_recorder_needs_something_to_write_to():
    with pytest.raises(TypeError, match=r"Recorder\(path=None\): give a path, or at least one sink"):
        Recorder(None)


def test_a_forked_process_leaves_the_record_alone(tmp_path, make_report):
    script = """
        import os, sys, warnings, torch
        import gradkeel as gk
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = gk.attach(optimizer, None, model=model, record=sys.argv[1])
        def step():
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        step()
        if os.fork() == 0:
            step()
            guard.detach()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        step()
        guard.detach()
    """
    run_script(script, tmp_path / "run.keel")
    with Reader(tmp_path / "run.keel") as run:
        assert run.steps().tolist() == [1, 2]


def kill_many(tmp_path, times):
    lengths = []
    for path, _, _, flushed in kill(tmp_path, times, one_record=False):
        length = steps_of(path)
        assert length >= flushed  # at most what was not flushed yet is lost
        if length == 0:
            continue
        check_rows(path, range(1, length + 1))
        with Reader(path) as run:
            torch.testing.assert_close(run.losses(), run.steps().double(), rtol=0, atol=0)
        record_after(path, length)
        lengths.append(length)
    assert len(lengths) > times / 2
    assert len(set(lengths)) > times / 4  # they were killed at different moments


def steps_of(path):
    """How many steps a file holds; a process may have been killed before it wrote any."""
    if not Path(path).exists():
        return 0
    try:
        with Reader(path) as run:
            return len(run)
    except RecordError as error:
        if "no step has been recorded yet" in str(error):
            return 0
        raise


def record_after(path, length):
    """A killed run's record can be continued."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recorder(path).close()
    assert not Path(f"{path}-lock").exists()
    with Reader(path) as run:
        assert len(run) == length


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_kill_9_never_corrupts(tmp_path):
    kill_many(tmp_path, 20)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_kill_9_at_100_moments_never_corrupts(tmp_path):
    kill_many(tmp_path, 100)


def test_a_copied_record_is_whole_after_closing(tmp_path, make_report):
    record(tmp_path / "run.keel", make_report, range(1, 70))
    shutil.copy(tmp_path / "run.keel", tmp_path / "copy.keel")
    check_rows(tmp_path / "copy.keel", range(1, 70))


def test_blobs_of_few_bytes_share_a_statement_and_large_ones_do_not(tmp_path, make_report, monkeypatch):
    monkeypatch.setattr("gradkeel.record.writer._BYTES", 1)
    record(tmp_path / "run.keel", make_report, range(1, 201))
    check_rows(tmp_path / "run.keel", list(range(1, 201)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in kilobytes")
def test_what_was_written_is_not_held_until_the_file_is_closed(tmp_path):
    """Statements of all lengths, each with blobs of its own."""
    script = """
        import resource, sys
        from gradkeel.record.writer import RecordFile
        own = RecordFile(sys.argv[1])
        def rows(first, count):
            return [("norms", first + i, bytes(3000)) for i in range(count)]
        own._insert("INSERT OR REPLACE INTO series", rows(0, 300))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for count in range(299, 179, -1):
            own._insert("INSERT OR REPLACE INTO series", rows(0, count))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    assert int(run_script(script, tmp_path / "run.keel")) < 20_000  # kilobytes; 86 MB were written
