"""``gradkeel compare``: run a plan, show the table and the four lines, write compare.json and compare.html."""

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from gradkeel.cli.common import TASK, AsJson, complain, reported
from gradkeel.language import count, heard, say, shown

if TYPE_CHECKING:
    from gradkeel.compare.plan import Comparison

INTERRUPTED = 130  # what shells give for SIGINT
ADDRESS = re.compile(r"\w+://.+|[^:]+:\d+|\[.+\]:\d+|auto|local")  # no task: a function's name is no number


class Command(TyperCommand):
    """Reads ``--ray [ADDRESS]``: Typer has no options with an optional value. An address may be the next word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write ``--ray`` as ``--ray=`` or ``--ray=ADDRESS``."""
        words: list[str] = []
        for word in args:
            if words[-1:] == ["--ray="] and ADDRESS.fullmatch(word):
                words[-1] += word
            else:
                words.append("--ray=" if word == "--ray" else word)
        return super().parse_args(ctx, words)


@reported
def command(
    task: Annotated[
        str | None, typer.Argument(metavar="TASK", help=f"{TASK}; char-lstm unless given")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="a policy, such as none or global-norm:0.25; may be repeated"),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="POLICY:LOW..HIGH", help="a range of bounds, such as global-norm:0.01..100"),
    ] = None,
    lr: Annotated[
        list[float] | None, typer.Option(metavar="X", help="a learning rate; may be repeated")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="items in a batch")] = None,
    accumulate: Annotated[
        int | None, typer.Option(metavar="N", help="batches that make one step, accumulated exactly")
    ] = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="how many seeds")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="optimizer steps in a run")] = None,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="how many runs at a time (default: one a core)")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="your own command instead of a task, such as 'python train.py --lr 0.1'",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="run on the Ray cluster at host:port or ray://host:port; without an address on the one that Ray "
            "finds, or starts here",
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="record every run under DIR/runs, for gradkeel explain and report"),
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="directory for compare.json and compare.html")
    ] = Path("gradkeel-compare"),
    as_json: AsJson = False,
) -> None:
    """Train the same task under several policies, learning rates and seeds, and say what clipping changed."""
    from gradkeel.attaching import ignore_environment
    from gradkeel.cli.progress import progress
    from gradkeel.compare import compare, make_command_plan, make_plan
    from gradkeel.compare.contest import starts_in_words

    # They would take the place of every policy that is compared.
    ignore_environment()
    with _only_json_on_stdout() if as_json else contextlib.nullcontext():
        if run is None:
            plan = make_plan(
                task or "char-lstm",
                policies=policy,
                learning_rates=lr,
                seeds=seeds,
                steps=steps,
                batch_size=batch_size,
                accumulate=accumulate,
                sweep=sweep,
                record=record,
            )
        else:
            of_tasks = {
                "TASK": task, "--lr": lr, "--steps": steps, "--batch-size": batch_size, "--accumulate": accumulate,
            }  # fmt: skip
            if given := [name for name, value in of_tasks.items() if value is not None]:
                told = say(
                    "{name} has no effect on a command of your own; write it into the command: "
                    "--run 'python train.py --lr 0.1'",
                    name=given[0],
                )
                raise typer.BadParameter(shown(told))
            plan = make_command_plan(run, policies=policy, seeds=seeds, sweep=sweep)
        _check_writable(out)
        with contextlib.nullcontext(lambda so_far: None) if as_json else progress(plan) as show:
            said = {""}

            def on_run(so_far: "Comparison") -> None:
                show(so_far)
                words = starts_in_words(so_far)
                if words not in said:
                    said.add(words)
                    complain(words)

            result = compare(plan, jobs=jobs, on_run=on_run, records=out / "runs", ray=ray, say=complain)
    _deliver(result, out, as_json=as_json)


def _check_writable(out: Path) -> None:
    """Raise at once what would otherwise be raised after hours of training."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=there):
        pass
    for name in ("compare.json", "compare.html"):
        if (out / name).exists():
            with (out / name).open("a"):
                pass


@contextlib.contextmanager
def _only_json_on_stdout() -> Iterator[None]:
    """What a task prints, here or in a worker process, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _deliver(result: "Comparison", out: Path, *, as_json: bool) -> None:
    """Table, words and files of whatever has finished."""
    from gradkeel.cli.progress import print_result
    from gradkeel.compare.findings import document, findings
    from gradkeel.compare.page import compare_page
    from gradkeel.compare.summary import summarize
    from gradkeel.errors import MissingExtraError

    text = json.dumps(document(result), allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "compare.json"]
    written[0].write_text(text + "\n", encoding="utf-8")
    if result.runs:
        try:
            html = compare_page(result, summarize(result.runs, result.plan.target_loss), findings(result))
        except MissingExtraError as error:
            print(shown(say("No page was written: {error}", error=heard(str(error)))), file=sys.stderr)
        else:
            written.append(out / "compare.html")
            written[1].write_text(html, encoding="utf-8")
    if as_json:
        print(text)
    else:
        print_result(result)
        print(shown(say("Written: {paths}", paths=", ".join(map(str, written)))))
    if result.interrupted:
        told = say(
            "Interrupted: {done} of {runs} had finished, and are kept.",
            done=len(result.runs),
            runs=count(len(result.plan.trials), "{n} run", "{n} runs"),
        )
        print(shown(told), file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
