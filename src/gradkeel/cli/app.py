"""The typer application: every command registers here."""

from typing import Annotated, Literal

import typer

from gradkeel import __version__
from gradkeel.cli import bench, compare, doctor, explain, export, policies, replay, report, smoothness
from gradkeel.cli.language import Commands

app = typer.Typer(
    cls=Commands,
    help="Gradient clipping for PyTorch: compare policies, and see why a run diverged.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"gradkeel {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)
    ] = False,
    lang: Annotated[
        Literal["en", "zh"] | None,
        typer.Option(
            "--lang",
            metavar="LANG",
            help="en or zh, before or after any command (default: GRADKEEL_LANG, or the locale)",
        ),
    ] = None,
) -> None:
    pass


app.command("compare", cls=compare.Command)(compare.command)
app.command("smoothness")(smoothness.command)
app.command("policies")(policies.command)
app.command("explain")(explain.command)
app.command("report")(report.command)
app.command("replay")(replay.command)
app.command("export")(export.command)
app.command("doctor")(doctor.command)
app.command("bench")(bench.command)
