"""What does an autopsy cost where there is no alarm?"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import gradkeel as gk
from gradkeel.bench import Contender, Table, race
from gradkeel.compare.task import endless
from gradkeel.compare.tasks.tiny_transformer import TinyTransformer

from benchmarks.speed.answer import Answer, target

OFF, ON, OWN = "without", "with an autopsy", "the autopsy's own part"


def ask(rounds: int) -> Answer:
    """Whole training steps of the tiny transformer, one model under two guards."""
    task = TinyTransformer()
    model, batch = task.model(), next(endless(task, 0))

    def loss(batch: Tensor) -> Tensor:
        return task.loss(model, batch)

    def guarded() -> tuple[torch.optim.Optimizer, gk.Guard]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        return optimizer, gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)

    def plain(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def watched(optimizer: torch.optim.Optimizer, guard: gk.Guard) -> Callable[[], None]:
        autopsy = gk.Autopsy(guard, loss=loss)

        def step() -> None:
            with autopsy(batch):
                autopsy.loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    own_optimizer, own_guard = guarded()
    autopsy, reports = gk.Autopsy(own_guard, loss=loss), list[gk.StepReport]()
    for _ in range(50):
        loss(batch).backward()
        own_optimizer.step()
        reports.append(own_guard.report)
    turn = itertools.cycle(reports)

    def own() -> None:
        report = next(turn)
        with autopsy(batch):
            pass
        autopsy.before_step(report)
        autopsy.record(report)

    contenders = [
        Contender(OFF, plain(guarded()[0])),
        Contender(ON, watched(*guarded())),
        Contender(OWN, own),
    ]
    found = race(contenders, rounds=20 * rounds)
    # Two whole steps differ by more than this from one moment to the next: what is added is timed by itself.
    words = "an autopsy's own part of a training step without an alarm"
    return Answer([Table("Tiny transformer, one training step", found)], [target(words, 0.005, found, OWN)])
