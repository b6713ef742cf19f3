"""A character LSTM on real text: where clipping allows the learning rate that trains fastest."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gradkeel.compare.text import VOCABULARY, TextTask, text, windows


class CharModel(nn.Module):
    """Embedding, two LSTM layers, output layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.lstm = nn.LSTM(32, 96, num_layers=2, batch_first=True)
        self.output = nn.Linear(96, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length, vocabulary] logits of each next token."""
        return self.output(self.lstm(self.embedding(tokens))[0])


class CharLSTM(TextTask):
    """Predict the next character of Python's documentation with plain SGD.

    The setting of Zhang, He, Sra, Jadbabaie, "Why gradient clipping accelerates training", ICLR 2020, made small
    enough for a laptop: a recurrent language model, and learning rates at the edge of stability.
    """

    name = "char-lstm"
    policies = ("none", "value:0.01", "global-norm:0.25")
    learning_rates = (4.0, 8.0, 16.0, 32.0)
    steps = 200
    seeds = 5
    batch_size = 16
    target_loss = 2.5
    length = 64
    validated = 128

    def model(self) -> nn.Module:
        return CharModel()

    def batches(self, seed: int) -> Iterator[Tensor]:
        """[batch_size, length + 1] windows that start anywhere in the training text."""
        tokens = text().train
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(tokens) - self.length, (self.batch_size,), generator=generator)
            yield windows(tokens, starts, self.length)
