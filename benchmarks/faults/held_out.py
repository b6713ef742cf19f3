"""More small programs, whose runs are not looked at while thresholds are chosen: other tasks, models and optimizers."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from benchmarks.faults.programs import (
    BATCH,
    Batch,
    Program,
    Turn,
    class_losses,
    images,
    letters,
    token_losses,
)

_OTHERS = ("SGD", "AdamW", "RMSprop", "NAdam", "Adamax")


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 24)
        self.reader, self.writer = nn.GRU(24, 32, batch_first=True), nn.GRU(24, 32, batch_first=True)
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.reader(self.embed(x))
        before = torch.cat([torch.full_like(y[:, :1], 32), y[:, :-1]], dim=1)
        return self.head(self.writer(self.embed(before), state)[0])


def seq2seq() -> Program:
    """A short text backwards, by two GRUs."""
    model = _Pair()

    def batch() -> Batch:
        x, _ = letters(8)
        return x, x.flip(1)

    def losses(b: Batch) -> Tensor:
        return F.cross_entropy(model(b[0], b[1]).transpose(1, 2), b[1], reduction="none").mean(dim=1)

    return Program(model, batch, losses, "head", rate=3e-3)


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 12, 3, padding=1)
        self.deep = nn.Conv2d(12, 24, 3, padding=1, stride=2)
        self.middle = nn.Conv2d(24, 24, 3, padding=1)
        self.norm = nn.GroupNorm(4, 24)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.out = nn.Conv2d(24, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.silu(self.down(x))
        h = F.silu(self.norm(self.middle(F.silu(self.deep(first)))))
        return self.out(torch.cat([first, self.up(h)], dim=1))


def unet() -> Program:
    """The noise in digits at a random level, as diffusion models learn it."""
    model = _UNet()

    def batch() -> Batch:
        image, noise = images()[0], torch.randn(BATCH, 1, 8, 8)
        level = torch.rand(BATCH, 1, 1, 1)
        mixed = (1 - level).sqrt() * image + level.sqrt() * noise
        return torch.cat([mixed, level.expand_as(mixed)], dim=1), noise

    return Program(model, batch, lambda b: (model(b[0]) - b[1]).square().mean(dim=(1, 2, 3)), "middle")


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, 32, 2, stride=2)
        self.place = nn.Parameter(torch.randn(16, 32) * 0.02)
        self.norm1, self.norm2, self.norm3 = nn.RMSNorm(32), nn.RMSNorm(32), nn.RMSNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cut(x).flatten(2).transpose(1, 2) + self.place
        n = self.norm1(h)
        q, k, v = (
            layer(n).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        n = self.norm2(h)
        h = h + self.down(F.silu(self.gate(n)) * self.up(n))
        return self.head(self.norm3(h).mean(dim=1))


def vit() -> Program:
    """Digits, by attention between their patches."""
    model = _Patches()
    return Program(
        model, images, partial(class_losses, model), "up", ("query.weight", "key.weight"), 2e-3, _OTHERS[1:]
    )


class _Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 24), nn.Linear(48, 24)
        self.hidden, self.head = nn.Linear(48, 24), nn.Linear(24, 1)

    def forward(self, edges: Tensor) -> Tensor:
        mean = edges / edges.sum(dim=2, keepdim=True).clamp(min=1)
        size = edges.sum(dim=2, keepdim=True) / 10
        h = F.relu(self.first(torch.cat([size, size.square(), mean @ size, torch.ones_like(size)], dim=2)))
        for layer in (self.second, self.hidden):
            h = F.relu(layer(torch.cat([h, mean @ h], dim=2)))
        return self.head(h.mean(dim=1)).squeeze(1)


def graph() -> Program:
    """How many triangles a random graph of ten nodes has, by passing messages."""
    model = _Graph()

    def batch() -> Batch:
        density = torch.rand(BATCH, 1, 1) * 0.6 + 0.2
        upper = (torch.rand(BATCH, 10, 10) < density).float().triu(1)
        edges = upper + upper.transpose(1, 2)
        return edges, (edges @ edges @ edges).diagonal(dim1=1, dim2=2).sum(dim=1) / 6 / 20

    return Program(
        model, batch, lambda b: F.huber_loss(model(b[0]), b[1], reduction="none"), "second",
        rate=3e-3, optimizers=_OTHERS,
    )  # fmt: skip


class _Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.code = nn.Linear(64, 48), nn.Linear(48, 12)
        self.back, self.out = nn.Linear(6, 48), nn.Linear(48, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.code(torch.tanh(self.body(x))).chunk(2, dim=1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.out(torch.tanh(self.back(drawn))), mean, log_variance


def vae() -> Program:
    """Digits through six normal numbers and back."""
    model = _Variational()

    def batch() -> Batch:
        x = images()[0].flatten(1)
        return x, x.clone()

    def losses(b: Batch) -> Tensor:
        logits, mean, log_variance = model(b[0])
        rebuilt = F.binary_cross_entropy_with_logits(logits, b[1], reduction="none").sum(dim=1)
        return rebuilt + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)

    return Program(model, batch, losses, "back", rate=3e-3, optimizers=_OTHERS)


def contrastive() -> Program:
    """Which of the batch's digits a second, noisy view shows."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16)
    )  # fmt: skip

    def batch() -> Batch:
        x = images()[0]
        return x + 0.4 * torch.randn_like(x), x + 0.4 * torch.randn_like(x)

    def losses(b: Batch) -> Tensor:
        one, other = (F.normalize(model(x), dim=1) for x in b)
        return F.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)), reduction="none")

    return Program(model, batch, losses, "4", rate=2e-3, optimizers=_OTHERS)


class _Tastes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(60, 12), nn.Embedding(40, 12)
        self.hidden, self.head = nn.Linear(24, 24), nn.Linear(24, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = self.users(pairs[:, 0]), self.items(pairs[:, 1])
        mixed = F.elu(self.hidden(torch.cat([user, item], dim=1)))
        return (user * item).mean(dim=1) + self.head(mixed).squeeze(1)


def recommender() -> Program:
    """How sixty users rate forty items, which three numbers of each decide."""
    model = _Tastes()
    users, items = torch.randn(60, 3), torch.randn(40, 3)

    def batch() -> Batch:
        pairs = torch.stack([torch.randint(60, (BATCH,)), torch.randint(40, (BATCH,))], dim=1)
        return pairs, (users[pairs[:, 0]] * items[pairs[:, 1]]).sum(dim=1).tanh()

    return Program(
        model, batch, lambda b: (model(b[0]) - b[1]).square(), "hidden", rate=3e-2, optimizers=_OTHERS[1:]
    )


def forecaster() -> Program:
    """The next eight values of two waves and noise, by dilated convolutions with normalized weights."""
    model = nn.Sequential(
        weight_norm(nn.Conv1d(1, 12, 3, dilation=1)), nn.ReLU(), weight_norm(nn.Conv1d(12, 12, 3, dilation=4)),
        nn.ReLU(), nn.Conv1d(12, 12, 3, dilation=8), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 22, 8),
    )  # fmt: skip

    def batch() -> Batch:
        time = torch.arange(56.0)
        wave = [
            (torch.rand(BATCH, 1) + 0.5)
            * torch.sin(time / (torch.rand(BATCH, 1) * 5 + span) + 6 * torch.rand(BATCH, 1))
            for span in (2, 8)
        ]
        values = sum(wave) + 0.1 * torch.randn(BATCH, 56)
        return values[:, None, :48], values[:, 48:]

    return Program(
        model, batch, lambda b: (model(b[0]) - b[1]).abs().mean(dim=1), "4", rate=3e-3, optimizers=_OTHERS
    )


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(32, 32), nn.Conv1d(32, 32, 4, groups=32)
        self.norm1, self.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
        self.route = nn.Linear(32, 4)
        self.up, self.down = nn.Linear(32, 4 * 32), nn.Linear(32, 4 * 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.mix(F.pad(self.norm1(h).transpose(1, 2), (3, 0))).transpose(1, 2)
        n = self.norm2(h)
        best, chosen = F.softmax(self.route(n), dim=-1).max(dim=-1)
        own = F.one_hot(chosen, 4).to(h.dtype).unsqueeze(-1)
        mine = (self.up(n).unflatten(-1, (4, 32)) * own).sum(dim=-2)
        back = (self.down(F.gelu(mine)).unflatten(-1, (4, 32)) * own).sum(dim=-2)
        return F.linear(h + best.unsqueeze(-1) * back, self.embed.weight) / math.sqrt(32)


def experts() -> Program:
    """The next letter, by causal convolutions and four experts of which each letter asks one."""
    model = _Experts()
    return Program(model, letters, partial(token_losses, model), "up", rate=3e-3, optimizers=_OTHERS)


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(6 * x)


def field() -> Program:
    """A picture as a function of where one looks, by sines."""
    model = nn.Sequential(nn.Linear(2, 32), _Sine(), nn.Linear(32, 32), _Sine(), nn.Linear(32, 1))
    picture = images()[0][:1]

    def batch() -> Batch:
        at = torch.rand(BATCH, 2) * 2 - 1
        seen = F.grid_sample(picture, at.view(1, 1, BATCH, 2), align_corners=True)
        return at, seen.view(BATCH, 1)

    return Program(
        model, batch, lambda b: (model(b[0]) - b[1]).square().mean(dim=1), "2", rate=1e-3, optimizers=_OTHERS
    )


class _Play:
    """Sixteen walkers on a grid of five by five, who start in one corner; in the other is what they look for."""

    def __init__(self) -> None:
        self.at = torch.zeros(BATCH, 2, dtype=torch.long)

    def seen(self) -> Tensor:
        return torch.cat([F.one_hot(self.at[:, i], 5) for i in (0, 1)], dim=1).float()

    def move(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """[B] what this step gave, and [B] bool whether it was the last: who arrives starts anew."""
        ways = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])
        self.at = (self.at + ways[action]).clamp(0, 4)
        arrived = (self.at == 4).all(dim=1)
        self.at = torch.where(arrived[:, None], 0, self.at)
        return arrived.float(), arrived


def reinforce() -> Program:
    """The way across a grid, by the gradient of the policy: sixteen walks of ten steps, less what is usual."""
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))

    def batch() -> Batch:
        play, seen, actions, gains = _Play(), [], [], []
        for _ in range(10):
            seen.append(play.seen())
            with torch.no_grad():
                logits = model(seen[-1]).nan_to_num(0.0, 0.0, 0.0)
            actions.append(torch.distributions.Categorical(logits=logits).sample())
            gains.append(play.move(actions[-1])[0] - 0.01 * seen[-1][:, 0])
        later = torch.stack(gains, 1).flip(1).cumsum(1).flip(1)
        return torch.stack(seen, 1), later - later.mean(dim=0), torch.stack(actions, 1)

    def losses(b: Batch) -> Tensor:
        seen, advantage, action = b
        logs = F.log_softmax(model(seen), dim=2).gather(2, action[:, :, None]).squeeze(2)
        return -(logs * advantage).sum(dim=1)

    return Program(model, batch, losses, "2", rate=3e-3, optimizers=_OTHERS, margin=10.0)


def dqn() -> Program:
    """The same grid by learning what a move is worth, from what was met before, beside a copy that lags behind."""
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    play, met, lagging = _Play(), list[Batch](), [p.detach().clone() for p in model.parameters()]

    def batch() -> Batch:
        nonlocal lagging
        for _ in range(4):
            seen = play.seen()
            with torch.no_grad():
                best = model(seen).nan_to_num(0.0, 0.0, 0.0).argmax(dim=1)
            action = torch.where(torch.rand(BATCH) < 0.3, torch.randint(4, (BATCH,)), best)
            gain, ended = play.move(action)
            met.append((seen, gain, action, play.seen(), ended))
        if len(met) % 100 == 0:
            lagging = [p.detach().clone() for p in model.parameters()]
        chosen = [met[i] for i in torch.randint(len(met), (BATCH,)).tolist()]
        return tuple(
            torch.stack([own[i] for i, own in enumerate(column)]) for column in zip(*chosen, strict=True)
        )

    def losses(b: Batch) -> Tensor:
        seen, gain, action, after, ended = b
        names = [name for name, _ in model.named_parameters()]
        with torch.no_grad():
            next_best = torch.func.functional_call(model, dict(zip(names, lagging, strict=True)), after).amax(
                1
            )
        worth = model(seen).gather(1, action[:, None]).squeeze(1)
        return F.smooth_l1_loss(worth, gain + 0.95 * ~ended * next_best, reduction="none")

    return Program(model, batch, losses, "2", rate=2e-3, optimizers=_OTHERS, margin=10.0)


def hinge() -> Program:
    """Digits, made and judged by another rule than `gan`: hinges, and weights of the judge of norm 1."""
    make = nn.Sequential(nn.Linear(8, 48), nn.SiLU(), nn.Linear(48, 64), nn.Sigmoid())
    judge = nn.Sequential(spectral_norm(nn.Linear(64, 48)), nn.LeakyReLU(0.2), nn.Linear(48, 48),
                          nn.LeakyReLU(0.2), spectral_norm(nn.Linear(48, 1)))  # fmt: skip

    def batch() -> Batch:
        return torch.randn(BATCH, 8), images()[0].flatten(1)

    def losses(b: Batch) -> Tensor:
        real, made = judge(b[1]), judge(Turn.apply(make(b[0])))
        return (F.relu(1 - real) + F.relu(1 + made)).squeeze(1)

    model = nn.ModuleDict({"make": make, "judge": judge})
    return Program(model, batch, losses, "judge.2", rate=2e-3, optimizers=_OTHERS, margin=0.5)


_MAKERS = (
    seq2seq, unet, vit, graph, vae, contrastive, recommender, forecaster, experts, field, reinforce, dqn, hinge,
)  # fmt: skip
HELD_OUT: dict[str, Callable[[], Program]] = {make.__name__: make for make in _MAKERS}
