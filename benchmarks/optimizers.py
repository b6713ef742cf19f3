"""Optimizers from outside torch under the guard: attach, the clip beside torch's, a skip bit by bit, the state.

Run it as ``python -m benchmarks.optimizers`` in the environment of ``make test-optimizers``; ``--write`` writes the
page anew.
"""

import contextlib
import copy
import importlib
import io
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import gradkeel as gk

PAGE = Path(__file__).resolve().parents[1] / "docs" / "optimizers.md"
# The module to import, and the distribution that it comes from.
PACKAGES = {
    "pytorch_optimizer": "pytorch_optimizer",
    "torch_optimizer": "torch-optimizer",
    "schedulefree": "schedulefree",
    "dadaptation": "dadaptation",
    "optimi": "torch-optimi",
    "adam_atan2_pytorch": "adam-atan2-pytorch",
    "lion_pytorch": "lion-pytorch",
    "prodigyopt": "prodigyopt",
    "adabelief_pytorch": "adabelief-pytorch",
    "adan_pytorch": "adan-pytorch",
    "came_pytorch": "came-pytorch",
    "transformers.optimization": "transformers",
}
BOUND, LR = 0.05, 0.01
CLIPS = (None, BOUND, BOUND * (1 + 3e-7))
"""What torch clips to: nothing where a guard does it, the bound, and one that differs by a rounding."""
Parameters = list[nn.Parameter]


def matrices(model: nn.Module) -> Parameters:
    """What Muon is for."""
    return [p for p in model.parameters() if p.dim() == 2]


def vectors(model: nn.Module) -> Parameters:
    """What it is not for."""
    return [p for p in model.parameters() if p.dim() != 2]


def base(model: nn.Module) -> SGD:
    """What wrappers wrap."""
    return SGD(model.parameters(), lr=LR, momentum=0.9)


Make = Callable[[Any, nn.Module], Any]


def around(kind: Any, model: nn.Module) -> Any:
    """A wrapper around another optimizer."""
    return kind(base(model))


def with_base(kind: Any, model: nn.Module) -> Any:
    """One that makes its inner optimizer itself."""
    return kind(list(model.parameters()), base_optimizer=SGD, lr=LR)


def in_groups(kind: Any, model: nn.Module) -> Any:
    """One that takes matrices and the rest apart by a key of its groups."""
    groups = [{"params": matrices(model), "use_muon": True}, {"params": vectors(model), "use_muon": False}]
    return kind(groups, lr=LR)


def in_lists(kind: Any, model: nn.Module) -> Any:
    """One that takes them as two lists."""
    return kind(matrices(model), vectors(model), lr=LR)


# Those that cannot be made of parameters and a learning rate alone.
MAKE: dict[str, Make] = {
    "pytorch_optimizer.AdaGO": in_groups,
    "pytorch_optimizer.AdaMuon": in_groups,
    "pytorch_optimizer.AdamMini": lambda kind, model: kind(model, lr=LR),
    "pytorch_optimizer.BSAM": lambda kind, model: kind(list(model.parameters()), num_data=16, lr=LR),
    "pytorch_optimizer.FriendlySAM": with_base,
    "pytorch_optimizer.LookSAM": with_base,
    "pytorch_optimizer.Lookahead": around,
    "pytorch_optimizer.Muon": in_groups,
    "pytorch_optimizer.NorMuon": in_groups,
    "pytorch_optimizer.OrthoGrad": around,
    "pytorch_optimizer.Ranger21": lambda kind, model: kind(list(model.parameters()), 100, lr=LR),
    "pytorch_optimizer.SAM": with_base,
    "pytorch_optimizer.ScheduleFreeWrapper": around,
    "pytorch_optimizer.SpectralSphere": lambda kind, model: kind(matrices(model), lr=LR),
    "pytorch_optimizer.TRAC": around,
    "pytorch_optimizer.WSAM": lambda kind, model: kind(model, list(model.parameters()), SGD, lr=LR),
    "torch_optimizer.Lookahead": around,
    "schedulefree.ScheduleFreeWrapper": around,
    "schedulefree.ScheduleFreeWrapperReference": around,
    "adam_atan2_pytorch.MuonAdamAtan2": in_lists,
    "adam_atan2_pytorch.PolarAdamAtan2": in_lists,
    "transformers.optimization.Adafactor": lambda kind, model: kind(
        list(model.parameters()), lr=LR, relative_step=False, scale_parameter=False
    ),
}
# Those that step by a closure, by their names' ends.
BY_CLOSURE = ("SAM", "LBFGS", "Closure")
# Those whose backward pass must leave a graph behind.
WITH_GRAPH = ("AdaHessian", "Adahessian", "SophiaH")
LEFT_OUT = {
    "pytorch_optimizer.LOMO": "steps inside of backward",
    "pytorch_optimizer.AdaLOMO": "steps inside of backward",
    "pytorch_optimizer.GSAM": "its closure computes logits of its own",
    "pytorch_optimizer.PCGrad": "several losses, each with a gradient of its own; no torch optimizer",
    "pytorch_optimizer.SafeFP16Optimizer": "holds a copy of the weights; no torch optimizer",
    "pytorch_optimizer.DeMo": "needs a process group",
    "pytorch_optimizer.DistributedMuon": "needs a process group",
    "pytorch_optimizer.MuonClip": "needs a transformer's attention",
    "pytorch_optimizer.CPUOffloadOptimizer": "needs CUDA",
    "torch_optimizer.Optimizer": "torch's own",
    "transformers.optimization.LayerWiseDummyOptimizer": "steps nothing; its layers have optimizers of their own",
}


@dataclass(frozen=True)
class Case:
    """One optimizer class of one package."""

    package: str
    kind: Any

    @property
    def name(self) -> str:
        """Package and class."""
        return f"{self.package}.{self.kind.__name__}"

    @property
    def by_closure(self) -> bool:
        """Whether its step is called with a closure."""
        return self.kind.__name__.endswith(BY_CLOSURE)

    def make(self, model: nn.Module) -> Any:
        """The optimizer of a model's parameters, ready to train."""
        with contextlib.redirect_stdout(io.StringIO()):
            if self.name in MAKE:
                optimizer = MAKE[self.name](self.kind, model)
            else:
                optimizer = self.kind(list(model.parameters()), lr=LR)
            if hasattr(optimizer, "train"):
                optimizer.train()
        return optimizer


@dataclass
class Row:
    """What came of one optimizer: "yes" in a column, or what else."""

    attach: str = "yes"
    clip: str = ""
    skip: str = ""
    state: str = ""

    @property
    def is_sound(self) -> bool:
        """Whether all is as it should be, or the optimizer is refused."""
        return set(astuple(self)[1:]) <= {"yes"} or self.attach != "yes"


def cases() -> Iterator[Case]:
    """Every optimizer of the packages that are installed here."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for kind in dict.fromkeys(v for v in vars(module).values() if isinstance(v, type)):
            if not kind.__module__.startswith(package.partition(".")[0]):
                continue
            case = Case(package, kind)
            if (issubclass(kind, Optimizer) or case.name in MAKE) and case.name not in LEFT_OUT:
                yield case


def problem(case: Case) -> nn.Module:
    """The same small model each time."""
    torch.manual_seed(0)
    bias = case.name != "pytorch_optimizer.SpectralSphere"
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias))


def attach(optimizer: Any, model: nn.Module) -> gk.guard.Guard:
    """Torch's epsilon, so that the two clips differ by rounding alone."""
    return gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND, eps=1e-6), model=model)


def step(
    case: Case, model: nn.Module, optimizer: Any, number: int, *, clip: float | None, spoil: bool = False
) -> None:
    """One step; torch clips it to ``clip``, and its gradient is NaN where asked."""
    torch.manual_seed(number)
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))

    def closure(*, clip: float | None = clip, spoil: bool = spoil) -> Tensor:
        model.zero_grad()
        loss = (model(inputs) - 1.0).square().mean()
        loss.backward(create_graph=case.kind.__name__ in WITH_GRAPH)
        if spoil:
            next(p.grad for p in model.parameters() if p.grad is not None).data.view(-1)[0] = math.nan
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        return loss

    with contextlib.redirect_stdout(io.StringIO()):
        if case.by_closure:
            closure(clip=None, spoil=False)  # SAM perturbs along it
            optimizer.step(closure)
        else:
            loss = closure()
            # AliG's closure tells the loss of a backward pass that is over.
            optimizer.step(*[lambda: float(loss)] * (case.kind.__name__ == "AliG"))


def contents(model: nn.Module, optimizer: Any) -> Any:
    """A copy of all that a step may change: parameters, states, settings and counters, of inner optimizers too."""
    held = [optimizer, *(value for value in vars(optimizer).values() if isinstance(value, Optimizer))]
    # Torch's scheduler and profiler, and the guard, keep their own attributes beginning with an underscore.
    counters = [
        {k: v for k, v in vars(o).items() if isinstance(v, int | float | Tensor | list) and k[0] != "_"}
        for o in held
    ]
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in held]
    return copy.deepcopy(
        ([p.detach() for p in model.parameters()], [list(o.state.values()) for o in held], groups, counters)
    )


def is_same(one: Any, other: Any) -> bool:
    """Whether two nested contents are equal, bit by bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        if not both or (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        # By their bytes: a NaN is the same as itself, and as nothing else.
        return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other)))
    if isinstance(one, dict) and isinstance(other, dict):
        own, others = ([k for k in d if not isinstance(k, Tensor)] for d in (one, other))
        return own == others and is_same(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, bool | int | float | str | None):
        return type(one) is type(other) and (one == other or one != one)
    return type(one) is type(other)  # modules and functions, which no step changes


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of parameters, relative to the largest entry."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    top = max(float(p.abs().max()) for _, p in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / top


def beside(guarded: nn.Module, by_hand: nn.Module, other: nn.Module) -> str:
    """Whether two are the same but for what rounding makes of them, as `other` tells.

    That one was clipped to another bound, by less than a rounding of the gradient's norm: signs, QR decompositions
    and roots of tiny moments make much of it.
    """
    largest = difference(guarded, by_hand)
    return "yes" if largest <= max(1e-4, 10 * difference(other, by_hand)) else f"differs by {largest:.0e}"


def check_clip(case: Case) -> str:
    """Four guarded steps beside four of torch's clip."""
    models = [problem(case) for _ in range(3)]
    optimizers = [case.make(model) for model in models]
    guard = attach(optimizers[0], models[0])
    for number in range(4):
        for model, optimizer, clip in zip(models, optimizers, CLIPS, strict=True):
            step(case, model, optimizer, number, clip=clip)
    if not guard.report.clipped:
        return "never clipped"
    return beside(*models)


def check_skip(case: Case) -> str:
    """A NaN in the first step, and one in the third, must leave everything as it was."""
    model = problem(case)
    optimizer = case.make(model)
    guard = attach(optimizer, model)
    for number in range(4):
        before = contents(model, optimizer)
        step(case, model, optimizer, number, clip=None, spoil=number in (0, 2))
        if number in (0, 2):
            if guard.report.stepped:
                return "not skipped"
            changed = [
                what
                for what, a, b in zip(
                    ("parameters", "state", "groups", "attributes"),
                    contents(model, optimizer),
                    before,
                    strict=True,
                )
                if not is_same(a, b)
            ]
            if changed:
                return f"{' and '.join(changed)} changed"
    return "yes"


def keys(state: Any) -> Any:
    """The nested keys of a state."""
    if isinstance(state, dict):
        return {key: keys(value) for key, value in state.items()}
    return [keys(value) for value in state] if isinstance(state, list) else None


def check_state(case: Case) -> str:
    """The guard leaves nothing in the optimizer's state, which loads and goes on as without it."""
    results = []
    for clip in CLIPS:
        guarded, model = clip is None, problem(case)
        optimizer = case.make(model)
        if guarded:
            attach(optimizer, model)
        step(case, model, optimizer, 0, clip=clip)
        state = None
        try:
            state = copy.deepcopy(optimizer.state_dict())
            again = case.make(model)
            if guarded:
                attach(again, model)
            again.load_state_dict(state)
            step(case, model, again, 1, clip=clip)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            results.append((keys(state), type(error).__name__, model))
            continue
        results.append((keys(state), "", model))
    (own, error, model), (wanted, plain_error, plain), (_, _, other) = results
    if own != wanted:
        return "other keys"
    if error != plain_error:
        return f"{error} on loading"
    if error:
        return "yes"  # it cannot load its own, with or without a guard
    return beside(model, plain, other)


def examine(case: Case) -> Row:
    """All of it for one optimizer."""
    model = problem(case)
    try:
        attach(case.make(model), model)
    except (gk.GradkeelError, TypeError) as error:
        return Row(attach=f"refused: {error}")
    return Row("yes", check_clip(case), check_skip(case), check_state(case))


def main() -> None:
    """Print the table, or write the page."""
    warnings.simplefilter("ignore")
    rows = []
    for case in cases():
        rows.append((case, examine(case)))
        if "--write" not in sys.argv:
            print(case.name, *astuple(rows[-1][1]), sep=" | ")
    if "--write" in sys.argv:
        PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: list[tuple[Case, Row]]) -> str:
    """The page: what was asked, the optimizers of each package, and the exceptions."""
    versions = {package: metadata.version(name) for package, name in PACKAGES.items()}
    lines = [
        "# Optimizers from outside torch",
        "",
        "What `make test-optimizers` finds; `ARGS=--write` writes this page.",
        "",
        "Asked of each, on a small network:",
        "",
        "- **attach**: can it be guarded, or is it refused with what to do instead?",
        "- **clip**: are four guarded steps those of `torch.nn.utils.clip_grad_norm_`? Parameters may differ by 1e-4 "
        "of the largest, or by ten times what a change of the bound by 3e-7 makes of them: signs and QR "
        "decompositions make much of a rounding.",
        "- **skip**: is everything bit-identical after a NaN in the first and in the third step: parameters, state, "
        "settings of the groups, and the optimizer's own counters?",
        "- **state**: are the keys of `state_dict()` those without a guard, and does a loaded one go on alike?",
        "",
        "<!-- figures -->",
        f"{len(rows)} optimizers of {len(PACKAGES)} packages under the guard, as `make test-optimizers` finds them; "
        f"torch {torch.__version__.partition('+')[0]}, CPU, {datetime.now(UTC):%Y-%m-%d}.",
        "",
        "| package | version | all four hold for |",
        "|---|---|---|",
    ]
    for package, name in PACKAGES.items():
        own = [
            case.kind.__name__ for case, row in rows if case.package == package and row.is_sound and row.clip
        ]
        lines.append(f"| {name} | {versions[package]} | {len(own)}: {', '.join(sorted(own)) or 'none'} |")
    others = [(case, row) for case, row in rows if not (row.is_sound and row.clip)]
    lines += ["", "The others:", "", "| optimizer | attach | clip | skip | state |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join([case.name, *astuple(row)])} |" for case, row in others]
    lines += ["", "Not tried:", "", "| optimizer | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in LEFT_OUT.items()]
    lines += [
        "<!-- end of figures -->",
        "",
        "SAM and its kin are guarded where `step` is given a closure; the gradient along which they perturb belongs to "
        "the loop, and is neither measured nor clipped.",
        "Optimizers that normalize their update, as Muon, Lion and other sign methods do, hardly feel a clip; they are "
        "skipped like any other.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
