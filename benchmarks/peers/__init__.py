"""One adapter a peer: each makes a `Contender` of the peer's own clip, on the same gradients."""

import importlib.util
from collections.abc import Sequence
from types import ModuleType

from gradkeel.bench import Contender, Gradients

from benchmarks.peers import accelerate_clip, optax_clip, paddle_clip

PEERS = (accelerate_clip, optax_clip, paddle_clip)


def clips(gradients: Gradients, bound: float, peers: Sequence[ModuleType] = PEERS) -> list[Contender]:
    """The clips by global norm of those peers that are installed and have them for this dtype."""
    dtype = gradients.true[0].dtype
    return [
        peer.clip(gradients, bound)
        for peer in peers
        if importlib.util.find_spec(peer.LIBRARY) is not None and dtype in peer.DTYPES
    ]
