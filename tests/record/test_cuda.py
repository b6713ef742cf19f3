"""On an accelerator recording waits for nothing, and the numbers arrive all the same."""

import contextlib

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.kernels import arrival
from gradkeel.record import Reader, rows
from syncs import without_sync

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "spec", ["global-norm:0.5", "value:0.01", "agc:0.01+value:0.01", "norm:0.1", "zclip"]
)
def test_recording_does_not_sync_the_host(spec, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guard = gk.attach(optimizer, spec, model=model, record=tmp_path / "run.keel")
    inputs = torch.randn(200, 32, 64, device="cuda")
    reports = []
    with contextlib.ExitStack() as stack:
        for step in range(200):
            if step == 3:  # state exists from here on
                stack.enter_context(without_sync())
            loss = model(inputs[step]).square().mean()
            loss.backward()
            guard.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            reports.append(guard.report)
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.steps().tolist() == list(range(1, 201))
        assert run.totals().tolist() == [report.norm for report in reports]
        assert run.coefficients().tolist() == [report.coefficient for report in reports]
        assert run.losses().tolist() == [float(report.scalars["loss"]) for report in reports]
        assert len(run.weight_samples()[0]) == 102  # the first 100 steps, and every 50th


def test_a_run_on_a_stream_of_its_own(tmp_path, monkeypatch):
    """What waits is stacked on another stream, and in order with this one."""
    streams = []

    def in_order(stream, device):
        streams.append((stream, arrival.current_stream(device)))
        return arrival.in_order_with(stream, device)

    monkeypatch.setattr(rows, "in_order_with", in_order)
    parameter = nn.Parameter(torch.zeros(1_000_000, device="cuda"))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    guard = gk.attach(optimizer, None, record=tmp_path / "run.keel")
    with torch.cuda.stream(torch.cuda.Stream()):
        side = arrival.current_stream(parameter.device)
        for step in range(1, 131):
            parameter.grad = torch.full_like(parameter, step / 1000)
            optimizer.step()
    guard.detach()
    assert streams[-1] == (side, arrival.current_stream(parameter.device))
    assert side != streams[-1][1]
    with Reader(tmp_path / "run.keel") as run:
        expected = torch.arange(1, 131, dtype=torch.float64)  # the root of a million entries of step / 1000
        torch.testing.assert_close(run.totals(), expected, rtol=1e-5, atol=0)  # the entries are float32


@pytest.mark.parametrize("spec", ["value:0.1", "norm:0.5", "agc:0.01", "zclip", None])
def test_every_kind_of_policy_beside_parameters_that_are_left_alone(spec, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    exclude = "*.bias" if spec else None
    guard = gk.attach(optimizer, spec, model=model, exclude=exclude, record=tmp_path / "run.keel")
    norms = []
    for _ in range(80):
        model(torch.randn(4, 8, device="cuda")).square().mean().backward()
        optimizer.step()
        norms.append(guard.report.norm)
        optimizer.zero_grad()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.totals().tolist() == norms
