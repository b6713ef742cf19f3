"""And for small models, where people train on the CPU: how long does clipping take in one thread?"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import gradkeel as gk
from gradkeel.bench import Gradients, Quartiles, Race, Table, race
from gradkeel.bench.contenders import FUNCTION, TORCH, NoStep, clip_functions, guard_alone
from gradkeel.bench.stopwatch import Contender, quartiles
from gradkeel.policies import AdaGC, AutoClip, ClipByGlobalNorm, Policy, ZClip

from benchmarks.speed.answer import Answer, Target, bound, target


def _mlp() -> list[nn.Sequential]:
    return [nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))]


def _actor_and_critic() -> list[nn.Sequential]:
    return [
        nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        for _ in range(2)
    ]


def _deep() -> list[nn.Sequential]:
    layers = [nn.Linear(64, 64, bias=False) for _ in range(60)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)  # so that gradients reach the first
    return [nn.Sequential(*(part for layer in layers for part in (nn.ReLU(), layer)))]


NETWORKS = {
    "MLP, 4 tensors": _mlp,
    "two networks of PPO, 12 tensors": _actor_and_critic,
    "60 tensors of 64 x 64": _deep,
}


def networks(name: str) -> nn.ModuleList:
    """The networks of this name, with the same weights each time."""
    torch.manual_seed(0)
    return nn.ModuleList(NETWORKS[name]())


with torch.device("meta"):
    SMALL = {
        name: [tuple(parameter.shape) for network in make() for parameter in network.parameters()]
        for name, make in NETWORKS.items()
    }
"""Shapes of their parameters."""

PLAIN = "a step that does nothing"
GUARDED, RECORDED = "guarded step", "guarded step, recorded"
ADAPTIVE: dict[str, Policy] = {"zclip": ZClip(), "auto-clip": AutoClip(), "adagc": AdaGC(warmup_norm=1e6)}
"""A bound that follows averages of the norm, one that follows its last values, and one for each tensor."""
RECORDING = dict(zip(SMALL, (1.05, 1.05, 1.03), strict=True))
"""What a recorded step is to take at most, as a multiple of one that is not."""
FIRST = 100
"""Steps at each of which a record looks at weights and updates too."""
TAKEN = 16
"""Steps in a row, for a record takes so many together."""
TIMES = 30
"""As many rounds for one: they are short."""
TURNS = dict(zip(SMALL, (1000, 1000, 250), strict=True))
"""Training steps at a time, so that what the thread of a record does is counted where it belongs."""


def recorded(gradients: Gradients, limit: float, path: Path, rounds: int) -> Race:
    """Guarded steps that are recorded as well: what the training thread does for it."""

    def steps(words: str, record: Path | None) -> Contender:
        optimizer = NoStep(gradients.parameters)
        gk.attach(optimizer, ClipByGlobalNorm(limit), record=record)
        for _ in range(FIRST):
            optimizer.step()

        def turn() -> None:
            for _ in range(TAKEN):
                optimizer.step()

        return Contender(words, turn, gradients.refill)

    return race([steps(GUARDED, None), steps(RECORDED, path)], rounds=rounds * TIMES)


def clipped(gradients: Gradients, *, active: bool, rounds: int) -> Race:
    """The functions, and a step that does nothing, guarded and not."""
    limit = bound(gradients, active=active)
    policies: dict[str, Policy] = {GUARDED: ClipByGlobalNorm(limit)}
    if not active:
        policies |= ADAPTIVE
    guards = [
        guard_alone(gradients, policy, lambda: gradients.error(limit), name)
        for name, policy in policies.items()
    ]
    plain = Contender(PLAIN, NoStep(gradients.parameters).step, gradients.refill)
    return race([*clip_functions(gradients, limit), *guards, plain], rounds=rounds * TIMES)


def trained(name: str, folder: Path, rounds: int) -> Race:
    """Whole training steps, as many as a turn has: each contender its own, of the same weights."""
    shapes = SMALL[name]
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, shapes[0][1]), torch.randint(4, (64,))

    def loop(
        words: str, policy: Policy | None, record: Path | None = None, *, torchs: bool = False
    ) -> Contender:
        model = networks(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        recorder = None if record is None else gk.Recorder(record)
        if policy is not None:
            gk.attach(optimizer, policy, model=model, record=recorder)

        def turn() -> None:
            for _ in range(TURNS[name]):
                losses = [nn.functional.cross_entropy(network(inputs), targets) for network in model]
                sum(losses, torch.zeros(())).backward()
                if torchs:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if recorder is not None:
                recorder.flush()

        turn()
        return Contender(words, turn)

    constant = ClipByGlobalNorm(1.0)
    contenders = [
        loop(TORCH, None, torchs=True),
        loop(GUARDED, constant),
        *(loop(words, policy) for words, policy in ADAPTIVE.items()),
        loop(RECORDED, constant, folder / f"{len(shapes)}-trained.keel"),
        loop("no clipping", None),
    ]
    return race(contenders, rounds=rounds, collects=True)


def cost(found: Race, name: str, to: str) -> Quartiles:
    """What a guard adds to a step, as a multiple of a function's time, or of what another guard adds."""
    seconds = found.seconds
    rounds = zip(seconds[name], seconds[to], seconds[PLAIN], strict=True)
    without = 0.0 if to == TORCH else 1.0
    return quartiles([(own - plain) / (its - without * plain) for own, its, plain in rounds])


def adaptive(words: str, found: Race) -> list[Target]:
    """What policies that learn their bound take, to a constant one."""
    return [
        Target(f"{words}, {name} to a constant bound", 1.05, found.ratio(name, GUARDED)) for name in ADAPTIVE
    ]


def ask(rounds: int) -> Answer:
    """Three small models, below and above the bound; and whole training steps of them."""
    with TemporaryDirectory() as folder:
        return _asked(rounds, Path(folder))


def _asked(rounds: int, folder: Path) -> Answer:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tables, targets = [], []
    try:
        for name, shapes in SMALL.items():
            gradients = Gradients(shapes)
            for active in (False, True):
                found = clipped(gradients, active=active, rounds=rounds)
                words = f"{name}, norm {'above' if active else 'below'} the bound"
                tables.append(Table(words, found))
                targets.append(target(f"{words}, {FUNCTION}, to torch", 0.8, found, FUNCTION))
                targets.append(
                    Target(f"{words}, what a guard adds, to torch", 0.8, cost(found, GUARDED, TORCH))
                )
                if not active:
                    targets += adaptive(words, found)
            limit, words = bound(gradients, active=False), f"{name}, {TAKEN} steps in a row"
            found = recorded(gradients, limit, folder / f"{len(shapes)}.keel", rounds)
            tables.append(Table(words, found))
            ratio = found.ratio(RECORDED, GUARDED)
            targets.append(Target(f"{words}, recorded to not recorded", RECORDING[name], ratio))
            found = trained(name, folder, rounds)
            words = f"{name}, whole training steps"
            tables.append(Table(f"{words}, {TURNS[name]} a turn", found))
            targets += [
                target(f"{words}, guarded to torch", 1.0, found, GUARDED),
                *adaptive(words, found),
                Target(f"{words}, recorded to not recorded", RECORDING[name], found.ratio(RECORDED, GUARDED)),
            ]
    finally:
        torch.set_num_threads(threads)
    return Answer(tables, targets)
