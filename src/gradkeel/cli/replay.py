"""``gradkeel replay``: what other policies would have done to a recorded run's norms."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradkeel.cli.errors import note_damage, reported
from gradkeel.cli.options import Run
from gradkeel.language import say

if TYPE_CHECKING:
    from gradkeel.explain import Replay


@reported
def command(
    run: Run,
    policy: Annotated[
        list[str],
        typer.Option(metavar="SPEC", help="a policy, such as zclip or global-norm:1.0; may be repeated"),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="print every step's result as JSON, and nothing else, to stdout")
    ] = False,
) -> None:
    """Let policies decide on the norms of a recorded run: open-loop, for under them it would have gone elsewhere."""
    from gradkeel.explain import replay
    from gradkeel.record import Reader

    with Reader(run) as reader:
        replays = [replay(reader, spec) for spec in policy]
        about = say(
            "Open-loop: what each policy would have done to the norms of {run}, recorded under {policy}, over "
            "{steps:,} steps.",
            run=run,
            policy=reader.policy,
            steps=len(reader),
        )
        note_damage(reader)
    if as_json:
        policies = [_plain(result) for result in replays]
        print(json.dumps({"version": 1, "open_loop": True, "run": str(run), "policies": policies}))
        return
    from gradkeel.cli.screen import console, flowing, tables

    here = console()
    here.print(flowing(about), "", sep="\n")
    head = [
        say("policy"), say("clipped"), say("skipped"), say("mean coefficient"), say("differs from live in"),
    ]  # fmt: skip
    for piece in tables(head, [_cells(result) for result in replays], width=here.width):
        here.print(piece, "", sep="\n")
    exact = say("Exact for this trajectory only: under another policy the norms would have been others.")
    here.print(flowing(exact))


def _cells(result: "Replay") -> list[str]:
    from gradkeel.explain.readable import readable

    return [
        say("{policy} (live)", policy=result.policy) if result.is_live else result.policy,
        f"{result.clip_rate:.1%}",
        f"{result.skip_rate:.1%}",
        readable(result.mean_coefficient),
        say("{n:,} steps", n=int(result.differs.sum())),
    ]


def _plain(result: "Replay") -> dict[str, Any]:
    from gradkeel.record.notes import plain

    fields = ("steps", "coefficients", "clipped", "skipped", "bounds", "norms", "clipped_norms", "differs")
    result_plain: dict[str, Any] = plain(
        {
            "policy": result.policy,
            "is_live": result.is_live,
            "clip_rate": result.clip_rate,
            "skip_rate": result.skip_rate,
            "mean_coefficient": result.mean_coefficient,
            **{name: getattr(result, name).tolist() for name in fields},
        }
    )
    return result_plain
