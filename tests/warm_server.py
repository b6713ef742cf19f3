"""The server of `warm.python`: imports torch once, and forks a process for each script."""

import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import types
import warnings
from pathlib import Path

# torch._dynamo is what the first step of an optimizer imports.
PRELOADED = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "gradkeel.compare",
    "gradkeel.explain",
    "gradkeel.record",
)


def fork():
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of a fork beside threads, of which torch may have some
        return os.fork()


def serve(place):
    """Returns in a new process for each request, with its connection, streams and words; ends where stdin does."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the new processes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        print("ready", flush=True)
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                shutil.rmtree(place.parent)
                raise SystemExit
            connection = listener.accept()[0]
            if fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    streams = socket.recv_fds(connection, len(b"streams"), 3)[1]
    with connection.makefile("rb") as lines:
        return connection, streams, json.loads(lines.readline())


def fork_script(connection):
    """Returns in the process that is to run the script; the other one tells the client how that ended."""
    script = fork()
    if script == 0:
        connection.close()
        return
    while True:
        ended, status = os.waitpid(script, os.WNOHANG)
        if ended:
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if select.select([connection], [], [], 0.01)[0]:  # the client has gone
            os.kill(script, signal.SIGKILL)
            os._exit(1)


def become(streams, environment, folder):
    """All that a script finds, but its words and ``__main__``."""
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def run(first, *others):
    """What Python does with these words."""
    if first == "-m":
        sys.argv, sys.path[0] = list(others), str(Path.cwd())
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        return
    source = others[0] if first == "-c" else Path(first).read_text(encoding="utf-8")
    sys.argv = [first, *others[first == "-c" :]]
    sys.path[0] = "" if first == "-c" else str(Path(first).resolve().parent)
    # Not by runpy, at whose end the module would be gone before what runs at the end of the process.
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    if first != "-c":
        module.__file__ = first
    exec(compile(source, first if first != "-c" else "<string>", "exec"), module.__dict__)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a process would look at all that was imported when it ends
    itself = sys.modules["__main__"]
    connection, streams, request = serve(Path(sys.argv[1]))
    fork_script(connection)
    become(streams, request["environment"], request["folder"])
    run(*request["words"])
