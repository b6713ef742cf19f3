"""optax: ``clip_by_global_norm`` under ``jax.jit``, its input donated, so that it may write where it reads.

Compilation is in the first run alone. The arrays are JAX's own copies of the same gradients.
"""

from typing import Any

import torch

from gradkeel.bench import Contender, Gradients
from gradkeel.bench.workload import relative_error

NAME = "optax clip_by_global_norm"
LIBRARY = "optax"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clip(gradients: Gradients, bound: float) -> Contender:
    import jax
    import optax

    transform = optax.clip_by_global_norm(bound)
    compiled = jax.jit(
        lambda updates: transform.update(updates, transform.init(updates))[0], donate_argnums=0
    )
    copied = jax.jit(lambda arrays: [array.copy() for array in arrays])
    true = [jax.dlpack.from_dlpack(gradient) for gradient in gradients.true]
    held: list[Any] = []

    def prepare() -> None:
        held[:] = jax.block_until_ready(copied(true))

    def run() -> None:
        held[:] = jax.block_until_ready(compiled(held))

    def error() -> float:
        left = [torch.from_dlpack(array) for array in held]
        return relative_error(left, gradients.true, min(1.0, bound / gradients.norm))

    return Contender(NAME, run, prepare, error)
