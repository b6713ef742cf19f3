"""One line with the Transformers Trainer: the guard's training equals the Trainer's own clipping."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import gradkeel as gk

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

BOUND = 0.05

pytestmark = [
    # of the Trainer's own making, on a machine without an accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tiny_model():
    """One layer, randomly initialised: nothing is downloaded."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def data():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 17, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer_of(folder, *, max_grad_norm, accumulation=1, kind=None, **arguments):
    settings = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        max_grad_norm=max_grad_norm,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        gradient_accumulation_steps=accumulation,
    )
    return (kind or transformers.Trainer)(tiny_model(), settings, train_dataset=data(), **arguments)


def attached(model):
    """An optimizer of one's own, and the one line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    return optimizer, gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND, eps=1e-6), model=model)


def callback_of(policy=gk.ClipByGlobalNorm(BOUND, eps=1e-6), **arguments):  # noqa: B008  frozen
    from gradkeel.integrations.transformers import GuardCallback

    return GuardCallback(policy, **arguments)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_guards_training_is_the_trainers(tmp_path, accumulation):
    theirs = trainer_of(tmp_path, max_grad_norm=BOUND, accumulation=accumulation)
    theirs.train()
    callback = callback_of()
    ours = trainer_of(tmp_path, max_grad_norm=0, accumulation=accumulation, callbacks=[callback])
    with warnings.catch_warnings():
        warnings.simplefilter("error", gk.GradkeelWarning)
        ours.train()
    assert callback.guard.step == 4
    assert callback.guard.report.clipped
    assert "transformer.h.0.ln_1.weight" in callback.guard.report.norms
    for (name, one), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        # two norms in another order of summation, and a few steps of AdamW: seen 4e-7
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_an_optimizer_of_ones_own(tmp_path):
    trainer = trainer_of(tmp_path, max_grad_norm=0)
    optimizer, guard = attached(trainer.model)
    trainer.optimizer = optimizer
    trainer.train()
    assert guard.step == 4
    assert guard.report.clipped_norm == pytest.approx(BOUND, rel=1e-4)


def test_the_guard_is_detached_at_the_end_and_can_train_again(tmp_path):
    callback = callback_of()
    trainer = trainer_of(tmp_path, max_grad_norm=0, callbacks=[callback])
    trainer.train()
    first = callback.guard
    trainer.train()
    assert callback.guard is not first
    assert callback.guard.step == 4


class Subclass(transformers.Trainer):
    pass


@pytest.mark.parametrize("kind", [transformers.Trainer, Subclass])
def test_their_clip_is_warned_of_by_the_arguments_name(tmp_path, kind):
    trainer = trainer_of(tmp_path, max_grad_norm=1.0, kind=kind, callbacks=[callback_of()])
    with pytest.warns(
        gk.errors.DoubleClippingWarning, match=r"set TrainingArguments\(max_grad_norm=0\)"
    ) as warned:
        trainer.train()
    assert len(warned) == 1


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_a_skip_is_a_skip_to_the_trainers_scheduler(tmp_path):
    class Spoiling(transformers.Trainer):
        def compute_loss(self, *arguments, **others):
            loss = super().compute_loss(*arguments, **others)
            return loss * math.nan if self.state.global_step == 1 else loss

    callback = callback_of()
    trainer = trainer_of(tmp_path, max_grad_norm=0, kind=Spoiling, callbacks=[callback])
    trainer.train()
    assert callback.guard.step == 4
    assert trainer.lr_scheduler.last_epoch == 3
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_without_transformers_the_extra_is_named():
    code = "import sys; sys.modules['transformers'] = None\nimport gradkeel.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'gradkeel[transformers]'" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("gradkeel.errors.MissingExtraError")


def test_a_frozen_base_with_a_trained_head(tmp_path):
    callback = callback_of("norm:0.01", exclude="*.bias")
    trainer = trainer_of(tmp_path, max_grad_norm=0, callbacks=[callback])
    trainer.model.transformer.requires_grad_(False)
    trainer.model.lm_head = nn.Linear(8, 17)
    trainer.train()
    assert set(callback.guard.report.norms) == {"lm_head.weight", "lm_head.bias"}
    assert callback.guard.report.selections[-1].measured.names == ("lm_head.bias",)
