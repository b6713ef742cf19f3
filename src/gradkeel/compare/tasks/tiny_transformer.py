"""A small causal transformer on real text, AdamW, sequences of uneven lengths."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gradkeel.compare.text import IGNORED, VOCABULARY, TextTask, text, windows

LONGEST = 64


class TinyModel(nn.Module):
    """Token and position embeddings, two pre-norm encoder layers under a causal mask, output layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LONGEST, width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        # Nested tensors speed up inference on padded batches alone, and warn under norm_first.
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length, vocabulary] logits of each next token."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        embedded = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return self.output(self.norm(self.layers(embedded, mask=mask, is_causal=True)))


class TinyTransformer(TextTask):
    """Predict the next character; lengths between 4 and 64, so that batches hold unequal numbers of tokens."""

    name = "tiny-transformer"
    policies = ("none", "global-norm:1.0")
    learning_rates = (1e-3, 3e-3, 1e-2)
    steps = 200
    seeds = 3
    batch_size = 8
    validated = LONGEST

    def model(self) -> nn.Module:
        return TinyModel()

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """[batch_size, longest + 1] windows; IGNORED stands behind each sequence's own end."""
        tokens = text().train
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(tokens) - LONGEST, (self.batch_size,), generator=generator)
            lengths = torch.randint(4, LONGEST + 1, (self.batch_size,), generator=generator)
            longest = int(lengths.max())
            batch = windows(tokens, starts, longest)
            yield batch.masked_fill(torch.arange(longest + 1) > lengths[:, None], IGNORED)
