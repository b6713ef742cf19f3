"""And is the norm right?"""

import importlib.util
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import gradkeel as gk
from gradkeel.bench import Quartiles

from benchmarks.speed.answer import Answer, Target

ENTRIES = 2**26
SEEDS = 3


def optax_norm(tensor: Tensor) -> float:
    import jax
    import optax

    return float(jax.jit(optax.global_norm)([jax.dlpack.from_dlpack(tensor)]))


def guarded(tensor: Tensor) -> float:
    """The norm that a guard reports, in float64."""
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = tensor
    guard = gk.attach(torch.optim.SGD([parameter], lr=0.0), None)
    guard.optimizer.step()
    return guard.report.norm


NORMS: Mapping[str, Callable[[Tensor], float]] = {
    "torch get_total_norm": lambda tensor: float(torch.nn.utils.get_total_norm([tensor])),
    "optax global_norm": optax_norm,
    "gradkeel get_total_norm": lambda tensor: float(gk.get_total_norm([tensor])),
    "gradkeel guard": guarded,
}


def ask(rounds: int) -> Answer:
    """67 million normally distributed entries, the worst of three seeds."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    rows = [
        "| relative error of the norm of 67,108,864 entries | float32 | bfloat16 | float16 |",
        "|---|---|---|---|",
    ]
    worst: dict[tuple[str, torch.dtype], float] = {}
    for seed in range(SEEDS):
        drawn = torch.randn(ENTRIES, generator=torch.Generator().manual_seed(seed))
        for dtype in dtypes:
            tensor = drawn.to(dtype)
            true = float(tensor.double().norm())
            for name, norm in NORMS.items():
                if name.startswith("optax") and importlib.util.find_spec("optax") is None:
                    continue
                error = abs(norm(tensor) / true - 1)
                worst[name, dtype] = max(error, worst.get((name, dtype), 0.0))
    for name in dict.fromkeys(name for name, _ in worst):
        cells = [f"{worst[name, dtype]:.0e}" for dtype in dtypes]
        rows.append(f"| {' | '.join([name, *cells])} |")
    error = worst["gradkeel guard", torch.float32]
    measured = Quartiles(error, error, error)
    return Answer(rows=rows, targets=[Target("norm of 67M float32 entries, relative error", 1e-9, measured)])
