"""Runs scripts in processes of their own, and kills processes that record: for tests of tests/record."""

import subprocess
import textwrap

import warm


def run_script(script, *arguments, check=True, timeout=120):
    """Run a script, whose own arguments follow in ``sys.argv``; its output."""
    command = [*warm.python(), "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=check, timeout=timeout).stdout


def kill(target, times, *, one_record):
    """Train so often, each time in a forked process that is killed at a random moment.

    Args:
        target: the record that all of them go on with, each from a random step; or a folder, for one each.
        times: how many are killed.
        one_record: which of both.

    Returns:
        Of each its record, what it adds to the number of a step for the norms of that step, its first step, and the
        last one that it was told to be on disk (0: none).
    """
    lines = run_script(_KILLED, target, times, int(one_record), timeout=280).splitlines()
    return [(path, *map(int, numbers)) for path, *numbers in map(str.split, lines)]


_KILLED = """
    import os, random, signal, sys, time, warnings
    import torch
    from gradkeel.norms import Decision, GradientNorms
    from gradkeel.record import Recorder
    from gradkeel.guard.report import SelectionReport, StepReport

    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads
    torch.set_num_threads(1)
    target, times, one_record = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
    names = tuple(f"layer.{i}" for i in range(12))

    def train(path, offset, first, out):
        recorder = Recorder(path, flush_seconds=0.003)
        for step in range(first, 1_000_000):
            norms = torch.full((12,), float(offset + step), dtype=torch.float64)
            measured = GradientNorms(names, norms, norms[0], 2.0, (0,) * 12, step, (1,) * 12)
            selection = SelectionReport("main", "None", measured, Decision(), (True,) * 12)
            recorder.record(StepReport(step, (selection,), 1.0, {"loss": torch.tensor(float(step))}))
            if step % 20 == 0:
                recorder.flush()
                os.write(out, step.to_bytes(8, "little"))

    random.seed(0)
    last = 0
    for attempt in range(times):
        path, offset, first = os.path.join(target, f"{attempt}.keel"), 0, 1
        if one_record:
            path, offset = target, attempt * 1_000_000
            first = random.choice([1, last + 1, random.randint(1, last + 1), max(1, last - 3)])
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            train(path, offset, first, write)
        os.close(write)
        time.sleep(random.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        flushed = b""
        while part := os.read(read, 1 << 16):
            flushed += part
        os.close(read)
        told = int.from_bytes(flushed[-8:], "little")
        last = told or last
        print(path, offset, first, told)
"""
