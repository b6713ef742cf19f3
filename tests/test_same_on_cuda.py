"""On a GPU a run comes out as on the CPU: random ones, side by side.

Steps are launched and replayed, made and skipped by the host and by the device; gradients keep their memory and lose
it. `make test-simulated` runs them where there is no GPU.
"""

import copy
import math
import random
from dataclasses import dataclass

import pytest
import torch

import gradkeel as gk
from gradkeel.kernels import triton_host
from gradkeel.record import Reader

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning"),
]

SPECS = [
    "none", "global-norm:1.0", "norm:0.5", "value:0.3", "agc:0.05", "zclip:warmup=3", "autoclip:warmup=3,window=8",
    "adagc:warmup=3", "quantile:0.9", "normalize:1.0", "smooth:1.0", "global-norm:0.7+value:0.2", "block-rms:0.05",
    "robust:warmup=4,window=8", "warmup:3/global-norm:0.3/zclip:warmup=2",
    "per-group:norm:0.5/zclip:warmup=2,scope=tensor",
]  # fmt: skip
SHAPES = [(3, 5), (7,), (2, 3, 2), (), (40,)]
EVENTS = ["plain"] * 6 + ["nan", "absent", "big", "small", "zero", "reload", "rate", "view"]
SERIES = (
    "norms", "total", "coefficients", "coefficient", "clipped_total", "bound", "verdict", "present", "scalar:loss",
)  # fmt: skip
STEPS = 14


@dataclass
class Step:
    """What happens before one step: something unusual, perhaps, to one parameter; and the gradients that are set."""

    event: str
    parameter: int
    gradients: list[torch.Tensor]
    is_in_place: bool
    clears: bool


class Script:
    """A run, drawn once, that any device can play."""

    def __init__(self, seed):
        drawn, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.spec, self.kind = SPECS[seed % len(SPECS)], drawn.choice(["SGD", "momentum", "AdamW"])
        self.fused, self.nonfinite = drawn.random() < 0.6, drawn.choice(["skip", "skip", "keep"])
        self.has_scaler = drawn.random() < 0.3
        shapes = [drawn.choice(SHAPES) for _ in range(drawn.randint(1, 5))]
        self.weights = [torch.randn(shape, generator=generator) for shape in shapes]
        self.cut = drawn.randrange(len(shapes)) or len(shapes)
        self.steps = []
        for _ in range(STEPS):
            event, parameter = drawn.choice(EVENTS), drawn.randrange(len(shapes))
            # Torch's fused SGD raises where a momentum begins later than the others.
            if event == "absent" and self.kind == "momentum":
                event = "plain"
            size = {"big": 50.0, "small": 1e-3, "zero": 0.0}.get(event, 1.0)
            gradients = [
                torch.randn(shape, generator=generator) * drawn.choice([0.1, 1, 1, 3]) * size
                for shape in shapes
            ]
            if event == "nan":
                gradients[parameter].view(-1)[0] = math.nan
            in_place, clears = drawn.random() < 0.3, drawn.random() < 0.5
            self.steps.append(Step(event, parameter, gradients, in_place, clears))

    def optimizer(self, parameters):
        groups = [{"params": parameters[: self.cut]}, {"params": parameters[self.cut :]}]
        groups = [group for group in groups if group["params"]]
        if self.kind == "AdamW":
            return torch.optim.AdamW(groups, lr=0.01, fused=self.fused)
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9 * (self.kind == "momentum"), fused=self.fused)

    def play(self, device, path):
        """What the reports, the record, the policies' state and the parameters say in the end."""
        parameters = [torch.nn.Parameter(weight.to(device, copy=True)) for weight in self.weights]
        optimizer = self.optimizer(parameters)
        policy = None if self.spec == "none" else self.spec
        guard = gk.attach(optimizer, policy, nonfinite=self.nonfinite, max_consecutive_skips=100, record=path)
        scaler = torch.amp.GradScaler(device, init_scale=64.0, growth_interval=3) if self.has_scaler else None
        told = []
        for i, step in enumerate(self.steps):
            scale = 1.0
            if scaler is not None:
                scaler.scale(torch.ones((), device=device))  # which makes the scale
                scale = scaler.get_scale()
            for k, (parameter, gradient) in enumerate(zip(parameters, step.gradients, strict=True)):
                set_gradient(parameter, (gradient * scale).to(device), step, is_meant=k == step.parameter)
            if step.event == "reload":
                guard.load_state_dict(copy.deepcopy(guard.state_dict()))
            elif step.event == "rate":
                optimizer.param_groups[0]["lr"] *= 1.1
            guard.log(loss=torch.tensor(1.5 * i, device=device))
            if scaler is not None and any(parameter.grad is not None for parameter in parameters):
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            report = guard.report
            told.append((report.stepped, report.reason, report.clipped))
            told.append([report.norm, report.coefficient, report.clipped_norm])
            if step.clears:
                optimizer.zero_grad()
        states = guard.state_dict()["states"]
        guard.detach()
        with Reader(path) as run:
            told.append(run.skips())
            tensors = {name: run.series(name) for name in SERIES}
            tensors["samples"] = torch.stack(run.weight_samples()[1:])
        tensors |= {
            f"{label}.{name}": own.cpu() for label, state in states.items() for name, own in state.items()
        }
        tensors |= {f"parameter {k}": own.detach().cpu() for k, own in enumerate(parameters)}
        return told, tensors


def set_gradient(parameter, gradient, step, *, is_meant):
    if step.event == "absent" and is_meant:
        parameter.grad = None
    elif step.event == "view":
        memory = torch.zeros(gradient.numel() + 8, device=gradient.device)
        parameter.grad = memory[8:].view(gradient.shape)
        parameter.grad.copy_(gradient)
    elif step.is_in_place and parameter.grad is not None:
        parameter.grad.copy_(gradient)
    else:
        parameter.grad = gradient


@pytest.mark.parametrize("kernels", ["foreach", "triton"])
@pytest.mark.parametrize("seed", range(2 * len(SPECS)))
def test_a_run_is_the_same_as_on_the_cpu(tmp_path, monkeypatch, kernels, seed):
    if kernels == "triton":
        pytest.importorskip("triton")
    script = Script(seed)
    expected, there = script.play("cpu", tmp_path / "cpu.keel")
    monkeypatch.setenv(triton_host.VARIABLE, "on" if kernels == "triton" else "off")
    triton_host.kernels.cache_clear()
    try:
        found, here = script.play("cuda", tmp_path / "cuda.keel")
    finally:
        monkeypatch.undo()
        triton_host.kernels.cache_clear()
    for one, other in zip(expected, found, strict=True):
        numbers = isinstance(one, list) and one and isinstance(one[0], float)
        assert other == (pytest.approx(one, rel=1e-5, abs=1e-9, nan_ok=True) if numbers else one)
    assert there.keys() == here.keys()
    for name, own in there.items():
        tolerance = 1e-4 if name.startswith("parameter") else 1e-5
        torch.testing.assert_close(
            here[name],
            own,
            rtol=tolerance,
            atol=1e-6,
            equal_nan=True,
            msg=lambda words, name=name: f"{name}: {words}",
        )
