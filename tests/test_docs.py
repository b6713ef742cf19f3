"""The documentation is true: links lead somewhere, every public name is described, and the README's code runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gradkeel as gk

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def test_every_public_name_is_on_the_api_page():
    words = set(re.findall(r"\w+", (ROOT / "docs/api.md").read_text()))
    assert set(gk.__all__) <= words


def readme_code(start):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return next(block for block in blocks if start in block)


class Scheduler:
    steps = 0

    def step(self):
        self.steps += 1


@pytest.fixture
def names():
    model = nn.Linear(3, 2)
    batches = [(torch.randn(n, 3), torch.randint(2, (n,))) for n in (4, 2, 5)]

    def loss_and_count(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    return {
        "torch": torch,
        "model": model,
        "loader": batches,
        "criterion": nn.CrossEntropyLoss(),
        "scheduler": Scheduler(),
        "loss_and_count": loss_and_count,
    }


def test_the_readme_loops_run(names):
    code = readme_code("gk.attach")
    exec(code, names)
    assert names["guard"].report.step == names["scheduler"].steps == 3
    exec(readme_code("gk.Accumulator"), names)
    assert names["guard"].report.step == 4
