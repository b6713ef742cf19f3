"""``gradkeel doctor``: which code measures gradients here and why, whether it is right, and what is missing."""

from typing import TYPE_CHECKING, Annotated

import typer

from gradkeel.cli.errors import reported

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradkeel.doctor import Check, Diagnosis, Route

Line = tuple[str, str, str]
"""Label, words and the words' style."""


@reported
def command(
    as_json: Annotated[
        bool, typer.Option("--json", help="print the diagnosis as JSON, and nothing else, to stdout")
    ] = False,
) -> None:
    """Say which code measures gradients here and why, and check it against float64; exits with 1 if it is wrong."""
    from gradkeel.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        import json

        print(json.dumps(diagnosis.to_json(), allow_nan=False))
    else:
        _tell(diagnosis)
    if not diagnosis.is_healthy:
        raise typer.Exit(1)


def _tell(diagnosis: "Diagnosis") -> None:
    from rich.text import Text

    from gradkeel.cli.screen import console, sentences

    here = console()
    here.print(
        Text(f"gradkeel {diagnosis.gradkeel}", style="bold cyan"),
        Text(f"with torch {diagnosis.torch}, Python {diagnosis.python}, {diagnosis.platform}"),
    )
    lines = [(f"  {label} ", Text(words, style=style)) for label, words, style in _lines(diagnosis)]
    here.print(sentences(lines))


def _lines(diagnosis: "Diagnosis") -> "Iterator[Line]":
    yield "CPU", _cpu(diagnosis.cpu), ""
    yield from _why(diagnosis.cpu)
    if diagnosis.accelerator is None:
        yield "GPU", f"none that torch {diagnosis.torch} can use", ""
    else:
        yield "GPU", _gpu(diagnosis.accelerator), ""
        yield from _why(diagnosis.accelerator)
    for route, check in zip((diagnosis.cpu, diagnosis.accelerator), diagnosis.checks, strict=False):
        assert route is not None, "what has been checked is there"
        yield from _verdict(route, check)
    yield "extras", _extras(diagnosis.missing), ""


def _cpu(route: "Route") -> str:
    threads = "one thread" if route.threads == 1 else f"{route.threads} threads"
    if route.path == "torch":
        return f"torch's operations, on {threads}; the native kernels would be faster"
    if route.shares_threads:
        return f"native kernels ({route.level}), on {threads} of torch's OpenMP"
    return (
        f"native kernels ({route.level}), on one thread: torch's OpenMP library is of another kind than GNU's"
    )


def _gpu(route: "Route") -> str:
    return f"{'Triton kernels' if route.path == 'triton' else 'torch foreach operations'}, on {route.name}"


def _why(route: "Route") -> "Iterator[Line]":
    if route.reason is not None:
        yield "  why", route.reason, ""
    if route.remedy is not None:
        yield "  to do", route.remedy, "yellow"


def _verdict(route: "Route", check: "Check") -> "Iterator[Line]":
    label = f"check {'CPU' if check.device == 'cpu' else 'GPU'}"
    if check.is_right:
        error = (
            f"off by {check.norm_error:.1e} of themselves at most"
            if check.norm_error
            else "equal to those in float64"
        )
        words = f"right: {check.tensors} norms {error}, scaling exact, NaN and inf seen"
        yield label, words, "green"
        return
    yield label, f"WRONG: {check.failure or '; '.join(_faults(check))}", "bold red"
    instead = {"native": "set GRADKEEL_NATIVE=off, and ", "triton": "set GRADKEEL_TRITON=off, and "}
    yield "  to do", f"{instead.get(route.path, '')}report this page as a bug", "yellow"


def _faults(check: "Check") -> "Iterator[str]":
    if not check.norm_error <= check.tolerance:
        yield f"a norm is off by {check.norm_error:.1e} of itself, where {check.tolerance:.0e} is allowed"
    if check.wrong_entries:
        yield f"{check.wrong_entries} entries were scaled wrongly"
    if check.unseen:
        yield f"{check.unseen} of 3 tensors with NaN or inf have a finite norm"


def _extras(missing: dict[str, tuple[str, ...]]) -> str:
    if not missing:
        return "unknown: gradkeel is imported without being installed"
    there = [extra for extra, lacking in missing.items() if not lacking]
    absent = [extra for extra, lacking in missing.items() if lacking]
    if not absent:
        return "all installed"
    known = f"{', '.join(there)} installed; " if there else ""
    return f"{known}not {', '.join(absent)}: pip install 'gradkeel[{','.join(absent)}]'"
