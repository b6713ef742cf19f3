"""A command of `warm.python`: hands its words, environment, directory and streams to the server, and ends as told."""

import json
import os
import signal
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    socket.send_fds(server, [b"streams"], [0, 1, 2])
    # The directory as a string, for to import pathlib takes longer than all the rest.
    request = {"words": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
    server.sendall(json.dumps(request).encode() + b"\n")
    code = int(server.recv(16))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
