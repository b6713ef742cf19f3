"""``gradkeel policies``: every policy, or one in full, as its own class describes it."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from gradkeel.cli.common import json_option, reported
from gradkeel.language import heard, say, shown

if TYPE_CHECKING:
    from rich.text import Text

    from gradkeel.policies import PolicyDescription


@reported
def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="one policy, such as zclip, to be told in full")
    ] = None,
    as_json: Annotated[bool, json_option("the descriptions")] = False,
) -> None:
    """List every policy: name, formula, parameters with defaults, cost and source; or tell one in full."""
    from gradkeel.policies import descriptions

    chosen = descriptions() if name is None else (_find(name),)
    if as_json:
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
    from gradkeel.cli.screen import console, flowing, sentences

    here = console()
    for one in chosen:
        here.print(flowing(_heading(one)))
        here.print(sentences(_facts(one), label=9))
        here.print()
    more = say("gradkeel policies NAME tells one in full; POLICY,exclude=*.bias leaves parameters out")
    nothing = say("clips nothing: gradients are measured and reported only")
    here.print(sentences([("  none", nothing), (_label(say("more")), more)], label=9))


def _tell(one: "PolicyDescription") -> None:
    from gradkeel.cli.screen import console, flowing, sentences

    here = console()
    here.print(flowing(_heading(one)))
    for paragraph in one.details.split("\n\n"):
        here.print(flowing(_text(heard(paragraph))))
    here.print()
    formula, spec, cost, source = _facts(one)
    parameters = []
    for parameter in one.parameters:
        default = say("default {value}", value=parameter.default) if parameter.default else say("required")
        words = say("({default}) {meaning}", default=default, meaning=heard(parameter.meaning))
        parameters.append((f"    {parameter.name}", _text(words)))
    python = ("  python", f"gradkeel.policies.{one.class_name}")
    example = (_label(say("try")), f"gradkeel compare --policy none --policy {_example(one)}")
    here.print(sentences([formula, spec, python, *parameters, cost, source, example], label=9))


def _facts(one: "PolicyDescription") -> list[tuple[str, str]]:
    """What the list of policies says of each."""
    return [
        (_label(say("formula")), _text(heard(one.formula))),
        (_label(say("spec")), _text(heard(one.spec))),
        (_label(say("cost")), _text(heard(one.cost))),
        (_label(say("source")), _text(one.source)),
    ]


def _label(name: str) -> str:
    return f"  {shown(name)}"


def _example(description: "PolicyDescription") -> str:
    """A spec that works when pasted: the one that the description gives, or bounds of 1."""
    _, given, example = description.spec.partition("such as ")
    if given:
        return example
    required = ["1.0" for parameter in description.parameters if parameter.default is None]
    return f"{description.name}:{','.join(required)}" if required else description.name


def _heading(description: "PolicyDescription") -> "Text":
    from rich.text import Text

    return Text.assemble((description.name, "bold cyan"), " ", _text(heard(description.summary)))


def _text(words: str) -> str:
    """Docstring prose, in the reader's language, without its markup: ``code`` and `names` lose their quotes."""
    return shown(words).replace("``", "").replace("`", "")
