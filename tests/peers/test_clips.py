"""The three clips give what optax, Keras and Paddle give for the same gradients."""

import os

import pytest
import torch

import gradkeel as gk

os.environ.setdefault("KERAS_BACKEND", "torch")

pytestmark = pytest.mark.peers

SHAPES = [(8, 4), (4,), (1, 4), (1,)]
BOUNDS = [0.01, 1.0, 1e4]  # each tensor clipped, some of them, none


def gradients():
    generator = torch.Generator().manual_seed(7)
    return [10.0**power * torch.randn(shape, generator=generator) for power, shape in enumerate(SHAPES, -2)]


def guarded(policy):
    """What an SGD step of size 1 subtracts from zeros: the clipped gradients."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    gk.attach(optimizer, policy)
    for parameter, gradient in zip(parameters, gradients(), strict=True):
        parameter.grad = gradient
    optimizer.step()
    return [-parameter.detach() for parameter in parameters]


def optax(transform, bound):
    library = pytest.importorskip("optax", reason="`make test-peers` installs optax")
    updates = [gradient.numpy() for gradient in gradients()]
    clip = getattr(library, transform)(bound)
    clipped, _ = clip.update(updates, clip.init(updates))
    return [torch.tensor(gradient.tolist()) for gradient in clipped]


def keras(argument, bound):
    library = pytest.importorskip("keras", reason="`make test-peers` installs Keras")
    variables = [library.Variable(torch.zeros(shape)) for shape in SHAPES]
    library.optimizers.SGD(1.0, **{argument: bound}).apply(gradients(), variables)
    return [-variable.value.detach() for variable in variables]


def paddle(clip, bound):
    library = pytest.importorskip("paddle", reason="`make test-peers` installs Paddle")
    pairs = [
        (library.create_parameter(shape, "float32"), library.to_tensor(gradient.numpy()))
        for shape, gradient in zip(SHAPES, gradients(), strict=True)
    ]
    return [torch.from_numpy(gradient.numpy()) for _, gradient in getattr(library.nn, clip)(bound)(pairs)]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("policy", "peer", "name"),
    [
        (gk.ClipByValue, optax, "clip"),
        (gk.ClipByValue, keras, "clipvalue"),
        (gk.ClipByValue, paddle, "ClipGradByValue"),
        (gk.ClipByNorm, keras, "clipnorm"),
        (gk.ClipByNorm, paddle, "ClipGradByNorm"),
        (gk.ClipByGlobalNorm, optax, "clip_by_global_norm"),
        (gk.ClipByGlobalNorm, keras, "global_clipnorm"),
        (gk.ClipByGlobalNorm, paddle, "ClipGradByGlobalNorm"),
    ],
)
def test_same_gradients_in_same_gradients_out(policy, peer, name, bound):
    # The peers take norms in fp32: a few roundings of 6e-8 in the sum, the root and the quotient.
    torch.testing.assert_close(guarded(policy(bound)), peer(name, bound), rtol=2e-6, atol=0.0)
