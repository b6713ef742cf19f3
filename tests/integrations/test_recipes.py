"""The recipes of docs/trainers.md run as they stand there; those of other libraries where these are installed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.record import Reader

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")


def recipe(words):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (block,) = [block for block in blocks if words in block]
    return block


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def batches():
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 50, 20, 7, 9, 1, 12)
    return [
        (torch.randn(n, 4, generator=generator), 10 * torch.randn(n, 1, generator=generator)) for n in sizes
    ]


def loss_and_count(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def test_torchtune():
    """Its windows, clipped by torch, give the same weights."""
    model, other = network(), network()
    names = {
        "gk": gk, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "batches": batches(),
        "loss_and_count": loss_and_count, "accumulation_steps": 2,
    }  # fmt: skip
    exec(recipe("loss_sum, tokens"), names)
    names["guard"].detach()
    optimizer, rest = torch.optim.SGD(other.parameters(), lr=0.1), batches()
    while rest:
        pair, rest = rest[:2], rest[2:]
        sums, counts = zip(*(loss_and_count(other, batch) for batch in pair), strict=True)
        (sum(sums) / sum(counts)).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for mine, torchs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, torchs)
    with Reader("tune.keel") as run:
        assert len(run) == 4  # the last window holds one batch
        assert bool(run.clipped().any())


def test_torchtitan():
    model = network()
    parts = [model[:2], model[2:]]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1) for part in parts]

    def forward_backward(parts, batch):
        loss = nn.functional.mse_loss(parts[1](parts[0](batch[0])), batch[1])
        loss.backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        return loss.detach()

    norms = []
    names = {
        "gk": gk, "torch": torch, "optimizers": optimizers, "model_parts": parts, "batches": batches(),
        "forward_backward": forward_backward,
    }  # fmt: skip
    exec(recipe("forward_backward"), names)
    names["guard"].detach()
    with Reader("titan.keel") as run:
        assert run.totals().tolist() == pytest.approx(norms, rel=1e-6)  # float32
        assert len(run.names) == 4


@pytest.fixture
def language_model():
    """A small model and its tokenizer, made here."""
    pytest.importorskip("trl", reason="needs TRL")
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(60))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=62, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("kind", ["SFT", "GRPO"])
def test_trl(language_model, kind):
    model, tokenizer = language_model
    import datasets

    if kind == "SFT":
        texts = [" ".join(f"w{i * j % 60}" for j in range(1, 12)) for i in range(16)]
        more, data = {"gradient_accumulation_steps": 2}, datasets.Dataset.from_dict({"text": texts})
    else:
        more = {"num_generations": 4, "max_completion_length": 8}
        data = datasets.Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]})
    settings = {
        "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
        "report_to": [], "save_strategy": "no", **more,
    }  # fmt: skip
    names = {
        "model": model, "tokenizer": tokenizer, "data": data, "settings": settings,
        "reward": lambda completions, **others: [float(len(text)) for text in completions],
    }  # fmt: skip
    exec(recipe(f"import {kind}Config"), names)
    logs = [entry for entry in names["trainer"].state.log_history if "learning_rate" in entry]
    with Reader(f"{kind.lower()}.keel") as run:
        assert [entry["grad_norm"] for entry in logs] == pytest.approx(run.totals().tolist(), rel=1e-6)
        assert [entry["loss"] for entry in logs] == pytest.approx(run.losses().tolist(), abs=5e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stable_baselines3():
    pytest.importorskip("stable_baselines3", reason="needs Stable-Baselines3")
    settings = {"n_steps": 64, "seed": 0, "device": "cpu"}
    names = {"gk": gk, "settings": settings, "timesteps": 128}
    exec(recipe("import PPO"), names)
    assert names["guard"].step == 2 * 10  # epochs of one batch
    assert names["guard"].report.stepped


def test_hydra():
    pytest.importorskip("hydra", reason="needs Hydra")
    model = network()
    names = {"gk": gk, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    exec(recipe("import instantiate"), names)
    assert names["policy"] == gk.policies.parse("zclip:z=3+global-norm:1.0").policy
