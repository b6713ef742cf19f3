"""Python processes that cost their script alone: forked from one that has imported torch, which takes seconds.

A script finds what it would find in a Python of its own: its arguments, environment, working directory and streams, and
a ``__main__`` that is its own. It ends as a process does, and its exit code is the command's. What an interpreter does
before a script's first line is not tested so: tests of imports start ``sys.executable``.
"""

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent


@functools.cache
def _server():
    """Where the process listens that forks the others; it ends with this one."""
    place = Path(tempfile.mkdtemp(prefix="warm-")) / "socket"
    command = [sys.executable, FOLDER / "warm_server.py", place]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    with server.stdout as words:
        assert words.readline() == b"ready\n"

    def end():
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return str(place)


def python():
    """The words of a command that stand for ``python``: a script, ``-c`` or ``-m`` follows, and its arguments."""
    if not hasattr(os, "fork"):
        return [sys.executable]
    # Without `site`, which the client does not need, it starts in some milliseconds.
    return [sys.executable, "-I", "-S", str(FOLDER / "warm_client.py"), _server()]
