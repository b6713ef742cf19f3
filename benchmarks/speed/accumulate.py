"""What does exact accumulation cost: sums in float32 of gradients in bfloat16, and a window of several backwards?"""

from collections.abc import Callable

import torch
from torch import Tensor

import gradkeel as gk
from gradkeel.accumulate.wide import WideSums
from gradkeel.bench import SHAPES, Contender, Gradients, Table, race
from gradkeel.compare.task import endless
from gradkeel.compare.tasks.tiny_transformer import TinyTransformer

from benchmarks.speed.answer import Answer, target

PLAIN, WIDE = "bfloat16 += bfloat16", "float32 += bfloat16"
USUAL, EXACT = "(loss / 4).backward(), torch's clip", "Accumulator, guard"


def sums(rounds: int) -> Table:
    """One micro-batch's gradients of GPT-2 small's shapes, added to the sums of those before."""
    gradients = Gradients(SHAPES["gpt2-small"], dtype=torch.bfloat16)
    narrow = [gradient.clone() for gradient in gradients.true]
    wide = WideSums(torch.float32)

    def give() -> None:
        for parameter, gradient in zip(gradients.parameters, gradients.true, strict=True):
            parameter.grad = gradient

    contenders = [
        Contender(PLAIN, lambda: torch._foreach_add_(narrow, gradients.true)),
        Contender(WIDE, lambda: wide.take(gradients.parameters), give),
    ]
    return Table("GPT-2 small, adding one micro-batch's gradients", race(contenders, rounds=rounds))


def windows(rounds: int) -> Table:
    """A window of 4 micro-batches of the tiny transformer, from the loader to the optimizer's step."""

    def usual(task: TinyTransformer) -> Callable[[], None]:
        model, optimizer, batches = task.model(), None, endless(task, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

        def window() -> None:
            for _ in range(4):
                (task.loss(model, next(batches)) / 4).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return window

    def exact(task: TinyTransformer) -> Callable[[], None]:
        model, batches = task.model(), endless(task, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
        accumulate = gk.Accumulator(guard, steps=4, reduction="mean")

        def window() -> None:
            micros: list[Tensor] = [next(batches) for _ in range(4)]
            for micro in accumulate(micros):
                with micro:
                    micro.backward(task.loss(model, micro.batch), weight=task.weight(micro.batch))
            optimizer.step()
            optimizer.zero_grad()

        return window

    contenders = [Contender(USUAL, usual(TinyTransformer())), Contender(EXACT, exact(TinyTransformer()))]
    return Table("Tiny transformer, a window of 4 micro-batches", race(contenders, rounds=rounds))


def ask(rounds: int) -> Answer:
    """The sums by themselves, and whole windows."""
    added = sums(rounds)
    words = "accumulating bfloat16 in float32, to bfloat16 in bfloat16"
    return Answer([added, windows(rounds)], [target(words, 2.6, added.race, WIDE)])
