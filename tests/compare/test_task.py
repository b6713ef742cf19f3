"""Finding a task by its name, and what happens when there is none."""

import itertools
import sys

import pytest
import torch
from torch import nn

from gradkeel.compare import BUILTIN, Task, TaskError, load_task
from gradkeel.compare.task import endless


class Tiny(Task):
    def model(self):
        return nn.Linear(1, 1)

    def batches(self, seed):
        return torch.arange(3.0).split(1)

    def loss(self, model, batch):
        return model(batch).mean()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the current directory; returns its name."""
    numbers = itertools.count()

    def write(source):
        name = f"task_of_a_user_{tmp_path.name.replace('-', '_')}_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return write


SOURCE = """
import torch
from gradkeel.compare import Task

class Tiny(Task):
    def model(self): return torch.nn.Linear(1, 1)
    def batches(self, seed): return torch.arange(3.0).split(1)
    def loss(self, model, batch): return model(batch).mean()

def make_task(): return Tiny()
task = Tiny()
number = 3
def make_number(): return 3
"""


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_task_has_its_own_name_and_trains(name):
    task = load_task(name)
    assert task.name == name
    model = task.model()
    batch = next(iter(task.batches(0)))
    task.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert task.weight(batch) >= 1


@pytest.mark.parametrize("attribute", ["make_task", "Tiny", "task"])
def test_a_function_a_class_and_an_object_in_the_current_directory_are_tasks(module, attribute):
    target = f"{module(SOURCE)}:{attribute}"
    task = load_task(target)
    assert isinstance(task, Task)
    assert task.name == target


def test_a_task_may_have_a_name_of_its_own(module):
    name = module(SOURCE + "\nTiny.name = 'mine'\n")
    assert load_task(f"{name}:make_task").name == "mine"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "char-lsmt",
            "unknown task 'char-lsmt'; did you mean 'char-lstm'.*Known tasks: char-lstm, exploding-linear",
        ),
        ("zebra", "unknown task 'zebra'. Known tasks: .*mypkg.mymodule:make_task"),
        ("no_such_module:make_task", "no module 'no_such_module' here.*run from the directory that holds it"),
        ("gradkeel.nothing:make_task", "no module 'gradkeel.nothing'"),
        ("gradkeel.compare:nothing", "module 'gradkeel.compare' has no 'nothing'"),
        ("gradkeel.compare:", "module 'gradkeel.compare' has no ''; write gradkeel.compare:make_task"),
        (":make_task", "'' is not a module's name"),
    ],
)
def test_a_target_that_cannot_be_found_says_what_is_missing(target, message):
    with pytest.raises(TaskError, match=message):
        load_task(target)


@pytest.mark.parametrize(("attribute", "kind"), [("number", "int"), ("make_number", "int")])
def test_a_target_that_is_no_task_says_what_it_is(module, attribute, kind):
    with pytest.raises(TaskError, match=f"gives a {kind}, which is not a gradkeel.compare.Task"):
        load_task(f"{module(SOURCE)}:{attribute}")


def test_a_module_that_needs_another_one_names_it(module):
    name = module("import surely_not_installed\n")
    with pytest.raises(TaskError, match="needs 'surely_not_installed', which is not installed"):
        load_task(f"{name}:make_task")


def test_batches_start_anew_when_they_end():
    assert [float(b) for b in itertools.islice(endless(Tiny(), 0), 7)] == [0, 1, 2, 0, 1, 2, 0]


def test_a_task_without_batches_is_an_error():
    task = Tiny()
    task.batches = lambda seed: []
    with pytest.raises(TaskError, match=r"batches\(0\) yielded nothing"):
        next(endless(task, 0))


def test_the_defaults_train_with_sgd_and_rank_by_training_loss():
    task, model = Tiny(), nn.Linear(1, 1)
    assert isinstance(task.optimizer(model, 0.5), torch.optim.SGD)
    assert task.optimizer(model, 0.5).param_groups[0]["lr"] == 0.5
    assert task.weight(torch.zeros(3)) == 1.0
    assert task.validation_loss(model) is None
