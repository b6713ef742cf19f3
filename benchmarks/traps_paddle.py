"""The traps in Paddle: run by `benchmarks.traps` in the environment of the peers; prints JSON, one cell a trap."""

import json
import math
import sys
from collections.abc import Sequence

import paddle


def clipped(clip: object, values: Sequence[float]) -> list[float]:
    """What one of Paddle's clips makes of a gradient, called as its optimizers call it."""
    parameter = paddle.create_parameter([len(values)], "float32")
    ((_, gradient),) = clip([(parameter, paddle.to_tensor(values, dtype="float32"))])
    found: list[float] = gradient.tolist()
    return found


def bounded(clip: object, values: Sequence[float]) -> tuple[bool, str]:
    """A gradient above the bound should have the norm 1 afterwards."""
    norm = math.hypot(*clipped(clip, values))
    is_right = math.isclose(norm, 1.0, rel_tol=1e-2)
    return is_right, "" if is_right else f"after clipping {norm:.4g}"


def inf_beside_finite() -> tuple[bool, str]:
    """What becomes of a finite gradient."""
    parameters = [paddle.create_parameter([2], "float32") for _ in range(2)]
    gradients = [paddle.to_tensor(values) for values in ([1.0, 2.0], [math.inf, 1.0])]
    left = paddle.nn.ClipGradByGlobalNorm(1.0)(list(zip(parameters, gradients, strict=True)))[0][1].tolist()
    return left == [1.0, 2.0], f"[1, 2] beside an inf becomes {left}"


def negative() -> tuple[bool, str]:
    """A negative bound."""
    try:
        left = clipped(paddle.nn.ClipGradByGlobalNorm(-1.0), [3.0, 4.0])
    except (TypeError, ValueError) as error:
        return True, type(error).__name__
    return False, f"max_norm=-1 turns [3, 4] into {[round(v, 3) for v in left]}"


def main() -> None:
    """Print the cells."""
    paddle.set_device("cpu")
    cells = {
        "12 finite_overflow_fp32": bounded(paddle.nn.ClipGradByGlobalNorm(1.0), [1e20] * 100),
        "12 one entry of 2e19": bounded(paddle.nn.ClipGradByNorm(1.0), [2e19]),
        "10 one inf": inf_beside_finite(),
        "23": negative(),
    }
    sys.stdout.write(json.dumps({"version": paddle.__version__, "cells": cells}) + "\n")


if __name__ == "__main__":
    main()
