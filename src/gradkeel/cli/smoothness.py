"""``gradkeel smoothness``: train with the probe, say whether smoothness grows with the gradient norm, and draw it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gradkeel.cli.common import TASK, AsJson, reported
from gradkeel.language import heard, say, shown


@reported
def command(
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASK)] = "char-lstm",
    policy: Annotated[
        str | None, typer.Option(metavar="SPEC", help="a policy, such as none or global-norm:0.25")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="X", help="learning rate (default: the task's highest)", min=0)
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="optimizer steps", min=1)] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="of weights and batches")] = 0,
    every: Annotated[int, typer.Option(metavar="N", help="measure one step in so many", min=1)] = 2,
    points: Annotated[int, typer.Option(metavar="N", help="gradients along each step measured", min=1)] = 4,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="directory for the page, pictures and JSON")
    ] = Path("gradkeel-smoothness"),
    as_json: AsJson = False,
) -> None:
    """Train a task, measure local smoothness along its steps, and say which bound on the gradient norm follows."""
    from gradkeel.compare.smoothness import default_policy, document, probed_run, smoothness_page, words
    from gradkeel.compare.task import load_task
    from gradkeel.errors import MissingExtraError
    from gradkeel.explain.smoothness.figures import save_smoothness

    loaded = load_task(task)
    run = probed_run(
        loaded,
        policy=policy or default_policy(loaded),
        lr=max(loaded.learning_rates) if lr is None else lr,
        seed=seed,
        steps=steps or loaded.steps,
        every=every,
        points=points,
    )
    text = json.dumps(document(run), allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "smoothness.json"]
    written[0].write_text(text + "\n", encoding="utf-8")
    try:
        (out / "smoothness.html").write_text(smoothness_page(run), encoding="utf-8")
        written.append(out / "smoothness.html")
        for path in (out / "smoothness.png", out / "smoothness.svg"):
            save_smoothness(path, run.measurements, run.fit, title=f"{run.task}, {run.policy}, lr {run.lr:g}")
            written.append(path)
    except MissingExtraError as error:
        print(shown(say("Not everything was written: {error}", error=heard(str(error)))), file=sys.stderr)
    if as_json:
        print(text)
        return
    from gradkeel.cli.screen import console, sentences

    console().print(
        sentences([(f"{shown(line.label)} ", line.text) for line in words(run)], style="bold cyan")
    )
    print(shown(say("Written: {paths}", paths=", ".join(map(str, written)))))
