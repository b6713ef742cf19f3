"""What gradkeel runs on, which code measures and scales gradients there, and whether that code is right.

For ``gradkeel doctor``, which prints it. Nothing is timed, and nothing outside is changed.
"""

import importlib.metadata
import math
import platform
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import gradkeel
from gradkeel.apply import apply
from gradkeel.kernels import native, triton_host
from gradkeel.measure import powers
from gradkeel.norms import Decision, GradientNorms, combine
from gradkeel.record.notes import plain

# Entries of such sizes fit each dtype, but the squares of the second and third do not.
_SIZES = {
    torch.float32: (1.0, 1e20, 1e-30),
    torch.bfloat16: (1.0, 1e20, 1e-30),
    torch.float16: (1.0, 1e4, 1e-6),
    torch.float64: (1.0, 1e200, 1e-200),
}
_ENTRIES = 10_007  # no multiple of anything that a kernel works on at once
_FACTOR = 0.75  # exact in every dtype, so each product is rounded once
# The native kernels add up to 1,024 numbers in float32 where they have 16 bits, torch's operations up to 4,096 of all.
_TOLERANCE = {"native": 1e-6, "triton": 1e-12, "torch": 5e-6, "foreach": 5e-6}


@dataclass(frozen=True, slots=True)
class Route:
    """Which code measures and scales the gradients on one kind of device."""

    device: str  # as torch names it
    path: str  # native or torch on CPU, triton or foreach on an accelerator
    name: str | None = None  # the accelerator's own name
    level: str | None = None  # the processor's features that the native kernels use
    threads: int | None = None  # how many threads work on a CPU
    shares_threads: bool | None = None  # whether these are torch's own OpenMP threads
    reason: str | None = None  # why the kernels are not in use
    remedy: str | None = None  # what one can do about it


@dataclass(frozen=True, slots=True)
class Check:
    """How a route's results compare with float64, on tensors of every dtype with ordinary, large and tiny entries."""

    device: str  # as torch names it
    tensors: int = 0  # how many there were
    norm_error: float = 0.0  # largest relative error of a norm
    tolerance: float = 0.0  # the largest that is right
    wrong_entries: int = 0  # how many entries are not what scaling by 0.75 makes of them
    unseen: int = 0  # how many tensors with a NaN or inf have a finite norm
    failure: str | None = None  # what was raised instead

    @property
    def is_right(self) -> bool:
        """Whether all of it agrees."""
        return (
            self.failure is None
            and self.norm_error <= self.tolerance
            and self.wrong_entries == self.unseen == 0
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that ``gradkeel doctor`` says."""

    gradkeel: str
    torch: str
    python: str
    platform: str
    cpu: Route
    accelerator: Route | None  # None where torch can use none
    checks: tuple[Check, ...]  # one for each of them
    missing: dict[str, tuple[str, ...]]  # packages that are not installed, by the extra that asks for them

    @property
    def is_healthy(self) -> bool:
        """Whether every check is right."""
        return all(check.is_right for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The fields and verdicts, as JSON has them."""
        checks = [{**asdict(check), "is_right": check.is_right} for check in self.checks]
        told = {"version": 1, **asdict(self), "is_healthy": self.is_healthy, "checks": checks}
        return plain(told)


def diagnose() -> Diagnosis:
    """Gather the facts, and check every route; takes about a tenth of a second on CPU, and syncs the accelerator."""
    cpu, accelerator = cpu_route(), accelerator_route()
    return Diagnosis(
        gradkeel=gradkeel.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=cpu,
        accelerator=accelerator,
        checks=tuple(check(route) for route in (cpu, accelerator) if route is not None),
        missing=missing_packages(),
    )


def cpu_route() -> Route:
    """Which code measures gradients on CPU."""
    kernels, threads = native.kernels(), torch.get_num_threads()
    if kernels is None:
        return Route("cpu", "torch", threads=threads, reason=native.unavailable(), remedy=native.remedy())
    return Route(
        "cpu",
        "native",
        level=kernels.level,
        threads=threads if kernels.shares_threads else 1,
        shares_threads=kernels.shares_threads,
    )


def accelerator_route() -> Route | None:
    """Which code measures gradients on the accelerator; None where torch can use none."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    assert device is not None, "there is one"
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    here = torch.empty(0, device=device).device  # with its index
    reason = triton_host.unavailable(here)
    if reason is None:
        return Route(device.type, "triton", name)
    return Route(device.type, "foreach", name, reason=reason, remedy=triton_host.remedy(here))


def check(route: Route) -> Check:
    """Measure and scale tensors of known norms on this route."""
    try:
        return _check(route)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
        return Check(route.device, failure=f"{type(error).__name__}: {error}")


def _check(route: Route) -> Check:
    device = torch.device(route.device)
    generator = torch.Generator().manual_seed(0)
    samples = [
        (torch.randn(_ENTRIES, generator=generator, dtype=torch.float64, device="cpu") * size).to(dtype)
        for dtype, sizes in _SIZES.items()
        if dtype != torch.float64 or powers.wide_dtype(device) == torch.float64
        for size in sizes
    ]
    parameters = [torch.zeros_like(sample, device=device) for sample in samples]
    gradients = [sample.to(device, copy=True) for sample in samples]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norms = powers.read(gradients, 2.0, device).norms
    # As a step would, whose policy wants all of them scaled.
    names = tuple(f"sample.{i}" for i in range(len(samples)))
    measured = GradientNorms(names, norms, combine(norms, 2.0), 2.0, groups=(0,) * len(names), step=1)
    apply(parameters, Decision(coefficients=norms.new_full((), _FACTOR)), measured, prescale=1.0)
    scaled = [(sample.double() * _FACTOR).to(sample.dtype) for sample in samples]
    bad = [torch.tensor([1.0, entry], device=device) for entry in (math.nan, math.inf, -math.inf)]
    return Check(
        route.device,
        tensors=len(samples),
        norm_error=max(map(_error, norms.tolist(), samples)),
        tolerance=_TOLERANCE[route.path],
        wrong_entries=sum(int((a.cpu() != b).sum()) for a, b in zip(gradients, scaled, strict=True)),
        unseen=int(powers.read(bad, 2.0, device).norms.isfinite().sum()),
    )


def _error(norm: float, sample: Tensor) -> float:
    # hypot neither overflows nor is it torch's.
    error = abs(norm / math.hypot(*sample.double().tolist()) - 1)
    return math.inf if math.isnan(error) else error


def missing_packages() -> dict[str, tuple[str, ...]]:
    """For each extra, the packages that it asks for and that are not installed; {} where gradkeel itself is not."""
    try:
        metadata = importlib.metadata.metadata("gradkeel")
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for requirement in metadata.get_all("Requires-Dist") or ():
        parts = re.match(r"([\w.-]+).*;.*extra\s*==\s*['\"]([\w.-]+)['\"]", requirement)
        if parts is None or parts[2] in {"all", "dev"}:
            continue
        lacking = found.setdefault(parts[2], [])
        if not _is_installed(parts[1]):
            lacking.append(parts[1])
    return {extra: tuple(lacking) for extra, lacking in sorted(found.items())}


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
