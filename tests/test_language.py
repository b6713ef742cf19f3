"""The table of Chinese sentences: whole, used, and with the same blanks as the English ones."""

import ast
import copy
import json
import pickle
import re
import string
from pathlib import Path

import pytest

from gradkeel import language
from gradkeel.language import OTHERS, Said, choose, count, heard, join, padded, say, shown, width, wrapped

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "gradkeel"
TABLE = json.loads((PACKAGE / "language" / "zh.json").read_bytes())
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(autouse=True)
def chinese():
    choose("zh")
    yield
    choose(None)


def said(path, makers):
    """The sentences of a file, and what it says that is put together before it can be looked up."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = makers & {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "gradkeel.language"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name in made or name == "language.say":
            for argument in node.args:
                yield from sentences(argument, f"{path.relative_to(PACKAGE)}:{node.lineno}")


def sentences(node, where):
    if isinstance(node, ast.IfExp):
        yield from sentences(node.body, where)
        yield from sentences(node.orelse, where)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, where
    else:
        assert not isinstance(node, ast.JoinedStr | ast.BinOp), (
            f"{where}: say() takes a template, and its values by name"
        )


def of_sources(*makers):
    paths = sorted(PACKAGE.rglob("*.py"))
    return {sentence: where for path in paths for sentence, where in said(path, frozenset(makers))}


def of_help():
    typer = pytest.importorskip("typer", reason="the command line needs the extra cli")
    pytest.importorskip("rich", reason="the command line needs the extra cli")
    from gradkeel.cli.app import app

    group = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        yield " ".join(command.help.split())
        yield from (parameter.help for parameter in command.params if parameter.help)


def of_policies():
    """What ``gradkeel policies`` takes from docstrings, the sources aside, which are citations."""
    from gradkeel.policies import descriptions

    for one in descriptions():
        yield from (one.summary, *one.details.split("\n\n"), one.formula, one.spec, one.cost)
        yield from (parameter.meaning for parameter in one.parameters)


def is_prose(text):
    """Whether there is anything to translate: some formulas and specs hold none."""
    return re.search(r"\b(and|for|of|such|the|then|to|with)\b|[a-z]{2,} [a-z]{2,}", text) is not None


def blanks(text):
    """What is filled into a sentence, and how; in no order."""
    return sorted(
        (name, spec, how) for _, name, spec, how in string.Formatter().parse(text) if name is not None
    )


def in_table():
    return {english: chinese for section in TABLE.values() for english, chinese in section.items()}


def test_every_sentence_of_the_sources_is_in_the_table():
    table = in_table()
    assert {
        sentence: where for sentence, where in of_sources("say", "count").items() if sentence not in table
    } == {}


def test_every_sentence_of_help_and_of_the_policies_is_in_the_table():
    table = in_table()
    assert [sentence for sentence in of_help() if sentence not in table] == []
    assert [sentence for sentence in of_policies() if is_prose(sentence) and sentence not in table] == []


def test_no_entry_of_the_table_is_unused():
    used = {*of_sources("say", "count"), *of_help(), *of_policies()}
    own = {english for section, entries in TABLE.items() if section != OTHERS for english in entries}
    assert own - used == set()


def test_no_sentence_is_there_twice():
    assert len(in_table()) == sum(map(len, TABLE.values()))


def test_blanks_are_the_same_in_both_languages():
    for english, chinese in in_table().items():
        if "{" in english:
            assert blanks(chinese) == blanks(english), english


def test_every_translation_is_chinese():
    words = {english for english in in_table() if re.search("[a-z]", re.sub("{.*?}", "", english))}
    assert {english for english in words if not CHINESE.search(in_table()[english])} == {
        "Value error, {what}"
    }


def test_each_shape_is_of_its_own_sentence():
    """The shape of an entry, filled in, is recognized as that entry, and not as another."""
    for english, chinese in TABLE[OTHERS].items():
        values = {name: f"<{name}>" for name, _, _ in blanks(english)}
        assert shown(heard(english.format(**values))) == chinese.format(**values), english


def test_what_is_said_is_english_until_it_is_shown():
    sentence = say("step {step}", step=3)
    assert sentence == "step 3"
    assert json.dumps({"step": sentence}) == '{"step": "step 3"}'
    assert shown(sentence) == "第 3 步"
    choose("en")
    assert shown(sentence) == "step 3"
    assert type(shown(sentence)) is str


def test_what_is_filled_in_is_translated_too_and_needs_no_space():
    told = say("The loss began at {first} and ended at {last}.", first="3", last=say("not finite"))
    assert told == "The loss began at 3 and ended at not finite."
    assert shown(told) == "损失开始时为 3，最后为不是有限值。"


def test_names_stay_as_they_are():
    assert shown(say("Wrote {path}", path="step")) == "已写出 step"
    assert shown("step") == "step"


def test_sentences_in_a_row():
    told = join([say("No explosion was found."), "", say("No run finished.")])
    assert told == "No explosion was found. No run finished."
    assert shown(told) == "没有发现爆炸。没有一次训练完成。"
    assert shown(join([])) == ""


def test_numbers_choose_the_english_form():
    assert [count(n, "{n} seed", "{n} seeds") for n in (0, 1, 2)] == ["0 seeds", "1 seed", "2 seeds"]
    assert shown(count(1, "{n} seed", "{n} seeds")) == "1 个种子"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda told: pickle.loads(pickle.dumps(told))])
def test_copies_and_pickles_can_be_translated(again):
    told = again(say("step {step}", step=3))
    assert type(told) is Said
    assert shown(told) == "第 3 步"


@pytest.mark.parametrize(
    ("environment", "language_"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LANG": "en_US.UTF-8", "GRADKEEL_LANG": "zh"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "GRADKEEL_LANG": "en"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": ""}, "en"),
    ],
)
def test_the_language_comes_from_the_environment(monkeypatch, environment, language_):
    choose(None)
    for name in ("GRADKEEL_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language.language() == language_


def test_chinese_takes_two_columns_and_is_not_broken_before_its_punctuation():
    assert (width("a步"), padded("步", 4), padded("步", 4, right=True)) == (3, "步  ", "  步")
    text = "第 101 步之后，范数恢复正常（2.bias）。"
    for columns in range(12, 40):
        lines = wrapped(text, columns)
        assert "".join(lines) == text
        assert all(width(line.rstrip()) <= columns for line in lines)
        assert not [line for line in lines if line.startswith(tuple("，。）"))]


def test_a_word_that_is_too_long_is_folded():
    assert wrapped("abcdef 步", 4) == ["abcd", "ef ", "步"]


def test_why_steps_were_skipped_can_be_read_from_a_record():
    from gradkeel.guard import SkipReason

    for reason in SkipReason:
        for place in (None, "step 3: the gradient of '0.bias' is not finite (NaN) on rank 2"):
            words = shown(heard(reason.words(3, place)))
            assert CHINESE.search(words), words
            assert "finite" not in words


def test_verdicts_can_be_told_by_compare():
    from gradkeel.explain.verdict import Verdict

    for verdict in Verdict:
        assert CHINESE.search(shown(heard(verdict.replace("_", " ")))), verdict


COUNTED = "steps|parameters|runs|records|seeds|policies|measurements|tensors|entries|threads|weights|batches"
# These are said of two or more; see the condition beside each.
OF_SEVERAL = {
    "highest of {width} steps from {step} on",
    "Each point stands for {width} steps: the line is their median, the shade their range.",
    "Each cell is the highest norm of {width} steps.",
    ", each on {n} accumulated batches",
    "Every {period} steps the gradient norm is high for a step, up to {peak} at step {peak_step}, and the loss, where "
    "it was logged, is no worse for it: perhaps the last batch of each epoch is small, which drop_last=True leaves "
    "out.",
    "{n} records; a click on a name in a legend hides the run, a double click shows it alone.",
    "Norm of the update over the norm of the weights it changed, at the {n:,} steps where it was measured. Above 1 an "
    "update overwrites what was there.",
    "The level of the gradient norm (its median over {stretch} steps) rose from {before} to {after}, {times} times, "
    "without a jump.",
}


def test_what_may_be_one_is_counted():
    """``count`` knows the sentence for one; "1 steps" comes of saying it otherwise."""
    several = {one for one in of_sources("say") if re.search(rf"\}} (?:[a-z]+ )?(?:{COUNTED})\b", one)}
    assert several == OF_SEVERAL


def test_a_count_may_stand_among_other_values():
    told = [count(n, "{n} of {k} was", "{n} of {k} were", k=3) for n in (0, 1, 2)]
    assert told == ["0 of 3 were", "1 of 3 was", "2 of 3 were"]
