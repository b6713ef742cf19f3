"""What does recording every step cost?"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import gradkeel as gk
from gradkeel.bench import SHAPES, Contender, Gradients, Table, race
from gradkeel.bench.contenders import guarded_step
from gradkeel.compare.task import endless
from gradkeel.compare.tasks.tiny_transformer import TinyTransformer

from benchmarks.speed.answer import Answer, target

BLOCK = 50  # steps: in one of them the recorder looks at weights and updates
WARMUP = 100  # steps; it does so in each of the first 100
OFF, ON = "not recorded", "recorded"


def block_of(steps: Callable[[], object]) -> Callable[[], None]:
    """So many steps that the rarer measurements are in each run."""

    def run() -> None:
        for _ in range(BLOCK):
            steps()

    return run


def steps_alone(folder: Path, rounds: int) -> Table:
    """Clip and step of GPT-2 small's shapes, without a model: nothing to hide the recorder behind."""
    gradients = Gradients(SHAPES["gpt2-small"], scale=1e-5)
    contenders = []
    for name, record in ((OFF, None), (ON, folder / "steps.keel")):
        optimizer = torch.optim.AdamW(gradients.parameters, lr=1e-9, fused=True)
        one = guarded_step(gradients, gk.ClipByGlobalNorm(1e3), optimizer, record=record)
        contenders.append(Contender(name, block_of(one.run)))
    return Table(
        "GPT-2 small, 50 times clip and step",
        race(_warm(contenders), rounds=max(5, rounds // 6), warmup=0, collects=True),
    )


def training(folder: Path, rounds: int) -> Table:
    """Whole training steps of the tiny transformer."""
    contenders = []
    for name, record in ((OFF, None), (ON, folder / "training.keel")):
        task = TinyTransformer()
        model: nn.Module = task.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model, record=record)
        batch = next(endless(task, 0))

        def step(
            task: TinyTransformer = task,
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            batch: torch.Tensor = batch,
        ) -> None:
            task.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        contenders.append(Contender(name, block_of(step)))
    return Table(
        "Tiny transformer, 50 training steps", race(_warm(contenders), rounds=rounds, warmup=0, collects=True)
    )


def _warm(contenders: list[Contender]) -> list[Contender]:
    for contender in contenders:
        for _ in range(WARMUP // BLOCK):
            contender.run()
    return contenders


def ask(rounds: int) -> Answer:
    """Steps by themselves, and whole training steps."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        alone, trained = steps_alone(Path(folder), rounds), training(Path(folder), rounds)
    return Answer(
        [alone, trained],
        [
            target("recording on, clip and step, to off", 1.03, alone.race, ON),
            target("recording on, whole training steps, to off", 1.03, trained.race, ON),
        ],
    )
