"""Paddle: ``ClipGradByGlobalNorm``, called as Paddle's optimizers call it: it returns new gradients."""

from typing import Any

import torch

from gradkeel.bench import Contender, Gradients
from gradkeel.bench.workload import relative_error

NAME = "Paddle ClipGradByGlobalNorm"
LIBRARY = "paddle"
DTYPES = (torch.float32,)  # no kernel for the others on CPU


def clip(gradients: Gradients, bound: float) -> Contender:
    import paddle

    paddle.set_device("cpu")
    transform = paddle.nn.ClipGradByGlobalNorm(bound)
    true = [paddle.utils.dlpack.from_dlpack(gradient) for gradient in gradients.true]
    parameters = [paddle.base.framework.EagerParamBase(list(g.shape), g.dtype) for g in true]
    held: list[Any] = []

    def prepare() -> None:
        held[:] = [
            (parameter, gradient.clone()) for parameter, gradient in zip(parameters, true, strict=True)
        ]

    def run() -> None:
        held[:] = transform(held)

    def error() -> float:
        left = [torch.from_dlpack(gradient) for _, gradient in held]
        return relative_error(left, gradients.true, min(1.0, bound / gradients.norm))

    return Contender(NAME, run, prepare, error)
