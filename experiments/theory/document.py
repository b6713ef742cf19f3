"""The results of the experiments as a table for the terminal, and as the page ``docs/theory.md`` with its pictures."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch

import gradkeel as gk
from gradkeel.policies import Hard, Rescale, Smooth

from experiments.theory.experiment import EXPERIMENTS, Result
from experiments.theory.figures import PICTURES, draw_forms, draw_pictures, draw_three_clips

NOTES = {
    "theory-relation": (
        "R5, R6, R8: local smoothness against gradient norm, a point a step.",
        "The paper finds the relation in language models and in clipped runs with large steps, and not in ordinary "
        "image training; an estimate of (L0, L1) is worth something only where it is there.",
    ),
    "theory-iterations": (
        "R2, R3: iterations to a fixed accuracy, against the largest gradient on the way.",
        "For small M the constants of Theorem 3 are too careful, and plain descent is faster; what clipping removes is "
        "the growth with M.",
    ),
    "theory-rates": (
        "R9, R10: which learning rates work with and without clipping, and the product lr × bound.",
        "When almost every step is clipped, the step's length is lr × bound, and only the product matters.",
    ),
    "theory-fixed-steps": (
        "R18, R19: where a fixed step has its limit, and a function that has none.",
        "",
    ),
    "theory-depth": (
        "R20: the first layer's gradient norm against depth.",
        "tanh damps the growth, and at gain 1 its gradient falls slowly, as a power of the depth, not geometrically.",
    ),
    "theory-cliff": (
        "R21: h ← w sigmoid(h) + b, 50 times; black is a high loss.",
        "The clipped path bounces along the edge, for at the edge the loss jumps; it is never thrown away from it. "
        "The unclipped one comes back in the end, from far away.",
    ),
}


def table(results: Sequence[Result]) -> str:
    """A Markdown table: number, claim, criterion, measured, verdict."""
    rows = ["| # | claim | criterion | measured | verdict |", "|---|---|---|---|---|"]
    rows += [
        f"| {r.id} | {_cell(r.title)} | {_cell(r.criterion)} | {_cell(r.measured)} | {verdict(r)} |"
        for r in results
    ]
    return "\n".join(rows)


def verdict(result: Result) -> str:
    """Whether the criterion was met, in one word."""
    return "met" if result.passed else "MISSED"


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write ``theory.md`` and its pictures under ``images``; what was written.

    Raises:
        MissingExtraError: without matplotlib.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures({result.id: result.series for result in results}, images)
    page = folder / "theory.md"
    page.write_text(document(results, [path.stem for path in pictures]), encoding="utf-8")
    return [page, *pictures, *explaining_pictures(images)]


def document(results: Sequence[Result], pictures: Sequence[str]) -> str:
    """The page as Markdown; ``pictures`` are the names of those that were drawn."""
    introduction = Path(__file__).with_name("introduction.md").read_text(encoding="utf-8")
    parts = [introduction, "## Results\n", table(results) + "\n"]
    for name in PICTURES:
        if name in pictures:
            caption, note = NOTES[name]
            parts.append(f"![{caption}](images/{name}.png)\n\n{caption}\n{note}".rstrip() + "\n")
    parts.append("## How each was measured\n")
    parts += [f"- **{result.id}**: {_setup(result.id)}" for result in results]
    return "\n".join(parts) + "\n"


def explaining_pictures(images: Path) -> list[Path]:
    """The two pictures of understanding.md, computed by the policies themselves; what was written."""
    clips, forms = images / "understanding-three-clips.png", images / "understanding-forms.png"
    vector = (0.8, 89.0)
    policies = {"by value": gk.ClipByValue(1.0), "by norm": gk.ClipByGlobalNorm(1.0)}
    draw_three_clips(clips, vector, {name: clipped(vector, policy) for name, policy in policies.items()})
    norms, one = torch.linspace(0.01, 4, 200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
    shapes = {"hard": Hard(), "smooth": Smooth(), "normalize": Rescale()}
    after = {name: (norms * form.coefficient(norms, one)).tolist() for name, form in shapes.items()}
    draw_forms(forms, norms.tolist(), after)
    return [clips, forms]


def clipped(vector: Sequence[float], policy: gk.policies.Policy) -> list[float]:
    """What a guard with this policy makes of a gradient."""
    parameter = torch.nn.Parameter(torch.zeros(len(vector), dtype=torch.float64))
    parameter.grad = torch.tensor(vector, dtype=torch.float64)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    guard = gk.attach(optimizer, policy)
    optimizer.step()
    guard.detach()
    entries: list[float] = (-parameter.detach()).tolist()
    return entries


def _setup(id_: str) -> str:
    text = inspect.cleandoc(EXPERIMENTS[id_].measure.__doc__ or "")
    return " ".join(text.replace("``", "`").split())


def _cell(text: str) -> str:
    return text.replace("||", "‖").replace("|", "\\|")
