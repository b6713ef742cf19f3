"""The page of a run that is still going on, served to this machine alone and renewed as the record grows."""

import http.server
import threading
from http import HTTPStatus
from pathlib import Path

from gradkeel.errors import RecordError
from gradkeel.explain.run_page import run_page
from gradkeel.record import Reader

_RELOAD = """<script>
const shown = %r;
setInterval(async () => {
  try { if (await (await fetch("version")).text() !== shown) location.reload(); } catch { /* training has ended */ }
}, 2000);
</script>"""


class RunPage:
    """The page of a record as it is now; drawn again only when the record has grown."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._version, self._page = "", ""

    def version(self) -> str:
        """What changes when the record does."""
        try:
            with Reader(self._path) as reader:
                return f"{len(reader)}-{reader.last_step}"
        except RecordError:
            return "0"

    def html(self) -> str:
        """The page; until there is something to draw, one that says so."""
        with self._lock:
            version = self.version()
            if version != self._version:
                self._page = self._draw()
                self._version = version
            return self._page.replace("</head>", _RELOAD % version + "</head>", 1)

    def _draw(self) -> str:
        try:
            with Reader(self._path) as reader:
                if len(reader):
                    return run_page(reader)
        except RecordError:
            pass
        return "<!doctype html><html><head><title>gradkeel</title></head><body>Nothing recorded yet.</body></html>"


def make_server(path: Path, *, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of the page on the loopback interface, not started yet.

    Args:
        path: of the record, which may not be there yet.
        port: 0 takes a free one.
    """
    shown = RunPage(path)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            routes = {"/": ("text/html", shown.html), "/version": ("text/plain", shown.version)}
            kind, answer = routes.get(self.path, ("", None))
            if answer is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = answer().encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as http.server names it
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


def address(server: http.server.ThreadingHTTPServer) -> str:
    """Where a server of `make_server` is found."""
    return f"http://127.0.0.1:{server.server_address[1]}/"
