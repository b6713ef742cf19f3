"""Ctrl-C as a terminal sends it, to ``gradkeel compare`` in a process of its own (POSIX)."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time


def wait_until_gone(group):
    """Until no process of the group is left; the test's time limit ends a wait for one that stays."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            time.sleep(0.1)


def interrupt_after_the_first_run(folder, *arguments, env=None):
    """Run ``gradkeel compare``, and press Ctrl-C once its live table shows the first result.

    Returns:
        The exit code, stdout and stderr, after every process has gone.
    """
    import pty  # POSIX only; the tests that skip elsewhere import this file all the same

    # stderr is a terminal: its table is drawn with the first result, where a pipe gets one only after seconds.
    terminal, side = pty.openpty()
    wide = {**(os.environ if env is None else env), "TERM": "xterm", "COLUMNS": "200"}
    with (
        subprocess.Popen(
            [sys.executable, "-m", "gradkeel", "compare", *arguments],
            cwd=folder,
            env=wide,
            stdout=subprocess.PIPE,
            stderr=side,
            text=True,
            preexec_fn=_listen,  # noqa: PLW1509  # nothing else runs in this process yet
            start_new_session=True,  # a group of its own, signalled whole: a terminal sends Ctrl-C to workers as well
        ) as process
    ):
        os.close(side)
        error = b""
        pressed = False
        while piece := _read(terminal):
            error += piece
            if not pressed and b"so far" in error:
                pressed = True
                os.killpg(process.pid, signal.SIGINT)
        out = process.stdout.read()
    os.close(terminal)
    wait_until_gone(process.pid)
    return process.returncode, out, error.decode()


def _listen():
    """Ctrl-C ends what is started here, also where the tests themselves ignore it, as what ``&`` starts does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read(terminal):
    try:
        return os.read(terminal, 2**16)
    except OSError as end:  # how Linux says that nobody writes to the terminal any more
        if end.errno != errno.EIO:
            raise
        return b""
