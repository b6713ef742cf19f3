"""On a GPU a run comes out as on the CPU: random ones, side by side; so do the functions, and accumulated windows.

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


@pytest.fixture(params=["foreach", "triton"])
def kernels(request, monkeypatch):
    """By which kernels gradients on the GPU are read and written."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv(triton_host.VARIABLE, "on" if request.param == "triton" else "off")
    triton_host.kernels.cache_clear()
    yield
    monkeypatch.undo()
    triton_host.kernels.cache_clear()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", range(2 * len(SPECS)))
def test_a_run_is_the_same_as_on_the_cpu(tmp_path, seed):
    script = Script(seed)
    expected, there = script.play("cpu", tmp_path / "cpu.keel")
    found, here = script.play("cuda", tmp_path / "cuda.keel")
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


DTYPES = [
    [torch.float32], [torch.bfloat16], [torch.float16], [torch.float64], [torch.float32, torch.bfloat16],
    [torch.float32, torch.float64, torch.float16],
]  # fmt: skip
RELATIVE = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.7e-2}
"""Of an entry: one step of its dtype, or that of a norm."""


def strided(gradient, device):
    """The same on a device, with the same strides."""
    own = torch.empty_strided(gradient.shape, gradient.stride(), dtype=gradient.dtype, device=device)
    return own.copy_(gradient)


def drawn_gradients(drawn, generator):
    """Of several dtypes and sizes, some empty, transposed, missing or not finite."""
    dtypes, spoils = drawn.choice(DTYPES), drawn.random() < 0.1
    gradients = []
    for _ in range(drawn.randint(0, 6)):
        shape = drawn.choice([*SHAPES, (0,), (0, 3), (1000,), (5000,)])
        dtype = drawn.choice(dtypes)
        scale = drawn.choice([1, 1, 1e-3, 50] + [1e-20, 1e18] * (dtype != torch.float16))
        gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        if gradient.dim() == 2 and drawn.random() < 0.3:
            gradient = gradient.t().contiguous().t()
        elif spoils and gradient.numel():
            gradient.view(-1)[0] = drawn.choice([math.nan, math.inf])
        gradients.append(gradient if drawn.random() > 0.15 else None)
    return gradients


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("block", range(8))
def test_the_functions_do_the_same_as_on_the_cpu(block):
    for seed in range(40 * block, 40 * (block + 1)):
        drawn = random.Random(seed)
        gradients = drawn_gradients(drawn, torch.Generator().manual_seed(seed))
        norm_type = drawn.choice([2.0, 2.0, 1.0, math.inf, 3.0, 0.5])
        bound, name = (
            drawn.choice([1.0, 1e-3, 1e6, 0.1]),
            drawn.choice(["clip", "value", "total", "clip by total"]),
        )
        raises = drawn.random() < 0.2
        played = []
        for device in ("cpu", "cuda"):
            parameters = []
            for own in gradients:
                shape, dtype = ((3,), torch.float32) if own is None else (own.shape, own.dtype)
                parameters.append(torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))
                parameters[-1].grad = None if own is None else strided(own, device)
            there = [p.grad for p in parameters if p.grad is not None]
            total, refused = torch.zeros(()), None
            try:
                if name == "clip":
                    total = gk.clip_grad_norm_(parameters, bound, norm_type, error_if_nonfinite=raises)
                elif name == "value":
                    gk.clip_grad_value_(parameters, bound)
                else:
                    total = gk.get_total_norm(there, norm_type)
                    if name == "clip by total":
                        gk.clip_grads_with_norm_(parameters, bound, total)
            except RuntimeError as error:
                refused = str(error)
            played.append((refused, total.cpu(), [p.grad for p in parameters]))
        (refused, total, left), (refused_there, total_there, left_there) = played
        assert refused_there == refused, seed
        assert total_there.dtype == total.dtype, seed
        # 4e-6: a total is of float32 where gradients are.
        torch.testing.assert_close(total_there, total, rtol=4e-6, atol=0, equal_nan=True, msg=f"seed {seed}")
        # 1e-7: a step of float16 where it is smallest.
        for one, other in zip(left, left_there, strict=True):
            if one is not None:
                torch.testing.assert_close(
                    other.cpu(), one, rtol=RELATIVE[one.dtype], atol=1e-7, equal_nan=True, msg=f"seed {seed}"
                )


def accumulated(seed, device):
    """What reports and parameters say in the end of a run of windows, by one optimizer or by two as one."""
    drawn, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, beside = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 1)), torch.nn.Linear(6, 1)
    both = torch.nn.ModuleList([model, beside]).to(device)
    spec, fused = SPECS[seed % len(SPECS)], drawn.random() < 0.6
    groups = [both[0].parameters(), both[1].parameters()] if drawn.random() < 0.3 else [both.parameters()]
    optimizers = [torch.optim.AdamW(group, lr=0.01, fused=fused) for group in groups]
    guard = gk.attach(
        optimizers if len(optimizers) > 1 else optimizers[0],
        None if spec == "none" else spec,
        model=both,
        max_consecutive_skips=100,
    )
    windows, reduction = drawn.choice([1, 2, 3]), drawn.choice(["mean", "sum"])
    wide = torch.float64 if drawn.random() < 0.3 else None
    accumulate = gk.Accumulator(guard, windows, reduction=reduction, accumulate_dtype=wide)
    # A gradient that is kept may be zero where the host, which has cleared those of a skipped step, has none.
    told, keeps = [], drawn.random() < 0.5
    for _ in range(10):
        spoilt, alone = drawn.randrange(8), not keeps and drawn.random() < 0.2
        for place in range(windows):
            size = drawn.randint(1, 5)
            inputs, targets = (torch.randn(size, n, generator=generator).to(device) for n in (6, 1))
            with accumulate.micro() as micro:
                loss = (model(inputs) - targets).square()
                if not alone:
                    loss = loss + beside(inputs).square()
                loss = (loss.sum() if reduction == "sum" else loss.mean()) * (
                    math.nan if place == spoilt else 1
                )
                micro.backward(
                    loss, weight=torch.tensor(float(size), device=device) if drawn.random() < 0.4 else size
                )
        for optimizer in optimizers:
            optimizer.step()
        report = guard.report
        told.append((report.stepped, report.reason, report.clipped))
        told.append([report.norm, report.coefficient, report.clipped_norm])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=not keeps)
    guard.detach()
    return told, [parameter.detach().cpu() for parameter in both.parameters()]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", range(len(SPECS)))
def test_windows_come_to_the_same_as_on_the_cpu(seed):
    """To 1e-4: Adam divides small gradients by their own size, and with it what ten steps differ by in rounding."""
    (expected, left), (found, left_there) = accumulated(seed, "cpu"), accumulated(seed, "cuda")
    for one, other in zip(expected, found, strict=True):
        assert other == (
            pytest.approx(one, rel=1e-4, abs=1e-9, nan_ok=True) if isinstance(one, list) else one
        )
    for one, other in zip(left, left_there, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
