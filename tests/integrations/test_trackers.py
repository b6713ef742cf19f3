"""TensorBoard, Weights & Biases and MLflow get the numbers of a real run, on this machine alone."""

import json
import math
import sys
import threading
import time

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.errors import MissingExtraError
from gradkeel.integrations.trackers import MLflow, TensorBoard, WeightsAndBiases
from gradkeel.record import Reader, Recorder

STEPS = 120


def train(recorder, at_the_end=None, at_each=None):
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
        if at_each is not None:
            at_each(len(norms))
    if at_the_end is not None:
        at_the_end()
    guard.detach()
    return norms


def test_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    norms = train(Recorder(tmp_path / "run.keel", sinks=[TensorBoard(tmp_path / "tb", parameters_every=50)]))
    events = accumulators.EventAccumulator(
        str(tmp_path / "tb"), size_guidance={"scalars": 0, "histograms": 0}
    )
    events.Reload()
    shown = events.Scalars("gradkeel/norm")
    assert [event.step for event in shown] == list(range(1, STEPS + 1))
    assert [event.value for event in shown] == pytest.approx(norms, rel=1e-6)  # TensorBoard stores float32
    expected = {"norm", "clipped_norm", "coefficient", "bound", "loss", "lr", "clipped", "stepped"}
    assert {
        tag.partition("/")[2] for tag in events.Tags()["scalars"] if tag.startswith("gradkeel/")
    } == expected
    assert [event.step for event in events.Scalars("gradkeel_norms/0.weight")] == [1, 50, 100]
    histograms = events.Histograms("gradkeel/log10_norms")
    assert [event.step for event in histograms] == [1, 50, 100]
    norms_of = [events.Scalars(tag) for tag in events.Tags()["scalars"] if tag.startswith("gradkeel_norms/")]
    assert len(norms_of) == 4
    logs = [math.log10(norm[0].value) for norm in norms_of]
    told = histograms[0].histogram_value
    assert (told.num, told.min, told.max) == (4, pytest.approx(min(logs)), pytest.approx(max(logs)))
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

    def add_histogram(self, tag, values, step, walltime=None):
        pass

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


def offline_rows(folder):
    """What an offline run of W&B has on disk: the rows of its history, by W&B's step."""
    (path,) = folder.rglob("*.wandb")
    end = time.monotonic() + 60
    while (rows := rows_of(path.read_bytes())) is None:  # finish() does not wait for the last block
        assert time.monotonic() < end
        time.sleep(0.1)
    return rows


def rows_of(data):
    """Of the file's bytes; None where the end is missing."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole, rows, ended = 7, b"", {}, False
    while at + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB, pieces with a header of 7 bytes
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record, whole = Record.FromString(whole), b""
            ended |= record.WhichOneof("record_type") == "exit"
            if record.WhichOneof("record_type") == "history":
                rows[record.history.step.num] = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
    return rows if ended else None


@pytest.fixture
def wandb_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(
        project="gradkeel-test", dir=str(tmp_path), settings=wandb.Settings(x_disable_stats=True)
    ) as run:
        yield run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # W&B's own
@pytest.mark.parametrize("user", ["logs with step=", "logs seldom", "logs without", "logs nothing"])
def test_weights_and_biases_drops_no_point_of_the_users(wandb_run, tmp_path, user):
    """182 of 250 were lost."""
    import wandb

    mine = {}

    def at_each(step):
        if user == "logs with step=" or (user == "logs seldom" and step % 40 == 0):
            wandb.log({"mine": step}, step=step - 1)
            mine[step - 1] = step
        elif user == "logs without":
            wandb_run.log({"mine": step})

    sink = WeightsAndBiases(wandb_run, parameters_every=20)
    norms = train(Recorder(None, sinks=[sink], flush_seconds=0.0), at_each=at_each)
    if mine:
        wandb.log({"mine": -1}, step=STEPS)
        mine[STEPS] = -1
    assert wandb.log == wandb_run.log == sink._log
    wandb_run.finish()
    rows = offline_rows(tmp_path)
    points = {step: row["mine"] for step, row in rows.items() if "mine" in row}
    if user == "logs without":
        assert list(points.values()) == list(range(1, STEPS + 1))
    else:
        assert points == mine
    own = [row for row in rows.values() if "gradkeel/step" in row]
    steps = [row["gradkeel/step"] for row in own]
    assert steps == sorted(set(steps))
    assert [row["gradkeel/norm"] for row in own] == [norms[step - 1] for step in steps]
    for row in own:
        told = row["gradkeel/step"] == 1 or row["gradkeel/step"] % 20 == 0
        assert ("gradkeel_norms/1.bias" in row) == told
        assert (sum(row.get("gradkeel/log10_norms/values", [])) == 4) == told  # parameters
    if user in ("logs without", "logs nothing"):
        assert steps == list(range(1, STEPS + 1))
    else:
        assert steps[-1] == STEPS  # with the last row
        assert len(steps) > (STEPS / 2 if user == "logs with step=" else 2)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        norms = train(Recorder(None, sinks=[MLflow(run, parameters_every=50)]))
    told = mlflow.MlflowClient().get_metric_history(run.info.run_id, "gradkeel/norm")
    assert [(point.step, point.value) for point in told] == list(enumerate(norms, start=1))
    assert told[0].timestamp <= told[-1].timestamp < told[0].timestamp + 600_000
    told = mlflow.MlflowClient().get_metric_history(run.info.run_id, "gradkeel_norms/0.weight")
    assert [point.step for point in told] == [1, 50, 100]
