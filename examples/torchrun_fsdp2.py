"""Clipping by the norm of the whole model under FSDP2, with a checkpoint that any number of ranks can take up.

torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py --checkpoint run
torchrun --nproc-per-node 4 examples/torchrun_fsdp2.py --checkpoint run

``attach`` needs no more than on one process: parameters tell themselves how they are sharded.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import gradkeel as gk


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--checkpoint", default=None)
    chosen = arguments.parse_args()

    distributed.init_process_group()
    rank = distributed.get_rank()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)]
    model = nn.Sequential(*blocks).to(device)
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Clips what is far above this run's own norms, and skips what is not finite, on all ranks alike.
    guard = gk.attach(optimizer, gk.policies.AutoClip(warmup=5), model=model, exclude="*.bias")

    def parts() -> dict[str, object]:
        weights, state = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": state, "guard": guard}

    if chosen.checkpoint is not None and Path(chosen.checkpoint).exists():
        found = parts()
        checkpoint.load(found, checkpoint_id=chosen.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    data = torch.Generator().manual_seed(rank)
    for _ in range(chosen.steps):
        x = torch.randn(16, 64, generator=data).to(device)
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        loss.backward()
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"loss {float(guard.report.scalars['loss']):.3f}  {guard.report}")
    if chosen.checkpoint is not None:
        checkpoint.save(
            parts(), storage_writer=checkpoint.FileSystemWriter(chosen.checkpoint, overwrite=True)
        )
    distributed.barrier()  # nobody leaves while others still talk to it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
