"""Under ``torch.set_default_device`` everything is as without it: what is made on the host says so.

The default device here is ``meta``, which has no numbers: whatever lands on it by mistake has none either.
"""

import ast

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel import doctor
from gradkeel.explain import advise, explain, replay
from gradkeel.record import Reader
from optimizers import is_same
from policy_rows import ROWS
from test_layers import PACKAGE, sources

MAKERS = {"tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "as_tensor", "eye", "rand", "randn",
          "randint", "randperm"}  # fmt: skip
TASKS = PACKAGE / "compare" / "tasks", PACKAGE / "compare" / "text.py"
"""Programs that are trained, and make what they need wherever their user wants it."""


def both(function):
    """What a function comes to without a default device and with one."""
    results = []
    for device in (None, "meta"):
        torch.set_default_device(device)
        try:
            results.append(function(str(device)))
        finally:
            torch.set_default_device(None)
    return results


def trained(policy, path, steps=60):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, device="cpu"), nn.Tanh(), nn.Linear(8, 2, device="cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") / 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)  # the others keep their step there
    guard = gk.attach(optimizer, policy, model=model, record=path)
    accumulate = gk.Accumulator(guard, 2)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in accumulate(torch.randn(2, 5, 6, generator=generator, device="cpu").unbind()):
            with micro:
                loss = model(micro.batch).square().mean() * (1e4 if step == 40 else 1.0)
                micro.backward(loss, weight=5)
        guard.log(loss=loss.detach(), lr=0.01)
        optimizer.step()
    guard.detach()
    numbers = [guard.report.norm, guard.report.coefficient, guard.report.clipped_norm, guard.report.norms]
    return [p.detach() for p in model.parameters()], guard.state_dict()["states"], numbers


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
def test_a_guarded_recorded_and_explained_run(row, tmp_path):
    def run(name):
        path = tmp_path / f"{name}.keel"
        found = trained(row.policy, path)
        with Reader(path) as record:
            series = record.norms(), record.totals(), record.coefficients(), *record.weight_samples()
        return *found, series, explain(path).diagnosis

    plain, moved = both(run)
    assert is_same(plain[:-1], moved[:-1])
    assert plain[-1] == moved[-1]


def test_what_is_made_of_a_record(tmp_path):
    trained("global-norm:1.0", tmp_path / "run.keel")

    def told(name):
        with Reader(tmp_path / "run.keel") as run:
            return str(replay(run, "zclip")), str(advise(run)), run.skips()

    assert len(set(map(str, both(told)))) == 1


def test_the_drop_ins():
    def clipped(name):
        parameters = [nn.Parameter(torch.ones(size, device="cpu")) for size in (3, 4)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 2.0)
        norm = gk.clip_grad_norm_(parameters, 1.0)
        gk.clip_grad_value_(parameters, 0.3)
        table = gk.gradients(nn.ParameterList(parameters))
        return norm, gk.get_total_norm([p.grad for p in parameters]), [p.grad for p in parameters], str(table)

    plain, moved = both(clipped)
    assert is_same(plain[:-1], moved[:-1])
    assert plain[-1] == moved[-1]


def test_the_doctor():
    assert all(both(lambda _: doctor.check(doctor.cpu_route()).is_right))


def test_whatever_is_made_names_its_device():
    """But for programs that are trained: where these make what they need is their user's business."""
    found = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in sources(PACKAGE)
        if path not in TASKS and TASKS[0] not in path.parents
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in MAKERS) == ("torch", True)
        and not any(given.arg in ("device", None) for given in call.keywords)
    ]
    assert found == []
