"""Small programs on real or exactly specified data: a model, batches, and a loss for each sample; for development."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 16

Batch = tuple[Tensor, ...]


@dataclass
class Program:
    """What is trained.

    Attributes:
        model: the network.
        batch: makes the batch of a step; its tensors have the samples in dimension 0. The first is the input, the
            second what is to be learned.
        losses: [B] the loss of each sample.
        place: name of a module in the middle, in which faults are planted.
        attention: names of the weights that make queries, where there are some.
        rate: learning rate under AdamW at which it trains well.
        optimizers: names of those of torch's that may train it; twice for twice as often.
        margin: by how much of what it began with the loss may end above that before it blew up: one that need not fall,
            such as a game's or an agent's, has to end far out of its range.
    """

    model: nn.Module
    batch: Callable[[], Batch]
    losses: Callable[[Batch], Tensor]
    place: str
    attention: tuple[str, ...] = ()
    rate: float = 1e-3
    optimizers: tuple[str, ...] = ("SGD", "AdamW", "AdamW", "Muon")
    margin: float = 0.02


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


@cache
def _text() -> Tensor:
    """[m] the letters of this project's license, as numbers below 32."""
    from pathlib import Path

    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").lower()
    return torch.tensor([ord(c) - 96 if "a" <= c <= "z" else 0 for c in text])


def images() -> Batch:
    images, labels = _digits()
    chosen = torch.randint(len(labels), (BATCH,))
    return images[chosen].unsqueeze(1), labels[chosen]


def letters(length: int = 24) -> Batch:
    text = _text()
    start = torch.randint(len(text) - length - 1, (BATCH, 1)) + torch.arange(length)
    return text[start], text[start + 1]


def _counted() -> Batch:
    """Texts, and how many of their 24 letters come before h, in four classes."""
    x, _ = letters()
    return x, ((x < 8).sum(dim=1) // 4).clamp(max=3)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B] cross-entropy of sequences."""
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(dim=1)


def class_losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mlp() -> Program:
    """Digits, by three linear layers."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
    )
    return Program(model, images, partial(class_losses, model), "3")


def _conv(norm: bool) -> Program:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU()]

    model = nn.Sequential(
        *block(1, 8), *block(8, 16), nn.MaxPool2d(2), *block(16, 16), nn.Flatten(), nn.Linear(256, 10)
    )
    return Program(model, images, partial(class_losses, model), "3" if norm else "2")


def conv() -> Program:
    """Digits, by three convolutions."""
    return _conv(norm=False)


def convbn() -> Program:
    """The same with batch normalization."""
    return _conv(norm=True)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.lstm = nn.LSTM(16, 48, batch_first=True)
        self.hidden = nn.Linear(48, 32)
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.lstm(self.embed(x))[0])))


def lstm() -> Program:
    """The next letter, by an LSTM."""
    model = _Recurrent()
    return Program(model, letters, partial(token_losses, model), "hidden", rate=3e-3)


class _Block(nn.Module):
    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Transformer(nn.Module):
    def __init__(self, *, causal: bool, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.embed, self.place = nn.Embedding(32, 32), nn.Embedding(24, 32)
        self.blocks = nn.ModuleList(_Block(32, causal=causal) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, classes or 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return self.head(h.mean(dim=1) if self.classes else h)


_QUERIES = ("blocks.0.query.weight", "blocks.1.query.weight", "blocks.0.key.weight", "blocks.1.key.weight")


def gpt() -> Program:
    """The next letter, by a causal transformer."""
    model = _Transformer(causal=True)
    return Program(model, letters, partial(token_losses, model), "blocks.1.up", _QUERIES)


def encoder() -> Program:
    """How many of a text's letters come early in the alphabet, by a bidirectional transformer."""
    model = _Transformer(causal=False, classes=4)
    return Program(model, _counted, partial(class_losses, model), "blocks.1.up", _QUERIES)


def autoencoder() -> Program:
    """Digits through eight numbers and back."""
    model = nn.Sequential(
        nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 64)
    )

    def batch() -> Batch:
        x = images()[0].flatten(1)
        return x, x.clone()

    return Program(model, batch, lambda b: (model(b[0]) - b[1]).square().mean(dim=1), "3", rate=3e-3)


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 24)
        self.hidden, self.head = nn.Linear(24, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.embed(x).mean(dim=1))))


def embedding() -> Program:
    """The same as `encoder`, by the mean of the letters' embeddings."""
    model = _Bag()
    return Program(model, _counted, partial(class_losses, model), "hidden", rate=3e-3)


class Turn(torch.autograd.Function):
    """Turns the gradient round."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """[...] the same."""
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        """[...] the other way."""
        return -g


def gan() -> Program:
    """Digits, made and judged: one loss, the judge's gradient turned round on its way to the maker."""
    model = nn.ModuleDict(
        {
            "maker": nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64), nn.Sigmoid()),
            "judge": nn.Sequential(nn.Linear(64, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1)),
        }
    )

    def batch() -> Batch:
        return images()[0].flatten(1), torch.randn(BATCH, 8)

    def losses(b: Batch) -> Tensor:
        real, made = model["judge"](b[0]), model["judge"](Turn.apply(model["maker"](b[1])))
        return (F.softplus(-real) + F.softplus(made)).squeeze(1)

    return Program(model, batch, losses, "judge.0", margin=0.5)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet() -> Program:
    """Digits, by two residual blocks."""
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), _Residual(12), nn.MaxPool2d(2), _Residual(12),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip
    return Program(model, images, partial(class_losses, model), "3.conv1", rate=3e-3)


class _Actor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.act, self.value = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.act(h), self.value(h).squeeze(-1)


def ppo() -> Program:
    """A pole on a cart, kept upright: the clipped surrogate, a critic and an entropy bonus."""
    model = _Actor()
    state = torch.randn(BATCH, 4) * 0.05

    def batch() -> Batch:
        nonlocal state
        with torch.no_grad():
            logits, value = model(state)
            logits = logits.nan_to_num(0.0, 0.0, 0.0)
            action = torch.distributions.Categorical(logits=logits).sample()
            old = F.log_softmax(logits, dim=1).gather(1, action[:, None]).squeeze(1)
            x, dx, angle, turn = state.unbind(dim=1)
            push = 20.0 * action - 10.0
            acceleration = (9.8 * angle - push) / 0.6
            after = torch.stack(
                [x + 0.02 * dx, dx + 0.02 * push, angle + 0.02 * turn, turn + 0.02 * acceleration], 1
            )
            fell = (after[:, 2].abs() > 0.2) | (after[:, 0].abs() > 2.4)
            returns = torch.where(
                fell, -1.0, 1.0 + 0.9 * model(after)[1].nan_to_num(0.0, 0.0, 0.0).clamp(-20, 20)
            )
            before, state = state, torch.where(fell[:, None], torch.randn(BATCH, 4) * 0.05, after)
        return before, returns, action, old, (returns - value.nan_to_num(0.0, 0.0, 0.0))

    def losses(b: Batch) -> Tensor:
        seen, returns, action, old, advantage = b
        logits, value = model(seen)
        logs = F.log_softmax(logits, dim=1)
        ratio = (logs.gather(1, action[:, None]).squeeze(1) - old).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -surrogate + 0.5 * (value - returns).square() + 0.01 * (logs.exp() * logs).sum(dim=1)

    return Program(model, batch, losses, "body.2", margin=10.0)


DEVELOPMENT: dict[str, Callable[[], Program]] = {
    make.__name__: make
    for make in (mlp, conv, convbn, lstm, gpt, autoencoder, embedding, gan, resnet, encoder, ppo)
}
