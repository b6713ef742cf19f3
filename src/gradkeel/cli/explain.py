"""``gradkeel explain``: why a recorded run blew up, what hardly learns, and what a bound would do."""

import json
import shlex
from typing import Annotated

import typer

from gradkeel.cli.common import Run, json_option, reported
from gradkeel.language import say, shown


@reported
def command(
    run: Run,
    bound: Annotated[
        list[float] | None, typer.Option(metavar="X", help="another bound to weigh up; may be repeated")
    ] = None,
    as_json: Annotated[bool, json_option("the explanation")] = False,
) -> None:
    """Say where a recorded run exploded and how that spread, what hardly learns, and what bounds would do."""
    from gradkeel.explain import explain

    for value in bound or ():
        if not 0 < value < float("inf"):
            told = say("{value} is not a positive finite number", value=value)
            raise typer.BadParameter(shown(told), param_hint="--bound")
    explanation = explain(run, bounds=bound or ())
    if as_json:
        print(json.dumps(explanation.to_json(), allow_nan=False))
        return
    from rich.text import Text

    from gradkeel.cli.screen import console, flowing, sentences, tables
    from gradkeel.explain import words

    here = console()
    for i, (title, lines) in enumerate(words.paragraphs(explanation)):
        here.print(flowing(Text(shown(title), style="bold" if i == 1 else "")))
        here.print(sentences([("  -", line) for line in lines]), end="")
        here.print()
    if explanation.threshold is not None:
        head, rows = words.threshold_table(explanation.threshold)
        for piece in tables(head, rows, width=here.width, left=2):
            here.print(piece)
            here.print()
    # Not wrapped: it must survive being copied.
    command = f"gradkeel report {shlex.quote(explanation.path)}"
    here.print(Text(shown(say("See it: {command}", command=command))), soft_wrap=True)
