"""What does a clip cost one rank of many, beside what travels?"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import gradkeel as gk
from gradkeel.bench import Contender, Race, Table, race
from gradkeel.bench.contenders import FUNCTION, GUARD, TORCH, NoStep

from benchmarks.speed.answer import Answer, target

RANKS = (8, 512, 4096)
PARAMETERS = 200
SIDE = 64  # entries of this rank's piece of each parameter, squared


@contextmanager
def one_of(ranks: int) -> Iterator[DeviceMesh]:
    """This process as one rank of many, whose collectives cost nothing: torch's fake process group."""
    distributed.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        distributed.destroy_process_group()


def sharded(mesh: DeviceMesh) -> list[nn.Parameter]:
    """Parameters with gradients, as ``fully_shard`` leaves them."""

    def shard() -> DTensor:
        return DTensor.from_local(torch.randn(SIDE, SIDE), mesh, [Shard(0)], run_check=False)

    parameters = [nn.Parameter(shard()) for _ in range(PARAMETERS)]
    for parameter in parameters:
        parameter.grad = shard()
    return parameters


def clips(parameters: list[nn.Parameter], bound: float) -> list[Contender]:
    """Torch's clip as FSDP2's documentation shows it, gradkeel's function, and a guard."""
    optimizer = NoStep(parameters)
    gk.attach(optimizer, gk.ClipByGlobalNorm(bound))
    return [
        Contender(TORCH, lambda: torch.nn.utils.clip_grad_norm_(parameters, bound)),
        Contender(FUNCTION, lambda: gk.clip_grad_norm_(parameters, bound)),
        Contender(GUARD, optimizer.step),
    ]


def attaching(mesh: DeviceMesh, rounds: int) -> Race:
    """`attach` and one step, beside torch's clip."""
    parameters = sharded(mesh)

    def attach() -> None:
        gk.attach(NoStep(parameters), gk.ClipByGlobalNorm(1e9)).detach()

    return race([*clips(parameters, 1e9)[:1], Contender("gradkeel attach", attach)], rounds=rounds)


def ask(rounds: int) -> Answer:
    """Sharded parameters on jobs of several sizes; the norm is below the bound."""
    tables, targets = [], []
    words = f"{PARAMETERS} FSDP2 parameters, {{}} ranks, {{}}, to torch"
    for ranks in RANKS:
        with one_of(ranks) as mesh:
            found = race(clips(sharded(mesh), 1e9), rounds=rounds)
            attached = attaching(mesh, rounds)
        tables.append(Table(f"{PARAMETERS} sharded parameters, one of {ranks:,} ranks", found))
        tables.append(Table(f"Attach, one of {ranks:,} ranks", attached))
        targets += [target(words.format(f"{ranks:,}", own), 1.0, found, own) for own in (FUNCTION, GUARD)]
    return Answer(tables, targets)
