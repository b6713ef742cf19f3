"""The typer application: every command registers here."""

import typer

from gradkeel.cli import bench, compare, doctor, explain, export, policies, replay, report, smoothness

app = typer.Typer(
    help="Gradient clipping for PyTorch: compare policies, and see why a run diverged.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _commands() -> None:
    # With a callback, a single command keeps its name.
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
