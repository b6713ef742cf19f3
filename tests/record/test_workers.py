"""Worker processes that train: whose steps are recorded, and whose are not."""

import os
import subprocess
import textwrap
import threading

import pytest

import warm
from gradkeel.record import Reader, Recorder, outbox

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")

WORKERS = """
    import multiprocessing, sys, warnings, torch
    import gradkeel as gk
    folder, method, own, ending = sys.argv[1:]

    def train(worker, model, optimizer):
        if own == "own":
            gk.attach(optimizer, None, model=model, record=f"{folder}/{worker}.keel")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
        for warning in caught:
            sys.stdout.write(f"{warning.message}\\n")  # at once, as print does not where Python does not buffer
            sys.stdout.flush()
        if ending == "raise":
            raise SystemExit(3)

    if __name__ == "__main__":
        torch.set_num_threads(1)
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads
        model = torch.nn.Linear(2, 1).share_memory()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if method == "fork":
            gk.attach(optimizer, None, model=model, record=f"{folder}/parent.keel")
        context = multiprocessing.get_context(method)
        workers = [context.Process(target=train, args=(i, model, optimizer)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [3 if ending == "raise" else 0] * 2
        train("parent", model, optimizer)
"""


def run(folder, *arguments):
    script = folder / "workers.py"  # spawned workers import it
    script.write_text(textwrap.dedent(WORKERS), encoding="utf-8")
    command = [*warm.python(), script, folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("method", "ending"), [("fork", "return"), ("fork", "raise"), ("spawn", "return")])
def test_workers_that_attach_write_their_last_steps_when_they_end(tmp_path, method, ending):
    end = run(tmp_path, method, "own", ending)
    assert (end.returncode, end.stdout) == (3 if ending == "raise" else 0, ""), end.stderr
    for worker in (0, 1, "parent"):
        with Reader(tmp_path / f"{worker}.keel") as record:
            assert record.steps().tolist() == [1, 2, 3]
    assert not list(tmp_path.glob("*-wal"))


def test_forked_workers_under_the_parents_recorder_are_told_once_that_it_is_not_theirs(tmp_path):
    end = run(tmp_path, "fork", "parents", "return")
    said = end.stdout.splitlines()
    assert (end.returncode, len(said)) == (0, 2), end.stdout + end.stderr
    for words in said:
        assert words.startswith("this process was forked from the one that records to ")
        assert "attach in each worker, with a record of its own" in words
    with Reader(tmp_path / "parent.keel") as record:
        assert record.steps().tolist() == [1, 2, 3]


class Slow:
    """A sink, as of SQLite, whose locks a forked process would find held for ever if it is forked in a write."""

    def __init__(self, seconds):
        self.seconds, self.is_writing = seconds, False
        self.started, self.may_end = threading.Event(), threading.Event()

    def write(self, rows):
        self.is_writing = True
        self.started.set()
        self.may_end.wait(self.seconds)
        self.is_writing = False

    def close(self):
        pass


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("waits", [True, False])
def test_a_process_is_forked_between_writes_unless_they_take_too_long(make_report, monkeypatch, waits):
    monkeypatch.setattr(outbox, "FORK_SECONDS", 60.0 if waits else 0.05)
    sink = Slow(0.5 if waits else 60.0)
    recorder = Recorder(None, sinks=[sink], flush_seconds=0.0)
    for step in (1, 2):
        recorder.record(make_report(step))
        assert sink.started.wait(60)
        sink.started.clear()
        child = os.fork()
        if not child:
            os._exit(int(sink.is_writing))
        assert os.waitpid(child, 0)[1] == 256 * (not waits)
        sink.may_end.set()
        recorder.flush()
        sink.may_end.clear()
    recorder.close()
