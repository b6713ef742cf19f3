"""``gradkeel doctor``: which code measures gradients here and why, whether it is right, and what is missing."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from gradkeel.cli.common import json_option, reported
from gradkeel.language import count, heard, say, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradkeel.doctor import Check, Diagnosis, Route

Line = tuple[str, str, str]
"""Label, words and the words' style."""

_SWITCHES = {"native": "GRADKEEL_NATIVE", "triton": "GRADKEEL_TRITON"}


@reported
def command(as_json: Annotated[bool, json_option("the diagnosis")] = False) -> None:
    """Say which code measures gradients here and why, and check it against float64; exits with 1 if it is wrong."""
    from gradkeel.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.to_json(), allow_nan=False))
    else:
        _tell(diagnosis)
    if not diagnosis.is_healthy:
        raise typer.Exit(1)


def _tell(diagnosis: "Diagnosis") -> None:
    from rich.text import Text

    from gradkeel.cli.screen import console, sentences

    here = console()
    what = say(
        "with torch {diagnosis.torch}, Python {diagnosis.python}, {diagnosis.platform}", diagnosis=diagnosis
    )
    here.print(Text(f"gradkeel {diagnosis.gradkeel}", style="bold cyan"), Text(shown(what)))
    lines = [
        (f"  {shown(label)} ", Text(shown(words), style=style)) for label, words, style in _lines(diagnosis)
    ]
    here.print(sentences(lines))


def _lines(diagnosis: "Diagnosis") -> "Iterator[Line]":
    routes = [route for route in (diagnosis.cpu, diagnosis.accelerator) if route is not None]
    for label, route in zip(("CPU", "GPU"), routes, strict=False):
        yield label, _path(route), ""
        if route.reason is not None:
            yield _indented(say("why")), heard(route.reason), ""
        if route.remedy is not None:
            yield _indented(say("to do")), heard(route.remedy), "yellow"
    if diagnosis.accelerator is None:
        yield "GPU", say("none that torch {torch} can use", torch=diagnosis.torch), ""
    for route, check in zip(routes, diagnosis.checks, strict=True):
        yield from _verdict(route, check)
    yield say("extras"), _extras(diagnosis.missing), ""


def _path(route: "Route") -> str:
    if route.path == "triton":
        return say("Triton kernels, on {device}", device=route.name)
    if route.path == "foreach":
        return say("torch foreach operations, on {device}", device=route.name)
    threads = count(route.threads or 1, "one thread", "{n} threads")
    if route.path == "torch":
        return say("torch's operations, on {threads}; the native kernels would be faster", threads=threads)
    if route.shares_threads:
        return say(
            "native kernels ({level}), on {threads} of torch's OpenMP", level=route.level, threads=threads
        )
    return say(
        "native kernels ({level}), on one thread: torch's OpenMP library is of another kind than GNU's",
        level=route.level,
    )


def _indented(label: str) -> str:
    return f"  {shown(label)}"


def _verdict(route: "Route", check: "Check") -> "Iterator[Line]":
    label = say("check {device}", device="CPU" if check.device == "cpu" else "GPU")
    if check.is_right:
        off = say("off by {error:.1e} of themselves at most", error=check.norm_error)
        words = say(
            "right: {n} norms {error}, scaling exact, NaN and inf seen",
            n=check.tensors,
            error=off if check.norm_error else say("equal to those in float64"),
        )
        yield label, words, "green"
        return
    faults = check.failure or "; ".join(map(shown, _faults(check)))
    yield label, say("WRONG: {faults}", faults=faults), "bold red"
    if route.path in _SWITCHES:
        remedy = say("set {variable}=off, and report this page as a bug", variable=_SWITCHES[route.path])
    else:
        remedy = say("report this page as a bug")
    yield _indented(say("to do")), remedy, "yellow"


def _faults(check: "Check") -> "Iterator[str]":
    if not check.norm_error <= check.tolerance:
        yield say(
            "a norm is off by {check.norm_error:.1e} of itself, where {check.tolerance:.0e} is allowed",
            check=check,
        )
    if check.wrong_entries:
        yield count(check.wrong_entries, "{n} entry was scaled wrongly", "{n} entries were scaled wrongly")
    if check.unseen:
        yield count(
            check.unseen,
            "{n} of 3 tensors with NaN or inf has a finite norm",
            "{n} of 3 tensors with NaN or inf have a finite norm",
        )


def _extras(missing: dict[str, tuple[str, ...]]) -> str:
    if not missing:
        return say("unknown: gradkeel is imported without being installed")
    there = [extra for extra, lacking in missing.items() if not lacking]
    absent = [extra for extra, lacking in missing.items() if lacking]
    if not absent:
        return say("all installed")
    return say(
        "{known}not {names}: pip install 'gradkeel[{extras}]'",
        known=say("{names} installed; ", names=", ".join(there)) if there else "",
        names=", ".join(absent),
        extras=",".join(absent),
    )
