"""What is clipped in a benchmark, and how what is left of it is checked."""

import math

import pytest
import torch

from gradkeel.bench import SHAPES, Gradients
from gradkeel.bench.contenders import clips
from gradkeel.bench.short import bench, document, shapes_of
from gradkeel.bench.workload import READ, relative_error
from gradkeel.compare.task import TaskError

SMALL = [(3, 4), (5,), ()]


@pytest.mark.parametrize(
    ("name", "entries", "tensors"),
    [
        ("gpt2-small", 124_439_808, 148),  # as published
        ("gpt2-xl", 1_557_611_200, 580),
        ("resnet50", 25_557_032, 161),
        ("tiny-tensors", 4_200_000, 2000),
    ],
)
def test_shapes_are_those_of_the_models(name, entries, tensors):
    assert sum(map(math.prod, SHAPES[name])) == entries
    assert len(SHAPES[name]) == tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_written_anew_in_place(dtype):
    gradients = Gradients(SMALL, dtype=dtype)
    addresses = [gradient.data_ptr() for gradient in gradients.left()]
    for gradient in gradients.left():
        gradient.zero_()
    gradients.refill()
    assert all(map(torch.equal, gradients.left(), gradients.true))
    assert [gradient.data_ptr() for gradient in gradients.left()] == addresses
    gradients.parameters[1].grad = None  # as after a skipped step
    gradients.refill()
    assert all(map(torch.equal, gradients.left(), gradients.true))
    flat = torch.cat([gradient.double().flatten() for gradient in gradients.true])
    assert gradients.norm == pytest.approx(flat.norm().item(), rel=1e-12)
    assert gradients.entries == 18


@pytest.mark.parametrize("factor", [2.0, 1 / 3])
@pytest.mark.parametrize("which", range(3))
def test_who_clips_rightly_has_no_error_and_who_does_not_has_one(which, factor):
    gradients = Gradients(SMALL)
    contender = clips(gradients, factor * gradients.norm)[which]
    contender.run()
    assert contender.error() < 1e-6  # float32, and torch's epsilon
    gradients.left()[0].mul_(1.5)
    assert contender.error() > 0.1
    contender.prepare()
    assert (contender.error() > 0.1) == (factor < 1)


def test_an_error_is_relative_to_what_should_be_there():
    true = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    assert relative_error([torch.tensor([3.0, 4.0]), torch.tensor([12.0])], true) == 0.0
    assert relative_error([torch.tensor([3.0, 4.0]), torch.tensor([25.0])], true) == 1.0
    assert relative_error([torch.tensor([1.5, 2.0]), torch.tensor([6.0])], true, 0.5) == 0.0
    assert relative_error(true[:1], true) == math.inf


def test_the_limit_reads_as_many_bytes():
    gradients = Gradients([(1000,), (24,)], dtype=torch.bfloat16)
    block = gradients.read().run.__self__
    assert block.numel() * block.element_size() == 2048


def test_the_short_form_and_its_document():
    gradients = Gradients(SMALL)
    tables = bench(gradients, rounds=5)
    assert [table.title for table in tables] == [
        "clip, norm below the bound",
        "clip and AdamW step, norm below the bound",
        "clip, norm above the bound",
        "clip and AdamW step, norm above the bound",
    ]
    found = document("mine", "here", gradients, tables)
    assert (found["entries"], found["tensors"], found["dtype"]) == (18, 3, "float32")
    for table in found["tables"]:
        assert table["contenders"][table["baseline"]]["ratio"] == [1.0, 1.0, 1.0]
        assert table["rounds"] == 5
        for one in table["contenders"].values():
            assert one["ms"] > 0
            assert one["error"] is None or one["error"] < 1e-6
    assert READ in found["tables"][0]["contenders"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(f"import torch\nfrom gradkeel.compare import Task\n{text}\n")

    return write


def test_models_of_one_s_own(module):
    module(
        "of_bench_1",
        "def make_model(): return torch.nn.Linear(3, 2)\nmodel = torch.nn.Linear(4, 1, bias=False)",
    )
    assert shapes_of("of_bench_1:make_model") == [(2, 3), (2,)]
    assert shapes_of("of_bench_1:model") == [(1, 4)]
    assert sum(map(math.prod, shapes_of("tiny-transformer"))) == 116_608
    assert shapes_of("resnet50") == SHAPES["resnet50"]


@pytest.mark.parametrize(
    ("text", "target", "words"),
    [
        ("", "gpt2-smal", "did you mean 'gpt2-small'"),
        ("", "of_bench_2:make_model", "has no 'make_model'; write of_bench_2:make_model"),
        ("make_model = int", "of_bench_3:make_model", "gives a int; make it a torch.nn.Module"),
        ("make_model = torch.nn.Linear", "of_bench_5:make_model", "without arguments, but has a missing"),
        ("def make_model(): return torch.nn.LazyLinear(3)", "of_bench_6:make_model", "without a shape yet"),
        (
            "def make_model(): return torch.nn.ParameterList([torch.zeros(0, 3)])",
            "of_bench_7:make_model",
            "nothing to clip",
        ),
        ("make_model = torch.nn.ReLU", "of_bench_4:make_model", "no parameters that need gradients"),
    ],
)
def test_a_model_that_is_none(module, text, target, words):
    module(target.partition(":")[0], text)
    with pytest.raises(TaskError, match=words):
        shapes_of(target)
