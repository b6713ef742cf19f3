"""Pages: self-contained, escaped, and drawn by a browser."""

import re
import sys

import pytest

pytest.importorskip("plotly", reason="pages with figures need the extra report")

from compare_runs import EXPLODING, comparison, run
from gradkeel.compare import Onset
from gradkeel.compare.findings import findings
from gradkeel.compare.page import compare_page
from gradkeel.compare.summary import summarize
from gradkeel.compare.sweep import parse_sweep
from gradkeel.errors import MissingExtraError
from gradkeel.page.figures import Curves, curves
from gradkeel.page.page import Line, Section, Table, page

EVIL = "<script>window.evil = 1</script>\"'&"


@pytest.fixture(scope="module")
def whole():
    """The page of a sweep at several learning rates, with runs that diverged."""
    runs = []
    for seed in range(2):
        for lr in (0.1, 0.2):
            onset = Onset(2, EVIL, 7.5)
            runs.append(run("none", lr, seed, EXPLODING, onset=onset))
            runs += [run(f"norm:{b:g}", lr, seed, (4, 3, b)) for b in (0.1, 1)]
    result = comparison(runs, sweep=parse_sweep("norm:0.1..10"), target=EVIL, arguments=(EVIL,))
    return compare_page(result, summarize(result.runs), findings(result))


def outside_scripts(html):
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_title_words_tables_and_figures_are_in_it():
    figure = curves([Curves("p", [[1, 2]], 0)], x_title="x", y_title="y")
    html = page(
        "Title",
        "subtitle",
        [Line("FOUND", "words"), Line("NEXT", "gradkeel x", command=True)],
        [Section("First", "text", Table(["a", "b"], [["1", "2"]]), figure), Section("Second", figure=figure)],
    )
    plain = outside_scripts(html)
    for part in (
        "<title>Title</title>", "<h1>Title</h1>", "subtitle", "<dt>FOUND</dt><dd>words</dd>",
        "<dd><code>gradkeel x</code></dd>", ">First</a></h2>", "<th>b</th>", "<td>2</td>", 'id="figure-0"',
        'id="figure-1"',
    ):  # fmt: skip
        assert part in plain
    assert 'name="viewport"' in plain
    assert "prefers-color-scheme: dark" in plain


def test_plotlys_script_is_in_it_once_and_only_if_needed():
    figure = curves([Curves("p", [[1, 2]], 0)], x_title="x", y_title="y")
    two = page("t", "s", [], [Section("a", figure=figure), Section("b", figure=figure)])
    assert 3e6 < len(two) < 9e6
    assert len(page("t", "s", [], [Section("a", "text")])) < 1e4


def test_nothing_is_loaded_from_elsewhere(whole):
    plain = outside_scripts(whole)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", plain)
    assert "@import" not in plain
    assert "<script src" not in whole


def test_what_the_user_named_is_escaped(whole):
    plain = re.sub(r"<script>.*?</script>", "", whole.replace("<script>window.evil", "EVIL"), flags=re.DOTALL)
    assert "EVIL" not in plain
    assert "&lt;script&gt;window.evil" in plain


def test_the_compare_page_has_the_four_lines_on_top_and_a_sweep(whole):
    plain = outside_scripts(whole)
    places = [plain.index(f"<dt>{label}</dt>") for label in ("FOUND", "WHY", "CAUTION", "NEXT")]
    assert places == sorted(places)
    assert places[-1] < plain.index(">Result</a></h2>") < plain.index(">Which bounds work</a></h2>")
    assert "<td>works</td>" in plain


def test_without_plotly_there_is_no_page_but_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    result = comparison([run("none"), run("norm:1")])
    with pytest.raises(MissingExtraError, match=r"pip install 'gradkeel\[report\]'"):
        compare_page(result, summarize(result.runs), findings(result))


@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_draws_it_offline_without_errors(browser, whole, tmp_path, width):
    path = tmp_path / "page.html"
    path.write_text(whole, encoding="utf-8")
    browser.set_window_size(width, 900)
    browser.get(path.as_uri())
    assert browser.execute_script("return document.querySelectorAll('.main-svg').length") > 0
    drawn = browser.execute_script("return document.querySelectorAll('.figure .scatterlayer .trace').length")
    assert drawn >= 6
    assert browser.execute_script("return window.evil") is None
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    requests = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
    )
    assert requests == []
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
