"""``gradkeel report``: a recorded run as one page, written once, or served while training goes on."""

from pathlib import Path
from typing import Annotated

import typer

from gradkeel.cli.errors import note_damage, reported
from gradkeel.cli.options import Run
from gradkeel.language import say, shown


@reported
def command(
    run: Run,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="PATH", help="where to write the page (default: beside the record)"
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="serve the page on this machine, and renew it while training runs")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", metavar="N", help="of --watch; 0 takes a free one", min=0, max=65535)
    ] = 0,
) -> None:
    """Draw a recorded run on one page that opens offline: norms, heat map, loss, bounds, and what happened in words."""
    from gradkeel.explain.run_page import run_page
    from gradkeel.record import Reader
    from gradkeel.record.schema import refuse_record

    if watch:
        _serve(run, port, show=show)
        return
    out = out or run.with_suffix(".html")
    refuse_record(out, "--out")
    with Reader(run) as reader:
        text = run_page(reader)
        note_damage(reader)
    out.write_text(text, encoding="utf-8")
    print(shown(say("Wrote {path}", path=out)))
    if show:
        import webbrowser

        webbrowser.open(out.resolve().as_uri())


def _serve(run: Path, port: int, *, show: bool) -> None:
    from gradkeel.explain.watch import address, make_server

    server = make_server(run, port=port)
    print(
        shown(say("Watching {run} at {address} (Ctrl-C ends)", run=run, address=address(server))), flush=True
    )
    if show:
        import webbrowser

        webbrowser.open(address(server))
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
