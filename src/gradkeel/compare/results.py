"""A comparison as the document that ``compare.json`` holds; docs/compare.md describes it."""

from dataclasses import asdict
from typing import Any

from gradkeel.compare.findings import findings
from gradkeel.compare.plan import Comparison
from gradkeel.compare.run import Run
from gradkeel.compare.summary import summarize
from gradkeel.compare.sweep import sweep_points
from gradkeel.record.notes import plain


def document(comparison: Comparison) -> dict[str, Any]:
    """Strings, numbers, lists and dicts alone; non-finite numbers are None."""
    plan, runs = comparison.plan, comparison.runs
    result = {
        "task": plan.target,
        "steps": plan.steps,
        "accumulate": plan.accumulate,
        "planned_runs": len(plan.trials),
        "interrupted": comparison.interrupted,
        "runs": [_run(run) for run in runs],
        "summary": [asdict(row) for row in summarize(runs, plan.target_loss)],
        "findings": asdict(findings(comparison)) if runs else None,
    }
    if plan.sweep is not None:
        result["sweep"] = [asdict(point) for point in sweep_points(plan.sweep, runs)]
    finite: dict[str, Any] = plain(result)
    return finite


def _run(run: Run) -> dict[str, Any]:
    onset = None if run.onset is None else asdict(run.onset)
    told = vars(run) | {"final_loss": run.final_loss, "onset": onset}
    del told["optimizer"]
    return told
