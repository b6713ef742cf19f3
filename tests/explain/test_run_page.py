"""The page of a recorded run: what it says, and how a real browser shows it."""

import functools
import http.client
import math
import re
import shutil
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("plotly", reason="pages with figures need the extra report")

import gradkeel as gk
from gradkeel.explain.run_page import COLUMNS, _scalar, _updates, run_page
from gradkeel.explain.runs_page import runs_page
from gradkeel.explain.watch import address, make_server
from gradkeel.record import Reader, Recorder
from scripted import scripted_run

EVIL = "<img src=x onerror='evil=1'>"
FAULT, LAYER = 90, "layers.2.weight"


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)]
        )
        self.add_module(EVIL + "</script>", nn.LayerNorm(16))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](self._modules[EVIL + "</script>"](x))


def train(path, steps=150, spoil=()):
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.7), model=model, record=path)
    layer = model.get_parameter(LAYER)
    with pytest.warns(gk.GradkeelWarning) if spoil else torch.no_grad(), torch.enable_grad():
        for step in range(1, steps + 1):
            loss = nn.functional.cross_entropy(model(torch.randn(32, 6)), torch.randint(2, (32,)))
            loss.backward()
            if step == FAULT:
                layer.grad = layer.grad * 1000
            if step in spoil:
                layer.grad = layer.grad * math.nan
            guard.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
    guard.detach()
    return path


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    with Reader(train(tmp_path_factory.mktemp("page") / "run.keel", spoil={120})) as run:
        return run_page(run)


@pytest.fixture(scope="module")
def page(browser, html, tmp_path_factory):
    """The page in a browser that keeps its errors."""
    path = tmp_path_factory.mktemp("browser") / "run.html"
    path.write_text(html, encoding="utf-8")
    browser.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument",
        {"source": "window.problems = []; window.onerror = (m) => window.problems.push(m);"
                   "const e = console.error; console.error = (...a) => { window.problems.push(a.join()); e(...a); };"},
    )  # fmt: skip
    browser.set_window_size(1280, 900)
    browser.get(path.as_uri())
    return browser


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The record of a run of so many steps, which nobody changes."""
    folder = tmp_path_factory.mktemp("recorded")

    @functools.cache
    def of(steps, name="run"):
        return train(folder / f"{name}.keel", steps=steps)

    return of


def outside_scripts(html):
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_the_words_are_on_top(html):
    plain = outside_scripts(html)
    assert f"The gradients spiked at step {FAULT}, first in {LAYER}; they came back afterwards." in plain
    assert plain.index("FOUND") < plain.index("Gradient norm") < plain.index("Every parameter")
    for anchor in ("gradient-norm", "every-parameter", "loss", "coefficient", "distribution-and-bounds"):
        assert f'<section id="{anchor}"><h2><a href="#{anchor}">' in plain
    assert "1 skipped" in plain


def test_it_needs_nothing_from_outside(html):
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']+""", outside_scripts(html))


def test_names_are_escaped(html):
    assert EVIL not in html
    assert "&lt;img" in html


def test_a_run_without_anything_to_tell(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    guard = gk.attach(
        torch.optim.SGD(model.parameters(), lr=0.1), None, model=model, record=tmp_path / "run.keel"
    )
    model(torch.randn(4, 2)).sum().backward()
    guard.optimizer.step()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        html = run_page(run)
    assert "No explosion was found." in html
    assert "No loss was recorded; this line, before optimizer.step(), gives one: guard.log(loss=loss)" in html
    assert 'id="coefficient"' not in html  # nothing was clipped


def test_a_long_run_is_drawn_in_buckets(tmp_path):
    from gradkeel.guard.report import SelectionReport, StepReport
    from gradkeel.norms import Decision, GradientNorms

    names = tuple(f"layer.{i}" for i in range(4))
    recorder = Recorder(tmp_path / "run.keel")
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 3001):
        norms = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
        measured = GradientNorms(names, norms, torch.linalg.vector_norm(norms), 2.0, (0,) * 4, step, (1,) * 4)
        recorder.record(
            StepReport(step, (SelectionReport("main", "None", measured, Decision(), (True,) * 4),))
        )
    recorder.close()
    with Reader(tmp_path / "run.keel") as run:
        html = run_page(run)
    assert f"Each point stands for {3000 // COLUMNS} steps" in html
    assert html.count("steps 1 to 5:") == 1


def test_it_renders_without_errors(page):
    assert page.execute_script("return window.problems") == []
    figures = page.execute_script("return document.querySelectorAll('.figure .main-svg').length")
    assert figures >= 5
    assert page.execute_script("return window.evil === undefined && document.images.length === 0")


def test_the_planted_layer_is_the_hottest_row(page):
    row, column = page.execute_script(
        """
        const map = [...document.querySelectorAll('.js-plotly-plot')].flatMap(f => f.data)
          .find(t => t.type === 'heatmap' && t.y.length > 4);
        let best = [0, 0];
        map.z.forEach((line, i) => line.forEach((z, j) => {
          if (z !== null && z > (map.z[best[0]][best[1]] ?? -Infinity)) best = [i, j];
        }));
        return [map.y[best[0]], map.x[best[1]]];
        """
    )
    assert (row, column) == (LAYER, FAULT)


def test_hover_tells_the_exact_value(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    section = page.find_element(By.ID, "every-parameter")
    page.execute_script("arguments[0].scrollIntoView()", section)
    plot = section.find_element(By.CSS_SELECTOR, ".nsewdrag")
    ActionChains(page).move_to_element(plot).perform()
    words = page.execute_async_script(
        """
        const [root, done] = arguments;
        const look = (n) => {
          const text = root.querySelector('.hoverlayer .hovertext');
          if (text || n === 0) done(text ? text.textContent : ''); else setTimeout(() => look(n - 1), 100);
        };
        look(30);
        """,
        section,
    )
    assert re.search(r"layers\.\d\.(weight|bias).*step \d+: [0-9.e+-]+", words)


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    page.refresh()
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    widths = page.execute_script("return [...document.querySelectorAll('.main-svg')].map(s => s.clientWidth)")
    assert max(widths) <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 29)")])
def test_light_and_dark(page, scheme, paper):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    colors = page.execute_script(
        "const c = (s, k) => getComputedStyle(document.querySelector(s))[k];"
        "return [c('body', 'backgroundColor'), c('body', 'color'), c('.xtick text', 'fill')]"
    )
    assert colors[0] == paper
    assert colors[1] == colors[2]  # what plotly writes follows the page
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_watching_a_run(tmp_path):
    path = tmp_path / "run.keel"
    server = make_server(path)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.serve_forever, 0.05)
        try:
            url = address(server)
            assert url.startswith("http://127.0.0.1:")
            assert "Nothing recorded yet" in fetch(url)
            assert fetch(url + "version") == "0"
            train(path, steps=30)
            version = fetch(url + "version")
            assert version == "30-30"
            text = fetch(url)
            assert "30 steps (1 to 30)" in text
            assert repr(version) in text  # the page renews itself when this changes
            with pytest.raises(urllib.error.HTTPError, match="404"):
                fetch(url + "etc/passwd")
        finally:
            server.shutdown()
            running.result()
            server.server_close()


@pytest.fixture
def served(tmp_path):
    """Where a page of ``tmp_path / "run.keel"`` is served."""
    server = make_server(tmp_path / "run.keel")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.serve_forever, 0.05)
        yield server.server_address[1]
        server.shutdown()
        running.result()
        server.server_close()


def ask(port, path="/", headers=(("Host", "localhost"),), method="GET"):
    """Status, headers and text of an answer; the headers are sent as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:4321", "127.1.2.3", "[::1]:8080"])
def test_watching_answers_loopback_names(served, host):
    assert ask(served, headers=[("Host", host)])[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        [("Host", "evil.example")],
        [("Host", "localhost.evil.example")],
        [("Host", "127.0.0.1.evil.example:80")],
        [("Host", "evil.example:80@localhost")],
        [("Host", "192.168.0.7")],
        [("Host", "0.0.0.0")],
        [("Host", "")],
        [("Host", "localhost"), ("Host", "evil.example")],
        [],
    ],
)
def test_watching_answers_nobody_elses_name(served, recorded, tmp_path, headers):
    """A page of somebody else's whose name points to this machine (DNS rebinding)."""
    shutil.copy(recorded(5), tmp_path / "run.keel")
    for path in ("/", "/version", "/favicon.ico"):
        status, _, text = ask(served, path, headers)
        assert status == 403
        assert "steps" not in text


def test_watching_answers_a_browser_that_wants_an_icon(served):
    assert ask(served, "/favicon.ico")[0] == 204


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/../run.keel"), ("GET", "/run.keel"), ("GET", "/%2e%2e/etc/passwd"), ("GET", "/?x"), ("GET", "//evil"),
     ("POST", "/"), ("PUT", "/version"), ("DELETE", "/")],
)  # fmt: skip
def test_watching_serves_its_paths_and_takes_nothing(served, method, path):
    assert ask(served, path, method=method)[0] in (404, 501)


def test_a_damaged_record_is_shown_as_words(served, tmp_path):
    path = tmp_path / "run.keel"
    train(path, steps=30)
    assert "30 steps" in ask(served)[2]
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:100] + bytes(len(data) - 100))
    status, _, text = ask(served)
    assert status == 200
    assert "Nothing to show" in text
    assert "damaged" in text or "cannot be read" in text
    assert ask(served, "/version")[2] != "0"


def fetch(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def test_no_button_sends_data_anywhere(page):
    titles = page.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
    )
    assert titles
    assert not [title for title in titles if "cloud" in title.lower() or "edit" in title.lower()]


def test_every_logged_number_is_drawn(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, model=model, record=tmp_path / "run.keel")
    for step in range(5):
        model(torch.ones(4, 2)).sum().backward()
        guard.log(loss=1.0, accuracy=step / 5, temperature=2.0)
        optimizer.step()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        html = run_page(run)
    for anchor in ("loss", "accuracy", "temperature"):
        assert f'<section id="{anchor}">' in html


SPAN = """return [...document.querySelectorAll(".js-plotly-plot")].filter((p) => p.layout.meta === "step")
    .map((p) => p.layout.xaxis.range.map(Math.round))"""


def wait_for(browser, condition):
    for _ in range(100):
        if browser.execute_script(f"return {condition}"):
            return
        time.sleep(0.1)
    raise AssertionError(f"never came: {condition}")


def test_a_zoom_moves_every_figure_and_outlives_new_steps_without_a_reload(browser, served, tmp_path):
    path = tmp_path / "run.keel"
    train(path, steps=60)
    browser.set_window_size(1280, 900)
    browser.get(f"http://127.0.0.1:{served}/")
    wait_for(browser, "document.querySelectorAll('.js-plotly-plot').length > 3")
    browser.execute_script("window.stayed = true")
    browser.execute_script("Plotly.relayout('figure-1', {'xaxis.range[0]': 10, 'xaxis.range[1]': 30})")
    wait_for(browser, "document.querySelector('#figure-0').layout.xaxis.range[1] === 30")
    spans = browser.execute_script(SPAN)
    assert len(spans) > 3
    assert spans == [[10, 30]] * len(spans)
    train(path.with_name("longer.keel"), steps=90)
    path.with_name("longer.keel").replace(path)
    wait_for(browser, "document.querySelector('.subtitle').textContent.includes('90 steps')")
    assert browser.execute_script("return window.stayed") is True  # not loaded anew
    assert browser.execute_script("return document.getElementById('figure-0').data[0].x.length") == 90
    assert browser.execute_script(SPAN) == spans
    browser.get("about:blank")  # no more questions to a server that has gone
    browser.get_log("browser")


@pytest.fixture
def opened(browser, tmp_path):
    """A page in the browser, with what it complained of."""

    def open_page(html, width=1280, scheme="light"):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get_log("browser")
        browser.get((tmp_path / "page.html").as_uri())
        return browser

    yield open_page
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


LAYERS = 120


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of a run with more than a thousand parameters, whose norms are known."""
    layer = {"attention.weight": 3.0, "attention.bias": 4.0, "mlp.weight": 1.0, "mlp.bias": 0.0}
    names = [f"blocks.{i}.{part}{k}" for i in range(LAYERS) for part in layer for k in ("", "2", "3")]
    norms = [norm if not k else 0.0 for _ in range(LAYERS) for norm in layer.values() for k in ("", "2", "3")]
    steps = [[norm * (2.0 if step == 20 else 1.0) for norm in norms] for step in range(30)]
    path = scripted_run(tmp_path_factory.mktemp("large") / "run.keel", steps, names=names)
    with Reader(path) as run:
        return run_page(run)


ROWS = """const plot = document.querySelector('#every-parameter .js-plotly-plot');
    const { y, z, customdata } = plot.data[0]; """


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_thousand_parameters_are_rows_of_modules_that_open(opened, large, width, scheme):
    page = opened(large, width, scheme)
    names, values = page.execute_script(ROWS + "return [y, customdata.map((row) => row[0])]")
    assert len(names) == 1  # 120 would not fit
    assert names == ["blocks"]
    assert values[0] == pytest.approx(
        math.sqrt(LAYERS * 26), rel=1e-4
    )  # numbers on the page have five digits
    page.execute_script("const s = document.querySelector('.rows select'); s.value = 2; s.onchange();")
    names, values = page.execute_script(ROWS + "return [y, customdata.map((row) => row[0])]")
    assert names == [f"blocks.{i}" for i in range(LAYERS)]
    assert values == pytest.approx([math.sqrt(26)] * LAYERS, rel=1e-4)
    page.execute_script(ROWS + "plot.emit('plotly_click', { points: [{ curveNumber: 0, y: 'blocks.7' }] })")
    names, values = page.execute_script(ROWS + "return [y, customdata.map((row) => row[0])]")
    assert len(names) == LAYERS + 1
    assert names[7:9] == ["blocks.7.attention", "blocks.7.mlp"]
    assert values[7:9] == pytest.approx([5.0, 1.0])
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_filter_and_each_row_by_its_own_median(opened, large):
    page = opened(large)
    search = (
        "const f = document.querySelector('.rows input[type=search]'); f.value = arguments[0]; f.oninput();"
    )
    page.execute_script(search, "blocks.11.*.weight")
    assert page.execute_script(ROWS + "return y") == ["blocks.11.attention.weight", "blocks.11.mlp.weight"]
    assert page.execute_script(
        ROWS + "return plot.parentNode.clientHeight === plot.layout.height"
    )  # no gap below
    page.execute_script(search, "S.11.MLP")
    assert len(page.execute_script(ROWS + "return y")) == 6
    page.execute_script(
        "const c = document.querySelector('.rows input[type=checkbox]'); c.checked = true; c.onchange();"
    )
    relative = page.execute_script(ROWS + "return z[0]")
    assert relative == pytest.approx([math.log10(2.0) if step == 20 else 0.0 for step in range(30)])
    size = {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # it follows the window still
    wait_for(page, "document.documentElement.scrollWidth <= innerWidth")
    page.execute_script(search, "nothing [such")
    assert page.execute_script(ROWS + "return y") == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_figures_over_the_steps_stand_under_each_other(opened, html):
    page = opened(html)
    time.sleep(0.5)
    edges = page.execute_script(
        """return plots.filter((plot) => plot.layout.meta === "step").map((plot) => {
             const { l, w } = plot._fullLayout._size; return [Math.round(l), Math.round(w)]; })"""
    )
    assert len(edges) > 4
    assert len(set(map(tuple, edges))) == 1


def test_samples_are_points_and_a_number_that_is_zero_is_drawn(recorded, tmp_path):
    with Reader(recorded(150, "long")) as run:
        (section,) = _updates(run, [])
    assert {trace.mode for trace in section.figure.data} == {"markers"}
    assert len(section.figure.data[0].x) < 150  # those that were measured
    scripted_run(tmp_path / "zero.keel", [[1.0]] * 3, losses=[0.0, 1.0, 2.0])
    with Reader(tmp_path / "zero.keel") as run:
        (section,) = _scalar(run, run.steps(), [], "loss", "Loss", "#d98c21")
    assert section.figure.layout.yaxis.type == "linear"
    assert list(section.figure.data[0].y) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_several_runs_over_each_other(opened, recorded, width, scheme):
    with Reader(recorded(150, "long")) as one, Reader(recorded(80, "short")) as other:
        html = runs_page([one, other])
        losses = one.losses()
    plain = outside_scripts(html)
    assert (
        plain.index("<dt>long</dt>") < plain.index("<dt>short</dt>") < plain.index("<td>global-norm:0.7</td>")
    )
    page = opened(html, width, scheme)
    lines = page.execute_script(
        "return Object.fromEntries(plots.map("
        "(p) => [p.closest('section').id, p.data.map((t) => [t.name, t.x.length])]))"
    )
    lags = lines.pop("second-moment-lag")  # measured at the first hundred steps, and now and then
    assert 99 <= lags[0][1] < 150
    assert lags[1] == ["short", 79]
    assert set(lines) == {"loss", "gradient-norm", "coefficient", "learning-rate"}
    assert all(line == [["long", 150], ["short", 80]] for line in lines.values())
    assert page.execute_script("return plots[0].data[0].y") == pytest.approx(losses.tolist(), rel=1e-5)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_run_of_three_steps_beside_a_long_one(opened, recorded):
    with Reader(recorded(3, "three")) as one, Reader(recorded(150, "long")) as other:
        page = opened(runs_page([one, other]))
    ticks = page.execute_script(
        "return plots.map((p) => ['xaxis', 'yaxis'].map((a) => p._fullLayout[a]._vals.filter((v) => v.text).length))"
    )
    assert max(max(each) for each in ticks) <= 12, "a tick a step, or nine a decade, run into each other"


def test_a_page_with_the_script_beside_it(browser, tmp_path):
    from gradkeel.page.page import write_script

    train(tmp_path / "run.keel", steps=20)
    name = write_script(tmp_path)
    with Reader(tmp_path / "run.keel") as run:
        html = run_page(run, script=name)
    assert len(html) < 300_000
    (tmp_path / "run.html").write_text(html, encoding="utf-8")
    browser.get((tmp_path / "run.html").as_uri())
    wait_for(browser, "document.querySelectorAll('.js-plotly-plot .main-svg').length > 3")
    assert write_script(tmp_path) == name
