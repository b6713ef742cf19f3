"""Every command in Chinese: no English sentence is left, and JSON stays English."""

import html
import json
import math
import re
import warnings

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("rich", reason="the command line needs the extra cli")

import torch
from typer.testing import CliRunner

import gradkeel as gk
from gradkeel.cli.app import app
from gradkeel.explain import explain
from gradkeel.language import choose, width

CHINESE = re.compile(r"[\u4e00-\u9fff]")
# Four words in a row that are no options, names, paths or numbers.
ENGLISH = re.compile(r"(?<![\w.:/-])(?:[A-Za-z]?[a-z']+ ){3,}[a-z']+(?![\w.:/-])")
COMMANDS = ("compare", "smoothness", "policies", "explain", "report", "replay", "export", "doctor", "bench")


@pytest.fixture(autouse=True)
def language():
    yield
    choose(None)


@pytest.fixture
def gradkeel(tmp_path, monkeypatch):
    """Run a command in an empty directory, in Chinese."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments, lang="zh"):
        return CliRunner().invoke(app, [*map(str, arguments), "--lang", lang])

    return run


def train(path, *, lr=0.02, spoil=None, policy=None, steps=80):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    guard = gk.attach(optimizer, policy, model=model, record=path, max_consecutive_skips=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.GradkeelWarning)
        for step in range(1, steps + 1):
            inputs = torch.randn(16, 8)
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean() * (spoil or {}).get(step, 1)
            optimizer.zero_grad()
            loss.backward()
            guard.log(loss=loss)
            optimizer.step()
        guard.detach()
    return path


@pytest.fixture(scope="module")
def spiked(tmp_path_factory):
    """A record with a spike, a NaN, and clipping."""
    path = tmp_path_factory.mktemp("spiked") / "run.keel"
    return train(path, spoil={40: 100.0, 60: math.nan}, policy=gk.ClipByGlobalNorm(1.0))


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    """A record of a learning rate that is too large."""
    return train(tmp_path_factory.mktemp("exploded") / "run.keel", lr=5.0, steps=40)


def is_chinese(text):
    assert CHINESE.search(text), text
    assert ENGLISH.findall(" ".join(text.split())) == []


def is_chinese_page(page):
    assert '<html lang="zh-Hans">' in page
    assert [found for line in of_page(page).split("\n") for found in ENGLISH.findall(line)] == []


def of_page(page):
    """What a page shows, its figures' words included."""
    figures = re.findall(r"Plotly\.newPlot\((.*?)</script>", page, re.DOTALL)
    words = [
        json.loads(f'"{word}"')
        for figure in figures
        for word in re.findall(r'"(?:text|name|hovertemplate)":\s*"((?:[^"\\]|\\.)*)"', figure)
    ]
    body = re.sub(r"<(script|style).*?</\1>|<[^>]+>", "\n", page, flags=re.DOTALL)
    return html.unescape("\n".join([body, *words]))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(gradkeel, command):
    result = gradkeel(*command.split(), "--help")
    assert result.exit_code == 0
    is_chinese(result.stdout)
    assert all(width(line) <= 80 for line in result.stdout.splitlines())


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_arguments_without_their_python_types(gradkeel, command, lang):
    words = gradkeel(command, "--help", lang=lang).stdout
    assert not re.search(r"<\w|\{", words)
    if command == "report":
        assert "RUN..." in words
        assert re.search(r"^  RUN  +\S", words, re.MULTILINE)


def test_no_arguments_at_all(gradkeel):
    result = gradkeel()
    assert "用法：gradkeel [选项] 命令 [参数]..." in result.output.replace("root", "gradkeel")
    assert "错误：" not in result.output


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("record", ["spiked", "exploded"])
def test_explain(gradkeel, monkeypatch, request, record, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    path = request.getfixturevalue(record)
    result = gradkeel("explain", path, "--bound", "3")
    assert result.exit_code == 0, result.output
    text = result.stdout.replace(str(path), "RUN")
    is_chinese(text)
    *lines, last = [line for line in result.stdout.splitlines() if line]
    assert last.startswith("看图：gradkeel report")
    assert all(width(line) <= columns for line in lines)
    tables = re.findall(r"^阈值 .*\n(?:[\d,.]+ .*\n)+", text, re.MULTILINE)
    for table in tables:
        assert len({width(line) for line in table.splitlines()}) == 1, table
    assert len(tables) >= 1 or record == "exploded"


def test_the_page_of_a_run(gradkeel, spiked, tmp_path):
    pytest.importorskip("plotly", reason="the page needs the extra report")
    result = gradkeel("report", spiked, "--out", tmp_path / "page.html")
    assert result.stdout == f"已写出 {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<section id="gradient-norm">' in page  # links to sections are the same in each language
    is_chinese_page(page)
    assert {"裁剪前", "梯度范数", "每个参数"} <= set(of_page(page).split("\n"))


def test_english_would_be_seen(gradkeel, spiked, tmp_path):
    pytest.importorskip("plotly", reason="the page needs the extra report")
    assert ENGLISH.search(gradkeel("explain", spiked, lang="en").stdout)
    gradkeel("report", spiked, "--out", tmp_path / "page.html", lang="en")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<html lang="en">' in page
    assert len([line for line in of_page(page).split("\n") if ENGLISH.search(line)]) > 10


def test_compare(gradkeel, tmp_path):
    pytest.importorskip("plotly", reason="the page needs the extra report")
    result = gradkeel("compare", "exploding-linear", "--seeds", "2", "--jobs", "1", "--out", "o")
    assert result.exit_code == 0, result.output
    is_chinese(result.stdout)
    is_chinese(result.stderr)
    page = (tmp_path / "o" / "compare.html").read_text(encoding="utf-8")
    is_chinese_page(page)
    assert not CHINESE.search((tmp_path / "o" / "compare.json").read_text(encoding="utf-8"))


def test_a_sweep(gradkeel, tmp_path):
    pytest.importorskip("plotly", reason="the page needs the extra report")
    result = gradkeel(
        "compare", "exploding-linear", "--sweep", "norm:1..1000", "--seeds", "1", "--jobs", "1", "--out", "o"
    )
    assert result.exit_code == 0, result.output
    is_chinese_page((tmp_path / "o" / "compare.html").read_text(encoding="utf-8"))


def test_smoothness(gradkeel, tmp_path):
    pytest.importorskip("plotly", reason="the page needs the extra report")
    pytest.importorskip("matplotlib", reason="the pictures need the extra report")
    result = gradkeel("smoothness", "exploding-linear", "--lr", "0.001", "--steps", "60", "--out", "o")
    assert result.exit_code == 0, result.output
    is_chinese(result.stdout)
    is_chinese_page((tmp_path / "o" / "smoothness.html").read_text(encoding="utf-8"))
    assert not CHINESE.search((tmp_path / "o" / "smoothness.json").read_text(encoding="utf-8"))


def test_replay(gradkeel, spiked):
    result = gradkeel("replay", spiked, "--policy", "zclip", "--policy", "norm:1")
    is_chinese(result.stdout.replace(str(spiked), "RUN"))


def test_export(gradkeel, spiked):
    assert gradkeel("export", spiked, "--out", "o.csv").stdout == "已把 80 步写到 o.csv\n"


def test_doctor(gradkeel):
    is_chinese(gradkeel("doctor").stdout)


def test_bench(gradkeel):
    result = gradkeel("bench", "exploding-linear", "--rounds", "5", "--seconds", "0")
    is_chinese(result.stdout.replace("torch clip_grad_norm_", "").replace("gradkeel guard", ""))


@pytest.mark.parametrize("name", [None, "zclip", "warmup"])
def test_policies(gradkeel, name):
    from gradkeel.policies import descriptions

    result = gradkeel("policies", *([name] if name else []))
    text = " ".join(result.stdout.split())
    for one in descriptions():  # citations stay as they are
        text = text.replace(" ".join(one.source.replace("`", "").split()), "")
    is_chinese(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain"], "错误：缺少参数 'RUN'"),
        (["explain", "x.keel"], "gradkeel: x.keel 没有记录"),
        (["explain", "x.keel", "--bound", "-1"], "-1.0 不是正的有限数"),
        (["export", "x.keel", "--out", "x.txt"], "x.txt 必须以 .csv 或 .parquet 结尾"),
        (["nothing"], "错误：没有命令 'nothing'"),
        (["compare", "no-such-task"], "gradkeel: 未知的任务 'no-such-task'"),
        (["compare", "nowhere:make_task"], "这里（"),
        (
            ["compare", "exploding-linear", "--policy", "clip:1"],
            "gradkeel: 未知的策略 'clip'；是不是 'zclip'？",
        ),
        (["compare", "exploding-linear", "--policy", "norm:-1"], "max_norm 必须是正数"),
        (["compare", "exploding-linear", "--policy", "norm:x"], "max_norm='x' 不是数"),
        (["compare", "exploding-linear", "--sweep", "norm"], "应为一种策略和两个大于 0 的阈值"),
        (["compare", "exploding-linear", "--seeds", "0"], "seeds=0：必须不小于 1"),
        (["compare", "--run", "python x.py", "--lr", "1"], "--lr 对你自己的命令不起作用"),
        (["bench", "--device", "meta"], "'meta' 不能用：上面没有数值"),
    ],
)
def test_what_cannot_be_run(gradkeel, tmp_path, arguments, message):
    result = gradkeel(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    is_chinese(result.stderr.replace(str(tmp_path), "HERE"))


def test_where_the_option_stands_does_not_matter(monkeypatch):
    monkeypatch.setenv("GRADKEEL_LANG", "zh")
    run = CliRunner().invoke
    assert run(app, ["policies"]).stdout == run(app, ["--lang", "zh", "policies"]).stdout
    assert run(app, ["policies", "--lang=zh"]).stdout == run(app, ["--lang", "zh", "policies"]).stdout
    assert not CHINESE.search(run(app, ["policies", "--lang", "en"]).stdout)
    assert CHINESE.search(run(app, ["policies"]).stdout)


@pytest.mark.parametrize("arguments", [["--lang", "fr"], ["--lang"]])
def test_a_language_that_is_not_spoken(arguments):
    result = CliRunner().invoke(app, ["policies", *arguments])
    assert result.exit_code == 2
    assert "--lang" in result.stderr
    assert "is not one of 'en', 'zh'" in result.stderr


@pytest.mark.parametrize("command", ["explain", "replay"])
def test_json_is_the_same_in_each_language(gradkeel, spiked, command):
    policy = ["--policy", "zclip"] if command == "replay" else []
    chinese, english = (
        gradkeel(command, spiked, *policy, "--json", lang=lang).stdout for lang in ("zh", "en")
    )
    assert chinese == english
    assert not CHINESE.search(json.dumps(json.loads(chinese), ensure_ascii=False))


def test_an_explanation_in_python(spiked):
    explanation = explain(spiked)
    english = str(explanation)
    choose("zh")
    is_chinese(str(explanation).replace(str(spiked), "RUN"))
    assert not CHINESE.search(english + json.dumps(explanation.to_json(), ensure_ascii=False))


def test_gradients_are_a_table_with_even_columns():
    choose("zh")
    lines = repr(gk.gradients(torch.nn.Linear(2, 3))).splitlines()
    assert lines[0].split() == ["参数", "形状", "权重范数", "梯度范数"]
    assert len({width(line) for line in lines}) == 1
    assert "<th>梯度范数</th>" in gk.gradients(torch.nn.Linear(2, 3))._repr_html_()
