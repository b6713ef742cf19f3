"""Faults, planted in a program's training, and what is then true of the run."""

import math
import random
import statistics
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gradkeel as gk
from gradkeel.errors import TooManySkipsError

from benchmarks.faults.held_out import HELD_OUT
from benchmarks.faults.programs import DEVELOPMENT, Batch, Program

PROGRAMS = HELD_OUT | DEVELOPMENT

STEPS = 200
WARM_UP = 80
FAULTS = (
    "healthy", "healthy_clip", "lr", "lr_clip", "warmup", "warmup_clip", "bad_batch", "bad_sample", "shuffled",
    "nan_forward", "nan_backward", "overflow", "init30", "attention", "beta2", "frozen",
)  # fmt: skip
# The cause that may rightly be named.
CAUSES = {
    "bad_batch": {"batch"}, "bad_sample": {"sample"}, "nan_forward": {"numerics"}, "nan_backward": {"numerics"},
    "overflow": {"numerics"}, "shuffled": {"batch"}, "lr": {"learning_rate"}, "lr_clip": {"learning_rate"},
    "warmup": {"learning_rate"}, "warmup_clip": {"learning_rate"}, "init30": {"initialization"},
    "beta2": {"batch", "second_moment_lag"},
}  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What was planted, and what came of it.

    Attributes:
        family, fault, optimizer: of the run.
        step: from which on the fault acts; None for a healthy run.
        place: names of the parameters that the fault sits in; () where it sits in none.
        sample: index of the bad sample.
        blew_up: whether the loss ended above where it began, or was not finite.
        learned: whether the loss ended well below where it began.
        recovered: whether the loss came back to what it was before the fault.
        losses, norms: of every step.
    """

    family: str
    fault: str
    optimizer: str
    step: int | None
    place: tuple[str, ...]
    sample: int | None
    blew_up: bool
    learned: bool
    recovered: bool
    losses: tuple[float, ...]
    norms: tuple[float, ...]

    @property
    def harmed(self) -> bool:
        """Whether loss or norm at the fault stood out at all: from what is usual, and from all that had been lately."""
        if self.step is None:
            return False
        first = self.step - 1

        def stood_out(values: tuple[float, ...]) -> bool:
            past, now = [abs(v) for v in values[max(0, first - 30) : first]], values[first : first + 3]
            return max(map(abs, now), default=0.0) > max(3 * _level(past), 1.5 * max(past, default=0.0))

        return stood_out(self.losses) or stood_out(self.norms)

    @property
    def verdicts(self) -> set[str]:
        """What the run may rightly be called; empty where the fault did no harm, so that nothing is asked."""
        if self.fault.startswith("healthy"):
            return {"healthy"}
        if self.fault in ("nan_forward", "nan_backward", "overflow"):
            # An overflow behind which a bounded function stands is no inf any more.
            is_seen = self.fault == "nan_backward" or self.blew_up or not all(map(math.isfinite, self.norms))
            return {"non_finite"} if is_seen else set()
        if self.fault == "frozen":
            return {"vanishing"}
        if self.fault.startswith(("lr", "warmup")):
            early = "diverged_from_start" if self.fault.startswith("lr") else "diverged_in_warmup"
            if not self.blew_up:
                return set() if self.learned else {early, "stalled"}
            names = {early, "clipping_hides_divergence"} if self.fault.endswith("clip") else {early}
            stood = _level(list(self.losses[WARM_UP : WARM_UP + 20])) < self.losses[0]
            return names | ({"diverged"} if self.fault.startswith("warmup") and stood else set())
        if self.fault == "init30":
            return {"diverged_from_start"} if self.blew_up else set()
        if self.fault == "attention":
            return {"drift", "spike_unrecovered", "diverged"} if not self.recovered else set()
        if self.recovered and not self.harmed:
            return set()
        return {"spike_recovered"} if self.recovered else {"spike_unrecovered", "diverged"}


class Run:
    """One training run with a fault in it."""

    def __init__(self, family: str, fault: str, seed: int, folder: Path) -> None:
        self.family, self.fault = family, fault
        number = zlib.crc32(f"{family} {fault} {seed}".encode())
        self.rng = random.Random(number)
        torch.manual_seed(number)
        self.program: Program = PROGRAMS[family]()
        self.step = self.rng.randint(110, 150)
        self.sample = self.rng.randrange(16)
        self.kind = "AdamW" if fault == "beta2" else self.rng.choice(self.program.optimizers)
        self.path = folder / f"{family}-{fault}-{seed}.keel"
        if fault == "init30":
            with torch.no_grad():
                self.program.model.get_parameter(f"{self.program.place}.weight").mul_(30)
        self.optimizers = self._optimizers()
        self.rates = [[group["lr"] for group in one.param_groups] for one in self.optimizers]
        clip = fault.endswith("clip") or (
            not fault.startswith(("healthy", "lr", "warmup")) and self.rng.random() < 0.5
        )
        self.guard = gk.attach(
            self.optimizers, "global-norm:1.0" if clip else None, model=self.program.model, record=self.path
        )
        self.now = 0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._plant_op()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        model, high = self.program.model, self.fault.startswith(("lr", "warmup"))
        frozen = f"{self.program.place}.weight" if self.fault == "frozen" else ""
        named = [(name, p) for name, p in model.named_parameters() if name != frozen]
        matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
        if self.kind == "Muon" and not matrices:
            self.kind = "AdamW"  # it is for matrices alone
        still = [{"params": [model.get_parameter(frozen)], "lr": 0.0}] if frozen else []
        if self.kind == "SGD":
            groups = [{"params": [p for _, p in named]}, *still]
            return [torch.optim.SGD(groups, lr=self.rng.choice([5, 20]) if high else 0.02, momentum=0.9)]
        rate = self.rng.choice([0.3, 1.0]) if high else self.program.rate
        betas = (0.9, 0.9999 if self.fault == "beta2" else 0.999)
        if self.kind != "Muon":
            more = {"betas": betas} if self.kind == "AdamW" else {}
            make = getattr(torch.optim, self.kind)
            return [make([{"params": [p for _, p in named]}, *still], lr=rate, **more)]
        others = [p for _, p in named if all(p is not m for m in matrices)]
        muon = torch.optim.Muon(matrices, lr=1.0 if high else 0.01)
        return [muon, torch.optim.AdamW([{"params": others}, *still], lr=rate, betas=betas)]

    def _plant_op(self) -> None:
        """Faults inside the network: from a step on an operation gives what is no number, forward or backward."""
        module = self.program.model.get_submodule(self.program.place)

        def forward(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
            if self.now < self.step:
                return None
            if self.fault == "nan_forward":
                return output + (output - output.amax()).clamp(max=0).log().clamp(min=-1e4) * 0 * math.nan
            if self.fault == "overflow" and output.dtype == torch.float32:
                return (output.half() * 30000 * 30000).float() / 30000 / 30000
            if self.fault == "nan_backward" and output.requires_grad:
                output.register_hook(lambda g: g * math.nan)
            return None

        if self.fault in ("nan_forward", "nan_backward", "overflow"):
            module.register_forward_hook(forward)

    def batch(self) -> Batch:
        """The batch of this step, with what is wrong with it; the last tensor weighs the samples."""
        first, second, *rest = self.program.batch()
        weights = torch.ones(len(first))
        if self.fault == "bad_batch" and self.now == self.step:
            first, weights = (first * 1e3, weights) if first.is_floating_point() else (first, weights * 1e3)
        if self.fault == "bad_sample" and self.now == self.step:
            if first.is_floating_point():
                first = first.clone()
                first[self.sample] *= 3e3
            else:
                weights[self.sample] = 1e4
        if self.fault == "beta2" and self.now >= self.step:
            weights = weights * 100
        if self.fault == "shuffled" and self.now >= self.step:
            second = second[torch.randperm(len(second))]
        return (first, second, *rest, weights)

    def loss(self, batch: Batch) -> Tensor:
        """[] the mean loss of a batch."""
        return (self.program.losses(batch[:-1]) * batch[-1]).mean()

    def train(self) -> Truth:
        """All steps, or as many as the guard lets pass."""
        autopsy = gk.Autopsy(self.guard, loss=self.loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for self.now in range(1, STEPS + 1):
                self.prepare()
                batch = self.batch()
                try:
                    self._step(batch, autopsy)
                except TooManySkipsError:
                    break
        self.guard.detach()
        return self._truth()

    def _step(self, batch: Batch, autopsy: gk.Autopsy[Batch]) -> None:
        with autopsy(batch):
            loss = autopsy.loss()
            loss.backward()
        # Where only the gradient is to jump, the loss is logged as it was before it was weighed.
        shown = (
            self.loss((*batch[:-1], torch.ones_like(batch[-1]))).detach() if self.fault == "beta2" else loss
        )
        self.losses.append(shown.item())
        self.guard.log(loss=shown)
        for one in self.optimizers:
            one.step()
        self.norms.append(self.guard.report.norm)
        for one in self.optimizers:
            one.zero_grad()

    def prepare(self) -> None:
        """What the fault does before a step: to learning rates, or to weights."""
        if self.fault.startswith("warmup") and self.now <= WARM_UP:
            for one, rates in zip(self.optimizers, self.rates, strict=True):
                for group, rate in zip(one.param_groups, rates, strict=True):
                    group["lr"] = rate * self.now / WARM_UP
        if self.fault == "attention" and self.now >= self.step:
            with torch.no_grad():
                for name in self.program.attention:
                    self.program.model.get_parameter(name).mul_(1.15)

    def onset(self, begin: int) -> int | None:
        """The step of the fault; None where a rising learning rate, or nothing, acts at no step of its own."""
        if self.fault.startswith("warmup"):
            return None
        return 1 if begin == 5 or self.fault == "frozen" else self.step

    def _truth(self) -> Truth:
        layer = self.program.place
        names = tuple(n for n, _ in self.program.model.named_parameters() if n.startswith(f"{layer}."))
        place = {
            **dict.fromkeys(("nan_forward", "nan_backward", "overflow", "init30"), names),
            "frozen": (f"{layer}.weight",),
            "attention": self.program.attention,
        }.get(self.fault, ())
        begin = self.step - 1 if self.fault not in ("lr", "lr_clip", "warmup", "warmup_clip", "init30") else 5
        tail, before = _level(self.losses[-20:]), _level(self.losses[max(0, begin - 20) : begin])
        start = _level(self.losses[:3])
        finite = all(map(math.isfinite, self.losses))
        step = None if self.fault.startswith("healthy") else self.onset(begin)
        return Truth(
            self.family, self.fault, self.kind, step, place, self.sample if self.fault == "bad_sample" else None,
            not finite or tail > start + self.program.margin * abs(start), finite and tail < start - 0.1 * abs(start),
            finite and tail < before + max(0.15 * (start - before), 0.1 * abs(before)),
            tuple(self.losses), tuple(self.norms),
        )  # fmt: skip


def _level(values: list[float]) -> float:
    return statistics.median(v if math.isfinite(v) else math.inf for v in values) if values else math.nan


def scenarios(families: tuple[str, ...]) -> list[tuple[str, str]]:
    """Family and fault of each run; attention grows only where there is some."""
    return [
        (family, fault) for family in families for fault in FAULTS
        if fault != "attention" or PROGRAMS[family]().attention
    ]  # fmt: skip


def plant(family: str, fault: str, seed: int, folder: Path) -> Truth:
    """Train with a fault into a record in this folder, and say what is true of the run."""
    return Run(family, fault, seed, folder).train()
