"""The traps in optax: run by `benchmarks.traps` in the environment of the peers; prints JSON, one cell a trap."""

import json
import math

import jax
import jax.numpy as jnp
import optax


def clipped(values: jnp.ndarray, norm: float) -> tuple[bool, str]:
    """Clip to norm 1."""
    transform = optax.clip_by_global_norm(1.0)
    before = float(optax.global_norm([values]))
    after, _ = transform.update([values], transform.init([values]))
    after_norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in after)))
    is_right = math.isclose(before, norm, rel_tol=1e-3) and math.isclose(after_norm, 1.0, rel_tol=1e-2)
    return is_right, "" if is_right else f"norm {before:.4g}, after clipping {after_norm:.4g}"


def inf_beside_finite() -> tuple[bool, str]:
    """What becomes of finite entries."""
    gradients = [jnp.array([1.0, 2.0]), jnp.array([math.inf, 1.0])]
    transform = optax.clip_by_global_norm(1.0)
    after, _ = transform.update(gradients, transform.init(gradients))
    return after[0].tolist() == [1.0, 2.0], f"[1, 2] beside an inf becomes {after[0].tolist()}"


def negative() -> tuple[bool, str]:
    """A negative bound."""
    try:
        transform = optax.clip_by_global_norm(-1.0)
        after, _ = transform.update([jnp.array([3.0, 4.0])], transform.init([jnp.zeros(2)]))
    except (TypeError, ValueError) as error:
        return True, type(error).__name__
    return False, f"max_norm=-1 turns [3, 4] into {[round(v, 3) for v in after[0].tolist()]}"


def partition() -> tuple[bool, str]:
    """MultiSteps over mean losses of 3 and 50 items, against their mean over all 53."""
    x = jax.random.normal(jax.random.key(0), (53, 4))
    y = jnp.concatenate([jnp.ones(3), jnp.full(50, 2.0)])

    def loss(w: jnp.ndarray, part: slice) -> jnp.ndarray:
        return jnp.mean(jnp.square(x[part] @ w - y[part]))

    w = jnp.zeros(4)
    optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2)
    state = optimizer.init(w)
    for part in (slice(0, 3), slice(3, 53)):
        updates, state = optimizer.update(jax.grad(loss)(w, part), state, w)
    want = -jax.grad(loss)(w, slice(0, 53))
    error = float(jnp.linalg.norm(updates - want) / jnp.linalg.norm(want))
    return error < 1e-5, f"MultiSteps is off by {error:.2g}"


def main() -> None:
    """Print the cells."""
    half = jnp.full((1000,), 3000.0, dtype=jnp.float16)
    cells = {
        "partition": partition(),
        "12 finite_overflow_fp32": clipped(jnp.full((100,), 1e20), 1e21),
        "13": clipped(half, 94868.3),
        "10 one inf": inf_beside_finite(),
        "23": negative(),
    }
    print(json.dumps({"version": optax.__version__, "cells": cells}))


if __name__ == "__main__":
    main()
