"""The same gradients in, the same gradients out: every pair of a gradkeel policy and a peer that share a formula.

    .venv-peers/bin/python -m benchmarks.parity            # prints the table
    .venv-peers/bin/python -m benchmarks.parity --write    # also writes it into docs/comparison.md

`make test-peers` makes that environment, and asserts what the table shows. A peer that is not installed is left out.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

import gradkeel as gk
from gradkeel import policies as gp

from benchmarks.pages import put

os.environ.setdefault("KERAS_BACKEND", "torch")


SHAPES = [(8, 4), (4,), (2, 4), (1,), (6, 3, 2, 2)]
BOUNDS = [0.01, 1.0, 1e4]  # every tensor clipped, some of them, none

# gradkeel sums in float64, the peers in float32: a few roundings of 6e-8 in the sum, the root and the quotient, and
# for torch the same in its own foreach kernel.
TOLERANCE = 2e-6

Clip = Callable[[list[Tensor], list[Tensor], float], list[Tensor]]


@dataclass(frozen=True)
class Pair:
    """A policy and the peer's call that shares its formula; ``note`` says where they part."""

    policy: Callable[[float], gk.policies.Policy]
    peer: str
    call: str
    clip: Clip
    note: str = ""

    @property
    def library(self) -> str:
        """The module that must be there."""
        return self.peer.lower()


def tensors(seed: int) -> list[Tensor]:
    """Float32 tensors whose sizes lie a power of ten apart."""
    generator = torch.Generator().manual_seed(seed)
    return [10.0**power * torch.randn(shape, generator=generator) for power, shape in enumerate(SHAPES, -2)]


def guarded(policy: gk.policies.Policy, gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The gradients that gradkeel leaves for the optimizer."""
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = torch.optim.SGD(parameters, lr=1e-30)
    guard = gk.attach(optimizer, policy)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    guard.detach()
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


def torch_norm(gradients: list[Tensor], weights: list[Tensor], bound: float) -> list[Tensor]:
    """``torch.nn.utils.clip_grad_norm_``."""
    return _torch(gradients, lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, bound))


def torch_value(gradients: list[Tensor], weights: list[Tensor], bound: float) -> list[Tensor]:
    """``torch.nn.utils.clip_grad_value_``."""
    return _torch(gradients, lambda parameters: torch.nn.utils.clip_grad_value_(parameters, bound))


def _torch(gradients: list[Tensor], clip: Callable[[list[Tensor]], object]) -> list[Tensor]:
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    clip(parameters)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def optax(transform: str) -> Clip:
    """An optax transformation of this name."""

    def clip(gradients: list[Tensor], weights: list[Tensor], bound: float) -> list[Tensor]:
        import optax as library

        made = getattr(library, transform)(bound)
        # optax counts units in the layout of JAX: outputs last.
        updates, params = ([_outputs_last(t).numpy() for t in given] for given in (gradients, weights))
        clipped, _ = made.update(updates, made.init(params), params)
        return [_outputs_first(torch.tensor(gradient.tolist())) for gradient in clipped]

    return clip


def _outputs_last(tensor: Tensor) -> Tensor:
    return tensor.movedim((0, 1), (-1, -2)) if tensor.dim() > 1 else tensor


def _outputs_first(tensor: Tensor) -> Tensor:
    return tensor.movedim((-1, -2), (0, 1)) if tensor.dim() > 1 else tensor


def keras(argument: str) -> Clip:
    """A Keras optimizer's argument of this name."""

    def clip(gradients: list[Tensor], weights: list[Tensor], bound: float) -> list[Tensor]:
        import keras as library

        variables = [library.Variable(torch.zeros_like(gradient)) for gradient in gradients]
        library.optimizers.SGD(1.0, **{argument: bound}).apply([g.clone() for g in gradients], variables)
        return [-variable.value.detach() for variable in variables]

    return clip


def paddle(name: str) -> Clip:
    """A Paddle gradient clip of this name."""

    def clip(gradients: list[Tensor], weights: list[Tensor], bound: float) -> list[Tensor]:
        import paddle as library

        pairs = [
            (library.create_parameter(list(gradient.shape), "float32"), library.to_tensor(gradient.numpy()))
            for gradient in gradients
        ]
        return [torch.from_numpy(gradient.numpy()) for _, gradient in getattr(library.nn, name)(bound)(pairs)]

    return clip


PAIRS = [
    Pair(gp.ClipByValue, "torch", "clip_grad_value_", torch_value),
    Pair(gp.ClipByValue, "optax", "clip", optax("clip")),
    Pair(gp.ClipByValue, "Keras", "clipvalue", keras("clipvalue")),
    Pair(gp.ClipByValue, "Paddle", "ClipGradByValue", paddle("ClipGradByValue")),
    Pair(gp.ClipByNorm, "Keras", "clipnorm", keras("clipnorm")),
    Pair(gp.ClipByNorm, "Paddle", "ClipGradByNorm", paddle("ClipGradByNorm")),
    Pair(
        lambda bound: gp.ClipByGlobalNorm(bound, eps=1e-6),
        "torch",
        "clip_grad_norm_",
        torch_norm,
        "torch adds 1e-6 to the norm; without `eps=1e-6` gradkeel is exact",
    ),
    Pair(gp.ClipByGlobalNorm, "optax", "clip_by_global_norm", optax("clip_by_global_norm")),
    Pair(gp.ClipByGlobalNorm, "Keras", "global_clipnorm", keras("global_clipnorm")),
    Pair(gp.ClipByGlobalNorm, "Paddle", "ClipGradByGlobalNorm", paddle("ClipGradByGlobalNorm")),
    Pair(
        gp.AdaptiveGradientClip,
        "optax",
        "adaptive_grad_clip",
        optax("adaptive_grad_clip"),
        "units in JAX's layout; where all dimensions but one are 1, optax takes the tensor as one unit",
    ),
    Pair(gp.BlockRms, "optax", "clip_by_block_rms", optax("clip_by_block_rms")),
    Pair(
        gp.Normalize,
        "optax",
        "normalize_by_update_norm",
        optax("normalize_by_update_norm"),
        "optax adds 1e-6 to the norm, here of 100 and more",
    ),
]


def is_installed(pair: Pair) -> bool:
    """Whether the peer can be imported."""
    return importlib.util.find_spec(pair.library) is not None


def difference(pair: Pair, bound: float, seed: int = 7) -> float:
    """Largest difference between the two, entry by entry, relative to the entry."""
    gradients, weights = tensors(seed), [tensor.abs() + 0.1 for tensor in tensors(seed + 1)]
    ours = guarded(pair.policy(bound), gradients, weights)
    theirs = pair.clip([gradient.clone() for gradient in gradients], weights, bound)
    pairs = zip(ours, theirs, strict=True)
    return max(float(((a - b).abs() / b.abs().clamp(min=1e-30)).max()) for a, b in pairs)


def table(pairs: Sequence[Pair]) -> str:
    """The parity table as Markdown, with what it was made with."""
    installed = [pair for pair in pairs if is_installed(pair)]
    names = sorted({"paddlepaddle" if pair.library == "paddle" else pair.library for pair in installed})
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines = [
        f"Written by `python -m benchmarks.parity --write` on {datetime.now(UTC).date().isoformat()}",
        f"with Python {platform.python_version()}, {versions}, float32 on CPU.",
        f"Each cell is the largest relative difference of an entry, at bounds of {', '.join(f'{b:g}' for b in BOUNDS)}",
        f"(every tensor clipped, some, none); `make test-peers` asserts that none is above {TOLERANCE:g}.",
        "",
        f"| gradkeel | peer | {' | '.join(f'{bound:g}' for bound in BOUNDS)} | note |",
        f"|---|---|{'---|' * len(BOUNDS)}---|",
    ]
    for pair in installed:
        cells = " | ".join(f"{difference(pair, bound):.1e}" for bound in BOUNDS)
        policy = pair.policy(1.0).spec.partition(":")[0]
        lines.append(f"| `{policy}` | {pair.peer} `{pair.call}` | {cells} | {pair.note} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; write it where asked."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--write", action="store_true", help="write the table into docs/comparison.md")
    text = table(PAIRS)
    print(text)
    if arguments.parse_args().write:
        put("comparison.md", "parity", text)


if __name__ == "__main__":
    main()
