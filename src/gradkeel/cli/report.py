"""``gradkeel report``: a recorded run, or several, as one page, written once, or served while training goes on."""

import contextlib
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from gradkeel.cli.common import note_damage, reported
from gradkeel.language import say, shown


@reported
def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="a record, such as runs/exp1.keel; several are drawn over each other",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="where to write the page (default: beside the record; report.html beside the first of several)",
        ),
    ] = None,
    inline: Annotated[
        bool,
        typer.Option(
            "--inline/--no-inline",
            help="plotly's script, 5 MB, in the page; or beside it, for all pages there",
        ),
    ] = True,
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="serve the page on this machine, and renew it while training runs")
    ] = False,
    port: Annotated[
        int, typer.Option(metavar="N", help="of --watch; 0 takes a free one", min=0, max=65535)
    ] = 0,
) -> None:
    """Draw a recorded run on one page that opens offline: norms, heat map, loss, bounds, and what happened in words."""
    from gradkeel.explain.run_page import run_page
    from gradkeel.explain.runs_page import runs_page
    from gradkeel.page.page import write_script
    from gradkeel.record import Reader
    from gradkeel.record.schema import refuse_record

    if len({run.resolve() for run in runs}) < len(runs):
        raise typer.BadParameter(shown(say("the same record is given twice")), param_hint="RUN")
    if watch:
        if len(runs) > 1:
            raise typer.BadParameter(
                shown(say("it shows one record; leave the others out")), param_hint="--watch"
            )
        _serve(runs[0], port, show=show)
        return
    out = out or (runs[0].with_suffix(".html") if len(runs) == 1 else runs[0].with_name("report.html"))
    refuse_record(out, "--out")
    with contextlib.ExitStack() as opened:
        readers = [opened.enter_context(Reader(run)) for run in runs]
        script = None if inline else write_script(out.parent)
        text = run_page(readers[0], script=script) if len(runs) == 1 else runs_page(readers, script=script)
        for reader in readers:
            note_damage(reader.damage)
    out.write_text(text, encoding="utf-8")
    said = say("Wrote {path}, which needs {script} beside it", path=out, script=script) if script else ""
    print(shown(said or say("Wrote {path}", path=out)))
    if show:
        webbrowser.open(out.resolve().as_uri())


def _serve(run: Path, port: int, *, show: bool) -> None:
    from gradkeel.explain.watch import address, make_server

    server = make_server(run, port=port)
    print(
        shown(say("Watching {run} at {address} (Ctrl-C ends)", run=run, address=address(server))), flush=True
    )
    if show:
        webbrowser.open(address(server))
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
