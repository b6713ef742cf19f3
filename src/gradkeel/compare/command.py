"""Runs of the user's own script, which must contain one ``gk.attach`` line: policy in, record out, by environment."""

import contextlib
import itertools
import math
import os
import shlex
import signal
import statistics
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from gradkeel import language
from gradkeel.attaching import POLICY_VARIABLE, RECORD_VARIABLE, SEED_VARIABLE
from gradkeel.compare.plan import Plan
from gradkeel.compare.run import Onset, Run, Trial, divergence, set_aside
from gradkeel.compare.task import TaskError
from gradkeel.errors import RecordError
from gradkeel.explain import explain
from gradkeel.record import Reader
from gradkeel.record.recorder import TAKEN_OVER

_NEEDED = language.say(
    "its training loop needs one line before it, guard = gradkeel.attach(optimizer, None, model=model), and must call "
    "optimizer.step()"
)
_ATTACHED_WITHIN = 20.0  # seconds, after which it is said that no guard has been attached
_MOST_FILES = 2000  # beside the script
_LAST_WORDS = 10  # lines of a failing script's output that its error shows


def in_subprocesses(
    plan: Plan, jobs: int, folder: Path, say: Callable[[str], None]
) -> Generator[tuple[int, Run]]:
    """Index and result of each trial as it finishes; records and outputs stay in ``folder``.

    Whether the script guards anything is looked at when it begins, and ``say`` is told.

    Raises:
        TaskError: the command cannot be started, fails without having diverged, or guards no optimizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if words := _unguarded(plan.target):
        say(words)
    alive: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[Run], int] = {}
        for i, trial in enumerate(plan.trials):
            told = say if i == 0 else lambda words: None
            futures[pool.submit(_run, plan.target, trial, folder, alive, told)] = i
        try:
            yield from as_finished(futures)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(alive):
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()


def as_finished(futures: dict[Future[Run], int]) -> Iterator[tuple[int, Run]]:
    """Index and result of each trial as it finishes.

    Not by `wait`: it holds every future's lock, and Ctrl-C in the midst of that would leave them held for ever.
    """
    finished: SimpleQueue[Future[Run]] = SimpleQueue()
    for future in futures:
        future.add_done_callback(finished.put)
    for _ in futures:
        future = finished.get()
        yield futures[future], future.result()


@contextlib.contextmanager
def on_ctrl_c(handler: Callable[[int, object], None] | signal.Handlers) -> Iterator[None]:
    """Let Ctrl-C do this meanwhile; in a thread that cannot say so, it does what it did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _unguarded(command: str) -> str:
    """A warning where neither the command's script nor a module beside it speaks of gradkeel; else nothing."""
    script = next((Path(word) for word in shlex.split(command) if word.endswith(".py")), None)
    if script is None or not script.is_file():
        return ""
    beside = itertools.islice(script.resolve().parent.rglob("*.py"), _MOST_FILES)
    if any(b"gradkeel" in path.read_bytes() for path in (script, *beside) if path.is_file()):
        return ""
    return language.say(
        "{script} and the files beside it do not speak of gradkeel: {needed}", script=script, needed=_NEEDED
    )


def _run(
    command: str, trial: Trial, folder: Path, alive: set[subprocess.Popen[bytes]], say: Callable[[str], None]
) -> Run:
    record = folder / trial.record_name
    output = record.with_suffix(".log")
    set_aside(record)
    environment = os.environ | {
        POLICY_VARIABLE: trial.policy,
        RECORD_VARIABLE: str(record.resolve()),
        SEED_VARIABLE: str(trial.seed),
    }
    with output.open("wb") as log:
        try:
            # A group of its own: Ctrl-C reaches this process alone, which then ends the script.
            process = subprocess.Popen(
                shlex.split(command), env=environment, stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            raise TaskError(f"--run {command!r} cannot be started: {error}") from None
        alive.add(process)
        try:
            code = process.wait(_ATTACHED_WITHIN)
        except subprocess.TimeoutExpired:
            if not record.exists():
                words = language.say(
                    "--run {command!r} has attached no guard in {seconds:g} seconds: {needed}",
                    command=command,
                    seconds=_ATTACHED_WITHIN,
                    needed=_NEEDED,
                )
                say(words)
            code = process.wait()
        alive.discard(process)
    result = _result(command, trial, record, output, code)
    if result.is_one_of_several:
        words = language.say(
            "--run {command!r} attaches several guards, and a run has one record: all follow the policy, and the "
            "figures are those of the guard that was attached last",
            command=command,
        )
        say(words)
    return result


def _result(command: str, trial: Trial, record: Path, output: Path, code: int) -> Run:
    run = None
    with contextlib.suppress(RecordError), Reader(record) as reader:
        is_one_of_several = TAKEN_OVER.encode() in output.read_bytes()
        run = _read(trial, reader, is_one_of_several=is_one_of_several) if len(reader) else None
    if code and not (run and run.diverged):
        words = output.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_WORDS:]
        told = language.say(
            "--run {command!r} exited with {code} under {policy}; its last output, whole in {output}:\n{words}",
            command=command,
            code=code,
            policy=trial.policy,
            output=output,
            words="\n".join(words),
        )
        raise TaskError(told)
    if run is None:
        raise TaskError(
            language.say("--run {command!r} guarded no step; {needed}", command=command, needed=_NEEDED)
        )
    return run


def _read(trial: Trial, reader: Reader, *, is_one_of_several: bool) -> Run:
    bad = (reader.nonfinite() & reader.stepped()).tolist()
    losses = _filled(reader.losses().tolist(), bad) if "loss" in reader.scalar_names else []
    bad_step = next((i for i, is_bad in enumerate(bad, start=1) if is_bad), None)
    skipped = (~reader.stepped()).tolist()
    if all(skipped[-10:]):
        # It ended in skips: the last step that was made is the one that did it.
        bad_step = next((i for i in range(len(skipped), 0, -1) if not skipped[i - 1]), 0)
    diverged, diverged_at = divergence(losses, bad_step)
    times = reader.series("time").tolist()
    return Run(
        policy=trial.policy,
        lr=_logged(reader, "lr", 0),
        seed=trial.seed,
        losses=losses,
        norms=reader.totals().tolist(),
        initial_validation_loss=None,
        validation_loss=_logged(reader, "validation_loss", -1),
        diverged=diverged,
        diverged_at=diverged_at,
        onset=_onset(reader),
        clip_rate=statistics.fmean(reader.clipped().tolist()),
        skipped=sum(skipped),
        seconds_per_step=statistics.median(b - a for a, b in itertools.pairwise(times)) if times[1:] else 0.0,
        optimizer=reader.session.optimizer,
        verdict=str(explain(reader).verdict),
        is_one_of_several=is_one_of_several,
    )


def _logged(reader: Reader, name: str, which: int) -> float | None:
    """The first (0) or last (-1) finite value that the script logged under this name."""
    if name not in reader.scalar_names:
        return None
    values = [value for value in reader.scalar(name).tolist() if math.isfinite(value)]
    return values[which] if values else None


def _filled(losses: Sequence[float], bad: Sequence[bool]) -> list[float]:
    """Losses with the last one that was logged at the steps between; NaN where the gradient was not finite either."""
    last = next((loss for loss in losses if math.isfinite(loss)), math.nan)
    result = []
    for loss, is_bad in zip(losses, bad, strict=True):
        last = loss if is_bad or not math.isnan(loss) else last
        result.append(last)
    return result


def _onset(reader: Reader) -> Onset | None:
    """As far as the record's samples of weights and updates show it."""
    steps, weights, updates = reader.weight_samples()
    for step, sizes, changes in zip(steps.tolist(), weights, updates, strict=True):
        ratios = (changes / sizes).where(sizes > 0, 0.0).nan_to_num(0.0)
        if ratios.numel() and ratios.max() > 1:
            return Onset(step, reader.names[int(ratios.argmax())], float(ratios.max()))
    return None
