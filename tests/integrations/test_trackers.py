"""TensorBoard and Weights & Biases get the numbers of a real run; W&B runs offline."""

import sys

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.errors import MissingExtraError
from gradkeel.integrations.trackers import TensorBoard, WeightsAndBiases
from gradkeel.record import Reader, Recorder

STEPS = 120


def train(recorder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.5), model=model, record=recorder)
    norms = []
    for _ in range(STEPS):
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        norms.append(guard.report.norm)
    guard.detach()
    return norms


def test_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    norms = train(Recorder(tmp_path / "run.keel", sinks=[TensorBoard(tmp_path / "tb", parameters_every=50)]))
    events = accumulators.EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    shown = events.Scalars("gradkeel/norm")
    assert [event.step for event in shown] == list(range(1, STEPS + 1))
    assert [event.value for event in shown] == pytest.approx(norms, rel=1e-6)  # TensorBoard stores float32
    expected = {"norm", "clipped_norm", "coefficient", "bound", "loss", "lr", "clipped", "stepped"}
    assert {
        tag.partition("/")[2] for tag in events.Tags()["scalars"] if tag.startswith("gradkeel/")
    } == expected
    assert [event.step for event in events.Scalars("gradkeel_norms/0.weight")] == [1, 50, 100]
    with Reader(tmp_path / "run.keel") as run:  # the file beside it is whole
        assert len(run) == STEPS


def test_a_writer_of_the_users_stays_open(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(tmp_path / "tb")
    train(Recorder(None, sinks=[TensorBoard(writer, parameters_every=None)]))
    writer.add_scalar("mine", 1.0, 0)
    writer.close()


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradkeel\[tensorboard\]'"):
        TensorBoard(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # W&B's own
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    with wandb.init(
        project="gradkeel-test", dir=str(tmp_path), settings=wandb.Settings(x_disable_stats=True)
    ) as run:
        log = run.log
        monkeypatch.setattr(
            run, "log", lambda values, **options: (logged.append(values), log(values, **options))
        )
        norms = train(Recorder(None, sinks=[WeightsAndBiases(run, parameters_every=60)]))
        summary = dict(run.summary)
    assert [values["gradkeel/step"] for values in logged] == list(range(1, STEPS + 1))
    assert [values["gradkeel/norm"] for values in logged] == norms
    assert [values["gradkeel/step"] for values in logged if "gradkeel_norms/1.bias" in values] == [1, 60, 120]
    assert summary["gradkeel/norm"] == pytest.approx(norms[-1])
    assert list(tmp_path.rglob("*.wandb"))  # the offline run is on disk
