"""The documentation is true: links lead somewhere, every public name is described, and the README's code runs."""

import importlib
import inspect
import math
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
        "loss_and_count": loss_and_count,
    }


def test_the_readme_loops_run(names):
    exec(readme_code("gk.attach"), names)
    assert names["guard"].report.step == 3
    exec(readme_code("gk.Accumulator"), names)
    assert names["guard"].report.step == 4


def test_the_readme_prints_what_its_loop_prints(names, capsys):
    torch.manual_seed(0)
    names["model"] = nn.Linear(3, 2)
    sound = [(10 * torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(3)]
    names["loader"] = [*sound, (torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.int64))]
    with pytest.warns(gk.SkippedStepWarning):
        exec(readme_code("gk.attach"), names)
    said = re.findall(r"^StepReport.*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(said) == 2
    assert capsys.readouterr().out.splitlines()[2:] == said


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 500


def navigation():
    """The pages of mkdocs.yml's two trees, in their order."""
    english, chinese = (
        (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("  - English:\n")[1].split("  - 中文:\n")
    )
    return [re.findall(r"[\w/-]+\.md$", tree, flags=re.MULTILINE) for tree in (english, chinese)]


def test_the_chinese_navigation_is_the_english_one():
    english, chinese = navigation()
    assert chinese == [f"zh/{page}" for page in english]


# Pages that lie in the repository's root, and their Chinese versions.
IN_THE_ROOT = {"index.md": "README", "contributing.md": "CONTRIBUTING"}


# The changelog is English in both.
@pytest.mark.parametrize("name", [name for name in navigation()[0] if name != "changelog.md"])
def test_the_chinese_page_says_what_the_english_one_says(name):
    root = IN_THE_ROOT.get(name)
    english, chinese = (
        (ROOT / path).read_text(encoding="utf-8")
        for path in ((f"{root}.md", f"{root}.zh.md") if root else (f"docs/{name}", f"docs/zh/{name}"))
    )
    for begin, end in re.findall(r"^(<!-- .* -->)\n(<!-- .* -->)$", chinese, flags=re.MULTILINE):
        before, written, after = re.split(
            f"{begin}|{end}", english
        )  # the site fills this in from the English page
        assert written.strip()
        english = f"{before}{begin}\n{end}{after}"
    own = f"{root}.md" if root else name.split("/")[-1]  # the two pages of a pair may link to each other
    assert parts(chinese, own) == parts(english, own)


def parts(text, own):
    """What a translation keeps: code without comments, tables' shapes, levels of headings, what `:::` documents; and,
    in whatever order, code in the text, figures, and which files are linked or shown.
    """
    code = re.findall(r"^(```.*?^```|    .*?)$", text, flags=re.DOTALL | re.MULTILINE)
    code = [re.sub(r" +#.*", "", block) for block in code]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    rows = [line.count(" |") for line in prose.splitlines() if line.startswith("|")]
    headings = re.findall(r"^#+(?= )", prose, flags=re.MULTILINE)
    documented = re.findall(r"^:::.*$", prose, flags=re.MULTILINE)
    links = {link.split("/")[-1].replace(".zh", "") for link in re.findall(r"\]\(([^)#\s]+)", prose)}
    spans = set(re.findall(r"`[^`\n]+`", prose))
    plain = re.sub(r"`[^`\n]+`|\]\([^)]*\)|<!--.*-->", "", prose)
    figures = {figure.replace(",", "") for figure in re.findall(r"\d[\d,.]*\d|\d", plain)}
    return code, rows, headings, documented, links - {own}, spans, figures


def test_the_api_reference_has_every_public_name():
    pages = "\n".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    shown = set()
    for name in re.findall(r"^::: gradkeel\.(?:attaching\.)?(\S+)$", pages, flags=re.MULTILINE):
        value = getattr(gk, name, None) or importlib.import_module(f"gradkeel.{name}")
        shown |= {
            name,
            *(vars(value) if inspect.ismodule(value) else ()),
        }  # a module's page shows its members
    assert set(gk.__all__) <= shown


def test_the_figures_of_tested_are_those_of_the_pages_it_links_to():
    rows = [
        line
        for line in (ROOT / "docs/tested.md").read_text().splitlines()
        if ".md" in line and line[0] == "|"
    ]
    traps = (ROOT / "docs/comparison.md").read_text().split("<!-- traps:end -->")[0]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in re.findall(r"^\| \d.*$", traps, re.MULTILINE)
    ]
    fallen = [sum(cell[column].startswith("**falls in**") for cell in cells) for column in (1, 2)]
    assert [int(n) for n in re.findall(r"(\d+) traps.*into (\d+) \(.*into (\d+) \|", rows[0])[0]] == [
        len(cells),
        *fallen,
    ]
    for row in rows[1:]:
        _, figures, where = (cell.strip() for cell in row.strip("|").split("|"))
        text = "".join((ROOT / "docs" / name).read_text() for name in re.findall(r"\((\w+\.md)", where))
        counted = {str(len(re.findall(r"^\| R\d", text, re.MULTILINE))), "16"}  # claims; layouts, below
        missing = [
            n for n in re.findall(r"[\d][\d.,e-]*\d|\d", figures) if n not in text and n not in counted
        ]
        assert missing == [], row
    layouts = (ROOT / "docs/comparison.md").read_text().split("<!-- layouts:begin -->")[1]
    assert len(re.findall(r"^\| (?!parameters)[^-].*$", layouts, re.MULTILINE)) == 16
