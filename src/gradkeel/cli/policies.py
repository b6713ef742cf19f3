"""``gradkeel policies``: every policy, or one in full, as its own class describes it."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gradkeel.cli.errors import reported

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from gradkeel.policies import PolicyDescription

WIDTH = 110  # of what goes to no terminal


@reported
def command(
    name: Annotated[str | None, typer.Argument(help="one policy, such as zclip, to be told in full")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the descriptions as JSON, and nothing else, to stdout")
    ] = False,
) -> None:
    """List every policy: name, formula, parameters with defaults, cost and source; or tell one in full."""
    from gradkeel.policies import descriptions

    chosen = descriptions() if name is None else (_find(name),)
    if as_json:
        import dataclasses
        import json

        print(json.dumps([dataclasses.asdict(description) for description in chosen], ensure_ascii=False))
    elif name is None:
        _list(chosen)
    else:
        _tell(chosen[0])


def _find(name: str) -> "PolicyDescription":
    """The policy of this name, or the one that a whole spec is of."""
    from gradkeel.policies import descriptions, parse

    known = {description.name: description for description in descriptions()}
    if name not in known:
        parse(name)  # says which names there are
        name = "chain" if "+" in name else name.partition(":")[0]
    return known[name]


def _list(chosen: "tuple[PolicyDescription, ...]") -> None:
    console = _console()
    for description in chosen:
        _heading(console, description)
        _line(console, "formula", description.formula)
        _line(console, "spec", description.spec)
        _line(console, "cost", description.cost)
        _line(console, "source", description.source)
        console.print()
    _line(console, "none", "clips nothing: gradients are measured and reported only")
    _line(
        console,
        "more",
        "gradkeel policies NAME tells one in full; POLICY,exclude=*.bias leaves parameters out",
    )


def _tell(description: "PolicyDescription") -> None:
    console = _console()
    _heading(console, description)
    for paragraph in description.details.split("\n\n"):
        console.print(_text(paragraph))
    console.print()
    _line(console, "formula", description.formula)
    _line(console, "spec", description.spec)
    _line(console, "python", f"gradkeel.policies.{description.class_name}")
    for parameter in description.parameters:
        default = "required" if parameter.default is None else f"default {parameter.default}"
        _line(console, f"  {parameter.name}", f"({default}) {parameter.meaning}", width=16)
    _line(console, "cost", description.cost)
    _line(console, "source", description.source)
    _line(console, "try", f"gradkeel compare --policy none --policy {_example(description)}")


def _example(description: "PolicyDescription") -> str:
    """A spec that works when pasted: the one that the description gives, or bounds of 1."""
    _, given, example = description.spec.partition("such as ")
    if given:
        return example
    required = ["1.0" for parameter in description.parameters if parameter.default is None]
    return f"{description.name}:{','.join(required)}" if required else description.name


def _heading(console: "Console", description: "PolicyDescription") -> None:
    from rich.text import Text

    console.print(Text(description.name, style="bold cyan"), _text(description.summary))


def _line(console: "Console", label: str, text: str, *, width: int = 9) -> None:
    """Label and text, the text's further lines indented as its first."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(min_width=width, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(f"  {label}" if not label.startswith(" ") else label, style="dim"), _text(text))
    console.print(grid)


def _text(words: str) -> "Text":
    """Docstring prose without its markup: ``code`` and `names` lose their quotes."""
    from rich.text import Text

    return Text(words.replace("``", "").replace("`", ""))


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
