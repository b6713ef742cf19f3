"""Which share of a training step is clipping?"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradkeel as gk
from gradkeel.bench import Contender, Table, race
from gradkeel.compare.task import endless
from gradkeel.compare.tasks.tiny_transformer import TinyTransformer

from benchmarks.speed.answer import Answer

NONE, TORCH, GUARD = "no clipping", "torch clip_grad_norm_", "gradkeel guard"


class GPT2Small(nn.Module):
    """A decoder of GPT-2 small's size: 12 layers, width 768, 50,257 tokens, output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50257, 768)
        self.positions = nn.Embedding(1024, 768)
        layer = nn.TransformerEncoderLayer(
            768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 12, nn.LayerNorm(768), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length, 50257] logits."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.tokens(tokens) + self.positions(torch.arange(length))
        return F.linear(self.layers(hidden, mask=mask, is_causal=True), self.tokens.weight)


class Steps:
    """Training steps of one model, by three optimizers of their own."""

    def __init__(self, model: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.loss, self.inputs, self.targets = model, loss, inputs, targets
        self.plain, self.guarded = (
            torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True) for _ in range(2)
        )
        gk.attach(self.guarded, gk.ClipByGlobalNorm(1.0), model=model)

    def backward(self) -> None:
        """New gradients."""
        self.model.zero_grad()
        logits = self.model(self.inputs)
        self.loss(logits.flatten(0, -2), self.targets.flatten()).backward()

    def contenders(self) -> list[Contender]:
        """A whole step without clipping, with torch's and under a guard."""

        def none() -> None:
            self.backward()
            self.plain.step()

        def clipped() -> None:
            self.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.plain.step()

        def guarded() -> None:
            self.backward()
            self.guarded.step()

        return [Contender(NONE, none), Contender(TORCH, clipped), Contender(GUARD, guarded)]


def ask(rounds: int) -> Answer:
    """GPT-2 small on 128 tokens, and the tiny transformer; both above the bound, so that there is something to do."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50257, (1, 129), generator=generator)
    large = Steps(GPT2Small(), nn.CrossEntropyLoss(), tokens[:, :-1], tokens[:, 1:])
    task = TinyTransformer()
    batch = next(endless(task, 0))
    criterion = nn.CrossEntropyLoss(ignore_index=-100)
    small = Steps(task.model(), criterion, batch[:, :-1].clamp(min=0), batch[:, 1:])
    return Answer(
        [
            Table("GPT-2 small, 128 tokens", race(large.contenders(), rounds=max(5, rounds // 2))),
            Table("Tiny transformer, 8 sequences", race(small.contenders(), rounds=4 * rounds)),
        ]
    )
