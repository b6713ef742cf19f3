"""Clipping and exact accumulation under DistributedDataParallel.

torchrun --nproc-per-node 2 examples/torchrun_ddp.py

Lines of text differ in length, so micro-batches and ranks differ in their numbers of tokens; every update is that of
one process which sees all lines of the window at once.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import gradkeel as gk

NOTHING = -100  # what cross_entropy ignores


class Network(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


def lines(rank: int, ranks: int, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches: inputs and, one byte on, labels, with the ends of short lines ignored."""
    source = Path(os.__file__).read_bytes().splitlines()
    texts = [torch.tensor(list(line)) for line in source if len(line) > 1][rank::ranks]
    for i in range(0, len(texts), batch):
        tokens = nn.utils.rnn.pad_sequence(texts[i : i + batch], batch_first=True, padding_value=NOTHING)
        yield tokens[:, :-1].clamp(min=0).to(device), tokens[:, 1:].to(device)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--record", default=None, help="a file for every step's norms, such as run.keel")
    chosen = arguments.parse_args()

    distributed.init_process_group()
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = DistributedDataParallel(Network().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model, record=chosen.record)
    accumulate = gk.Accumulator(guard, steps=4, model=model)
    for micro in accumulate(lines(rank, ranks, 8, device)):
        inputs, labels = micro.batch
        with micro:
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), reduction="sum")
            micro.backward(loss, weight=(labels != NOTHING).sum())
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                print(f"loss {float(guard.report.scalars['loss']):.3f}  {guard.report}")
        if guard.step == chosen.steps:
            break
    guard.detach()
    distributed.barrier()  # nobody leaves while others still talk to it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
