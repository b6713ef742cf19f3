"""What MkDocs is told beside mkdocs.yml: pages that lie outside of docs/, and a navigation for each language."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
# Page of the site: file of the repository.
OUTSIDE = {
    "index.md": "README.md",
    "zh/index.md": "README.zh.md",
    "changelog.md": "CHANGELOG.md",
    "zh/changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "zh/contributing.md": "CONTRIBUTING.zh.md",
}
trees: dict[str, Navigation] = {}


def on_config(config: MkDocsConfig) -> None:
    """Put the version beside the name, from the only place that holds it."""
    version = re.search(
        r"__version__ = \"(.+)\"", (ROOT / "src/gradkeel/version.py").read_text(encoding="utf-8")
    )
    assert version
    config.site_name = f"gradkeel {version[1]}"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the README and its like as pages, and the examples, to which pages link, as they are."""
    for page, source in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        up = "../" * page.count("/")
        for other, file in OUTSIDE.items():
            text = text.replace(f"]({file}", f"]({up}{other}")
        files.append(File.generated(config, page, content=text.replace("](docs/", f"]({up}")))
    for example in sorted(ROOT.glob("examples/*.py")):
        content = example.read_text(encoding="utf-8")
        files.append(File.generated(config, f"examples/{example.name}.txt", content=content))


def with_tables(chinese: str, english: str) -> str:
    """Fill in what a command wrote between two marks of the English page, where the Chinese one has the marks alone."""

    def between(marks: re.Match[str]) -> str:
        begin, end = marks.groups()
        tables = english.partition(begin)[2].partition(end)[0]
        return begin + re.sub(r"\]\((?=images/|data/)", "](../", tables) + end

    return re.sub(r"^(<!-- .* -->)\n(<!-- .* -->)$", between, chinese, flags=re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in the tables of Chinese pages; point links to examples at their copies, which a browser shows."""
    english = ROOT / "docs" / page.file.src_uri.removeprefix("zh/")
    if language_of(page) == "zh" and english.exists():
        markdown = with_tables(markdown, english.read_text(encoding="utf-8"))
    # Sentences stand on lines of their own, between which a browser puts a space, which Chinese does not have.
    markdown = re.sub(
        r"(?<=[\u3001\u3002\uff01-\uff1f])\n {0,3}(?=\S)(?!```|[-|#>!<:]|\* |\d+\.)", "", markdown
    )
    return re.sub(r"\]\((?:\.\./)?((?:\.\./)*examples/\w+\.py)\)", r"](\1.txt)", markdown)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Take the navigation apart into one tree for each language."""
    for language, section in zip(("en", "zh"), nav.items, strict=True):
        pages = [page for page in nav.pages if language_of(page) == language]
        for item in section.children or []:
            item.parent = None
        pages[0].previous_page = pages[-1].next_page = None
        trees[language] = Navigation(section.children or [], pages)
        trees[language].homepage = pages[0]


def language_of(page: Page) -> str:
    """Return the language that a page is written in, as its folder tells."""
    return "zh" if page.file.src_uri.startswith("zh/") else "en"


def on_page_context(
    context: dict[str, Any], page: Page, config: MkDocsConfig, nav: Navigation
) -> dict[str, Any]:
    """Show the page the tree and the words of its language, and the way to the same page in the other one."""
    language = language_of(page)
    there = {other.file.src_uri: other.url for tree in trees.values() for other in tree.pages}
    uri = page.file.src_uri.removeprefix("zh/")
    config.theme["language"] = language
    config.extra["alternate"] = [
        {"name": name, "lang": code, "link": there.get(prefix + uri, there[prefix + "index.md"])}
        for name, code, prefix in (("English", "en", ""), ("中文", "zh", "zh/"))
    ]
    context["nav"] = trees[language]
    return context
