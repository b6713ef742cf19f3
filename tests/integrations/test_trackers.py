"""TensorBoard and Weights & Biases get the numbers of a real run; W&B runs offline."""

import sys
import threading

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.errors import MissingExtraError
from gradkeel.integrations.trackers import TensorBoard, WeightsAndBiases
from gradkeel.record import Reader, Recorder

STEPS = 120


def train(recorder, at_the_end=None):
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
    if at_the_end is not None:
        at_the_end()
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


class Writer:
    """Stands in for a SummaryWriter: keeps what it is told, and may be slow to begin with."""

    log_dir = "runs/1"

    def __init__(self, go=None):
        self.go, self.scalars, self.flushed, self.closed = go, [], 0, False

    def add_scalar(self, tag, value, step, time=None):
        if self.go is not None:
            assert self.go.wait(60)
        self.scalars.append((tag, step, value, time))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.closed = True


def test_a_writer_of_the_users_stays_open():
    writer = Writer()
    norms = train(Recorder(None, sinks=[TensorBoard(writer, parameters_every=None)]))
    assert [value for tag, _, value, _ in writer.scalars if tag == "gradkeel/norm"] == norms
    assert not [tag for tag, *_ in writer.scalars if tag.startswith("gradkeel_norms/")]
    assert writer.flushed
    assert not writer.closed


def test_a_writer_that_was_made_here_is_closed(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    closed = []
    close = tensorboard.SummaryWriter.close
    monkeypatch.setattr(
        tensorboard.SummaryWriter, "close", lambda self: (closed.append(self.log_dir), close(self))
    )
    train(Recorder(None, sinks=[TensorBoard(tmp_path / "tb")]))
    assert closed == [str(tmp_path / "tb")]


def test_a_slow_tracker_catches_up(tmp_path):
    """Training does not wait for it, and no step is lost or told twice or out of order."""
    go = threading.Event()
    writer, made = Writer(go), []
    recorder = Recorder(
        tmp_path / "run.keel", sinks=[TensorBoard(writer, parameters_every=60)], flush_seconds=0.0
    )

    def trained():
        made.append(len(writer.scalars))
        threading.Timer(0.5, go.set).start()

    norms = train(recorder, trained)  # returns when all is told
    assert made == [0]
    shown = [(step, value) for tag, step, value, _ in writer.scalars if tag == "gradkeel/norm"]
    assert shown == list(zip(range(1, STEPS + 1), norms, strict=True))
    assert [step for tag, step, *_ in writer.scalars if tag == "gradkeel_norms/0.weight"] == [1, 60, 120]
    with Reader(tmp_path / "run.keel") as run:  # and the file was not held up by it
        assert run.totals().tolist() == norms
        times = [time for tag, _, _, time in writer.scalars if tag == "gradkeel/norm"]
        assert times == run.series("time").tolist()
        weights = [v for tag, _, v, _ in writer.scalars if tag == "gradkeel_norms/0.weight"]
        assert weights == run.norms()[[0, 59, 119], 0].tolist()


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
