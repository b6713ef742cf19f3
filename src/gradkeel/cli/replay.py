"""``gradkeel replay``: what other policies would have done to a recorded run's norms."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from gradkeel.cli.common import Run, json_option, note_damage, reported
from gradkeel.language import count, readable, say


@reported
def command(
    run: Run,
    policy: Annotated[
        list[str],
        typer.Option(metavar="SPEC", help="a policy, such as zclip or global-norm:1.0; may be repeated"),
    ],
    as_json: Annotated[bool, json_option("every step's result")] = False,
) -> None:
    """Let policies decide on the norms of a recorded run: open-loop, for under them it would have gone elsewhere."""
    from gradkeel.explain import replay
    from gradkeel.record import Reader
    from gradkeel.record.notes import plain

    with Reader(run) as reader:
        replays = [replay(reader, spec) for spec in policy]
        about = say(
            "Open-loop: what each policy would have done to the norms of {run}, recorded under {policy}, over "
            "{steps}.",
            run=run,
            policy=reader.policy,
            steps=count(len(reader), "{n:,} step", "{n:,} steps"),
        )
        note_damage(reader.damage)
    if as_json:
        rates = ("clip_rate", "skip_rate", "mean_coefficient")
        policies = [asdict(result) | {name: getattr(result, name) for name in rates} for result in replays]
        print(json.dumps({"version": 1, "open_loop": True, "run": str(run), "policies": plain(policies)}))
        return
    from gradkeel.cli.screen import console, flowing, tables

    here = console()
    here.print(flowing(about), "", sep="\n")
    head = [
        say("policy"), say("clipped"), say("skipped"), say("mean coefficient"), say("differs from live in"),
    ]  # fmt: skip
    rows = [
        [
            say("{policy} (live)", policy=result.policy) if result.is_live else result.policy,
            f"{result.clip_rate:.1%}",
            f"{result.skip_rate:.1%}",
            readable(result.mean_coefficient),
            count(int(result.differs.sum()), "{n:,} step", "{n:,} steps"),
        ]
        for result in replays
    ]
    for piece in tables(head, rows, width=here.width):
        here.print(piece, "", sep="\n")
    exact = say("Exact for this trajectory only: under another policy the norms would have been others.")
    here.print(flowing(exact))
