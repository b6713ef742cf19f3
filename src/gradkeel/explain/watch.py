"""The page of a run that is still going on, served to this machine alone and renewed as the record grows."""

import http.server
import re
import threading
from html import escape
from http import HTTPStatus
from pathlib import Path
from zlib import crc32

from gradkeel.errors import RecordError
from gradkeel.explain.run_page import run_page
from gradkeel.language import heard, say, shown
from gradkeel.record import Reader

_SCRIPT = re.compile(r"<script>.*?</script>\n</head>", re.DOTALL)
_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)


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
                again = f"-{len(reader.rollbacks)}" if reader.rollbacks else ""
                return f"{len(reader)}-{reader.last_step}{again}"
        except RecordError as error:
            return f"0-{crc32(str(error).encode())}" if self._path.exists() else "0"

    def html(self) -> str:
        """The page; until there is something to draw, one that says so."""
        version, page = self._current()
        renew = Path(__file__).with_name("renew.js").read_text(encoding="utf-8")
        renewed = f"<script>\nlet shown = {version!r};\n{renew}</script></head>\n<body>"
        return page.replace("</head>\n<body>", renewed, 1)

    def content(self) -> str:
        """The page without plotly's script, for a page that has it."""
        return _SCRIPT.sub("</head>", self._current()[1], count=1)

    def _current(self) -> tuple[str, str]:
        with self._lock:
            if (version := self.version()) != self._version:
                self._page, self._version = self._draw(), version
            return self._version, self._page

    def _draw(self) -> str:
        words = say("Nothing recorded yet.")
        try:
            with Reader(self._path) as reader:
                if len(reader):
                    return run_page(reader)
        except RecordError as error:
            if self._path.exists():
                words = say("Nothing to show: {error}", error=heard(error.args[0]))
        return (
            f"<!doctype html><html><head><meta charset='utf-8'><title>gradkeel</title></head>\n"
            f"<body>{escape(shown(words))}</body></html>"
        )


def make_server(path: Path, *, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of the page on the loopback interface, not started yet; the record may not be there yet, either."""
    page = RunPage(path)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another name may lead here too: a page of somebody else's, whose name he lets point to this machine.
            hosts = self.headers.get_all("Host") or []
            if len(hosts) != 1 or not _LOOPBACK.fullmatch(hosts[0].strip()):
                self.send_error(HTTPStatus.FORBIDDEN, "this page is for localhost only")
                return
            if self.path == "/favicon.ico":
                self.send_response(HTTPStatus.NO_CONTENT)
                self.end_headers()
                return
            answer = {"/": page.html, "/content": page.content, "/version": page.version}.get(self.path)
            if answer is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body, kind = answer().encode(), "plain" if self.path == "/version" else "html"
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
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
