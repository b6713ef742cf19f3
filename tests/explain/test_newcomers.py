"""Four broken programs as somebody writes them who is new to it: one command names what is wrong with each."""

import json
import warnings

import pytest
from typer.testing import CliRunner

import gradkeel as gk
from gradkeel.cli.app import app
from gradkeel.explain import explain

START = """
import torch
from torch import nn
import gradkeel as gk

torch.manual_seed(0)
inputs = torch.randn(2000, 10)
targets = inputs.square().sum(dim=1, keepdim=True)
data = torch.utils.data.TensorDataset(inputs, targets)
"""

LEARNING_RATE = """
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.{optimizer}
guard = gk.attach(optimizer, {policy}, model=model, record=path)
for epoch in range(3):
    for x, y in torch.utils.data.DataLoader(data, batch_size=32, shuffle=True):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        {log}
        optimizer.step()
"""

SAMPLE = """
targets[1234] = 9999999.0                       # somebody's way to write "missing"
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
guard = gk.attach(optimizer, "global-norm:1.0", model=model, record=path)
autopsy = gk.Autopsy(guard, loss=lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]))
seen = []
for epoch in range(2):
    for batch in torch.utils.data.DataLoader(data, batch_size=32, shuffle=True):
        seen.append(batch)
        with autopsy(batch):
            loss = autopsy.loss()
            loss.backward()
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
"""

OP = """
class Gaussian(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.sigma = nn.Linear(10, 1), nn.Parameter(torch.tensor(0.3))

    def forward(self, x, y):
        return (((y - self.mean(x)) / self.sigma) ** 2 / 2 + torch.log(self.sigma)).mean()  # until sigma is below 0

data = torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
model = Gaussian()
optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
guard = gk.attach(optimizer, None, model=model, record=path)
autopsy = gk.Autopsy(guard, loss=lambda batch: model(*batch))
for epoch in range(5):
    for batch in torch.utils.data.DataLoader(data, batch_size=32):
        with autopsy(batch):
            loss = autopsy.loss()
            loss.backward()
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
"""

HALF = """
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
guard = gk.attach(optimizer, "global-norm:1.0", model=model, record=path)
scaler = torch.amp.GradScaler("cpu")
for epoch in range(2):
    for x, y in torch.utils.data.DataLoader(data, batch_size=32, shuffle=True):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = ((model(x) - y) ** 2).sum()  # not the mean: too much for the scale that a scaler begins with
        scaler.scale(loss).backward()
        guard.log(loss=loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
"""


def run(program, path, **words):
    """Run it as it is, and ask the one command; what it answers, in words and as JSON, and the program's variables."""
    names = {"path": str(path)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.GradkeelWarning)
        exec(START + program.format(**words) if words else START + program, names)  # our own program
    names["guard"].detach()
    words, found = (
        CliRunner().invoke(app, ["explain", str(path), *more]).output for more in ([], ["--json"])
    )
    return " ".join(words.split()), json.loads(found), names


@pytest.mark.parametrize("log", ["guard.log(loss=loss)", ""])
@pytest.mark.parametrize(
    ("optimizer", "policy", "verdict"),
    [
        ("SGD(model.parameters(), lr=1.0)", "None", "diverged_from_start"),
        ("Adam(model.parameters(), lr=1.0)", "None", "diverged_from_start"),
        # Clipped it goes up to 16 million, and comes down to a tenth of where it began.
        ("Adam(model.parameters(), lr=1.0)", '"global-norm:1.0"', "spike_recovered"),
    ],
)
def test_the_learning_rate(tmp_path, optimizer, policy, verdict, log):
    words, found, _ = run(LEARNING_RATE, tmp_path / "run.keel", optimizer=optimizer, policy=policy, log=log)
    assert (found["verdict"], found["cause"], found["onset"]) == (verdict, "learning_rate", 1)
    assert "The cause: the learning rate." in words
    assert ("The first update larger than the weights" in words) == (verdict == "diverged_from_start")


def test_the_sample(tmp_path):
    words, found, names = run(SAMPLE, tmp_path / "run.keel")
    (told,) = found["autopsies"]
    batch = names["seen"][told["step"] - 1]
    assert batch[1][told["sample"]] == 9999999.0
    assert (found["cause"], found["onset"]) == ("sample", told["step"])
    assert f"Sample {told['sample']} of the batch does it" in words


def test_the_operation(tmp_path):
    words, found, _ = run(OP, tmp_path / "run.keel")
    assert (found["verdict"], found["cause"]) == ("non_finite", "numerics")
    assert found["autopsies"][-1]["op"] == "log"
    assert "operation log" in words
    # The step before, whose gradient was 16 times the usual, had moved a bias far: nobody else had.
    assert not any(event["altered"] for event in found["events"])


def test_the_loss_scale(tmp_path):
    words, found, _ = run(HALF, tmp_path / "run.keel")
    assert (found["verdict"], found["cause"]) == ("loss_scale_overflow", "loss_scale")
    assert found["onset"] == 1
    assert "The loss scale overflowed" in words
    assert explain(tmp_path / "run.keel").skipped > 0
