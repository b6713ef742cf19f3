"""``gradkeel bench``: how long clipping takes here, beside torch's, on the user's own model's shapes."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gradkeel.cli.common import AsJson, reported
from gradkeel.language import count, heard, say, shown

if TYPE_CHECKING:
    from gradkeel.bench import Table


@reported
def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="gpt2-small, resnet50, tiny-tensors, compare's tasks, or yours: mypkg.mymodule:make_model",
        ),
    ] = "gpt2-small",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(metavar="DTYPE", help="of parameters and gradients: float32, bfloat16 or float16"),
    ] = "float32",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...")] = "cpu",
    rounds: Annotated[int, typer.Option(metavar="N", help="how often everything is timed", min=5)] = 30,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="no further rounds of a table after so long", min=0)
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Time clipping beside torch's clip_grad_norm_, interleaved, in one process; takes 10 times the model's memory."""
    import torch

    from gradkeel.bench import Gradients
    from gradkeel.bench.machine import machine
    from gradkeel.bench.short import bench, document, shapes_of

    try:
        where = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        told = say("{device!r} cannot be used: {reason}", device=device, reason=reason)
        raise typer.BadParameter(shown(told), param_hint="--device") from None
    if where.type == "meta":
        told = say("'meta' cannot be used: it has no numbers")
        raise typer.BadParameter(shown(told), param_hint="--device")
    gradients = Gradients(shapes_of(model), dtype=getattr(torch, dtype), device=where)
    here = machine(where)
    if not as_json:
        tensors = count(len(gradients.true), "{n:,} tensor", "{n:,} tensors")
        heading = say(
            "{model}: {entries} in {tensors}, {dtype}",
            model=model,
            entries=count(gradients.entries, "{n:,} entry", "{n:,} entries"),
            tensors=tensors,
            dtype=dtype,
        )
        print(shown(heading), shown(here), sep="\n", flush=True)
    tables = bench(gradients, rounds=rounds, seconds=seconds)
    if as_json:
        print(json.dumps(document(model, here, gradients, tables), allow_nan=False))
        return
    _show(tables)


def _show(found: "Sequence[Table]") -> None:
    from rich.text import Text

    from gradkeel.bench.stopwatch import AGAIN
    from gradkeel.bench.workload import READ
    from gradkeel.cli.screen import console, tables

    here = console()
    head = ["", "ms", say("x torch"), "", say("x one read"), say("error")]
    for one in found:
        race = one.race
        rows = list[list[str | Text]]()
        for name in race.seconds:
            ratio, title = race.ratio(name), heard(name.removesuffix(AGAIN))
            if name.endswith(AGAIN):
                title = say("{name}, again", name=title)
            span = say("{low} to {high}", low=f"{ratio.low:.2f}", high=f"{ratio.high:.2f}")
            rows.append(
                [
                    Text(shown(title), style="dim" if name.endswith(AGAIN) else ""),
                    f"{race.time(name).median * 1e3:.3g}",
                    f"{ratio.median:.2f}",
                    Text(shown(span), style="dim"),
                    f"{race.ratio(name, READ).median:.2f}" if READ in race.seconds else "",
                    f"{race.errors[name]:.0e}" if name in race.errors else "",
                ]
            )
        for piece in tables(head, rows, width=here.width, title=heard(one.title)):
            here.print(piece)
    control = [one.race.control.median for one in found]
    worst = max(*control, *(1 / ratio for ratio in control)) - 1
    words = say(
        "torch against itself is off by {worst:.0%} at most, so differences below that mean nothing.",
        worst=worst,
    )
    here.print(Text(shown(words), style="yellow" if worst > 0.05 else "dim"))
    if worst > 0.05:
        busy = say("Something else is running here: try again when the machine is idle.")
        here.print(Text(shown(busy), style="yellow"))
