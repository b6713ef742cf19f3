"""What is timed: the clip alone, the clip with fused AdamW's step, and whole training steps."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradkeel as gk
from gradkeel.bench.contenders import NoStep
from gradkeel.bench.workload import SHAPES, Gradients

from benchmarks.gpu.contest import Entrant

TORCH, FUNCTION = "torch clip_grad_norm_", "gradkeel clip_grad_norm_"


def _decoder(layers: int, width: int, hidden: int, vocabulary: int) -> list[tuple[int, ...]]:
    block: list[tuple[int, ...]] = [
        (width,),
        *[(width, width)] * 4,
        (width,),
        *[(hidden, width)] * 2,
        (width, hidden),
    ]
    return [(vocabulary, width), *(block * layers), (width,)]


MODELS = {
    "GPT-2 small, 148 tensors": SHAPES["gpt2-small"],
    "1.2B decoder, 146 tensors": _decoder(16, 2048, 8192, 32_000),
    "2,000 tensors of 2,100": SHAPES["tiny-tensors"],
}
ADAPTIVE = ("zclip", "autoclip", "adagc", "quantile:0.9", "normalize", "smooth:1e9")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def policies(norm: float, tensors: int, *, active: bool) -> dict[str, gk.policies.Policy | str]:
    """Every kind of policy, below or above its bound where that is a number; adaptive ones find their own."""
    bound = norm / 3 if active else 2 * norm
    found: dict[str, gk.policies.Policy | str] = {
        "global-norm": gk.ClipByGlobalNorm(bound),
        "norm": gk.ClipByNorm(bound / tensors**0.5 if active else bound),
        "value": gk.ClipByValue(1.0 if active else 1e4),
        "agc": gk.AdaptiveGradientClip(0.01 if active else 1e6),
    }
    if not active:
        found |= {spec: spec for spec in ADAPTIVE}
    return found


def clips(gradients: Gradients, *, active: bool) -> Iterator[Entrant]:
    """The functions, and a guarded step of an optimizer that does nothing under each policy."""
    norm, parameters = gradients.norm, gradients.parameters
    bound = norm / 3 if active else 2 * norm
    yield Entrant(TORCH, lambda: torch.nn.utils.clip_grad_norm_(parameters, bound), gradients.refill)
    yield Entrant(FUNCTION, lambda: gk.clip_grad_norm_(parameters, bound), gradients.refill)
    for name, policy in policies(norm, len(parameters), active=active).items():
        yield Entrant(f"guard, {name}", guarded(NoStep(parameters), policy).step, gradients.refill)


def steps(gradients: Gradients, *, active: bool) -> Iterator[Entrant]:
    """The same with fused AdamW; one table of states for all, for the memory would not hold more."""
    norm, parameters = gradients.norm, gradients.parameters
    bound = norm / 3 if active else 2 * norm
    first = _adamw(parameters, None)
    first.step()

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, bound)
        first.step()

    yield Entrant(f"{TORCH} + AdamW", torchs, gradients.refill)
    for name, policy in policies(norm, len(parameters), active=active).items():
        yield Entrant(
            f"guard, {name} + AdamW", guarded(_adamw(parameters, first), policy).step, gradients.refill
        )
    yield Entrant("AdamW without clipping", _adamw(parameters, first).step, gradients.refill)


def _adamw(parameters: Any, first: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    made = torch.optim.AdamW(parameters, lr=1e-9, fused=True)
    if first is not None:
        made.state = first.state
    return made


def guarded(
    optimizer: torch.optim.Optimizer, policy: gk.policies.Policy | str, **options: Any
) -> torch.optim.Optimizer:
    """The optimizer, with a guard on it."""
    gk.attach(optimizer, policy, **options)
    return optimizer


class Transformer(nn.Module):
    """A decoder of 33M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16_384, 512)
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 8, nn.LayerNorm(512), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length, 16384] logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        hidden = self.layers(self.tokens(tokens), mask=mask, is_causal=True)
        return F.linear(hidden, self.tokens.weight)


def training(folder: Path) -> Iterator[Entrant]:
    """Whole steps of one model under bf16 autocast with fused AdamW; records are written into ``folder``."""
    torch.manual_seed(0)
    model = Transformer().cuda()
    tokens = torch.randint(16_384, (16, 257), device="cuda")
    parameters = list(model.parameters())

    def entrant(name: str, optimizer: torch.optim.Optimizer, *, clip: bool = False) -> Entrant:
        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, 1e3)
            optimizer.step()

        return Entrant(name, run)

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-9, fused=True)

    yield entrant(TORCH, adamw(), clip=True)
    yield entrant("no clipping", adamw())
    for name, policy in policies(500.0, len(parameters), active=False).items():
        yield entrant(f"guard, {name}", guarded(adamw(), policy, model=model))
    for name in ("global-norm", "zclip"):
        policy = policies(500.0, len(parameters), active=False)[name]
        path = folder / f"{name}.gkrec"
        recording = entrant(f"guard, {name}, recording", guarded(adamw(), policy, model=model, record=path))
        for _ in range(110):  # at each of the first 100 steps weights are measured too
            recording.run()
        yield recording


def all_tables(rounds: int) -> Iterator[tuple[str, Callable[[], Iterable[Entrant]], int]]:
    """Title, what makes the entrants, and rounds of each table; tensors are freed between two models."""
    for model, shapes in MODELS.items():
        for dtype, kind in DTYPES.items():
            gradients = Gradients(shapes, dtype=kind, device="cuda")
            for active in (False, True):
                side = "above" if active else "below"
                for what, made in {"clip alone": clips, "clip + AdamW": steps}.items():
                    yield (
                        f"{what}, {model}, {dtype}, {side} the bound",
                        partial(made, gradients, active=active),
                        rounds,
                    )
            del gradients
            torch.cuda.empty_cache()
    with TemporaryDirectory() as folder:
        yield "training steps, 33M transformer, bf16 autocast", partial(training, Path(folder)), 4 * rounds
