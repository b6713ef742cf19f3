"""One line with the Transformers Trainer: the guard's training equals the Trainer's own clipping."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.record import Reader

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


def trainer_of(folder, *, max_grad_norm, accumulation=1, kind=None, settings=None, **arguments):
    settings = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "max_grad_norm": max_grad_norm,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            "gradient_accumulation_steps": accumulation,
            **(settings or {}),
        },
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


def test_a_trainer_that_tells_callbacks_of_what_holds_its_model(tmp_path):
    """As SetFit does."""
    callback = callback_of()
    trainer = trainer_of(tmp_path, max_grad_norm=0, callbacks=[callback])
    tell = callback.on_train_begin
    callback.on_train_begin = lambda *given, model, **others: tell(*given, model=[model], **others)
    trainer.train()
    assert callback.guard.step == 4
    assert set(callback.guard.names) == {name for name, _ in trainer.model.named_parameters()}


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


# -- restarts ---------------------------------------------------------------------------------------------------


def saving(folder, path, policy="zclip", **settings):
    """A trainer that takes a checkpoint every second step, and its callback."""
    callback = callback_of(policy, record=path)
    settings = {"save_strategy": "steps", "save_steps": 2, **settings}
    return trainer_of(folder, max_grad_norm=0, settings=settings, callbacks=[callback]), callback


def read(path, **options):
    with Reader(path, **options) as run:
        return run.steps().tolist(), run.totals(), [rollback.step for rollback in run.rollbacks]


@pytest.mark.parametrize("moved", [False, True])
def test_resume_from_checkpoint_goes_on_as_if_never_stopped(tmp_path, moved):
    """F1: guard and record began anew. A new process: another trainer, callback, model and optimizer."""
    whole, kept = saving(tmp_path / "whole", tmp_path / "whole.keel", max_steps=6)
    whole.train()
    first, _ = saving(tmp_path / "run", tmp_path / "run.keel", max_steps=6)
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    if moved:
        checkpoint = checkpoint.rename(tmp_path / "elsewhere")
    second, callback = saving(tmp_path / "run", tmp_path / "run.keel", max_steps=6)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert callback.guard.step == 6
    expected, found = kept.guard.state_dict(), callback.guard.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected["states"]["main"].items():
        torch.testing.assert_close(found["states"]["main"][key], value, rtol=1e-9, atol=0)
    steps, totals, rollbacks = read(tmp_path / "run.keel")
    assert (steps, rollbacks) == ([1, 2, 3, 4, 5, 6], [5])
    torch.testing.assert_close(totals, read(tmp_path / "whole.keel")[1], rtol=1e-6, atol=0)
    assert read(tmp_path / "run.keel", superseded=True)[0] == [5, 6]


def test_the_last_checkpoint_is_found(tmp_path):
    saving(tmp_path / "run", tmp_path / "run.keel", max_steps=4)[0].train()
    trainer, callback = saving(tmp_path / "run", tmp_path / "run.keel", max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert callback.guard.step == 6
    assert read(tmp_path / "run.keel")[0] == [1, 2, 3, 4, 5, 6]
    assert read(tmp_path / "run.keel")[2] == []


def test_a_checkpoint_without_a_guard_or_with_another_policy(tmp_path):
    trainer, _ = saving(tmp_path / "run", tmp_path / "run.keel")
    trainer.train()
    other, callback = saving(tmp_path / "run", tmp_path / "run.keel", policy="autoclip", max_steps=6)
    with pytest.warns(gk.GradkeelWarning, match="the checkpoint's guard does not fit"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert callback.guard.step == 6
    (tmp_path / "run" / "checkpoint-4" / "gradkeel_guard.pt").unlink()
    other, callback = saving(tmp_path / "run", tmp_path / "run.keel", max_steps=6)
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert callback.guard.step == 6
    assert read(tmp_path / "run.keel")[0] == [1, 2, 3, 4, 5, 6]


def test_training_twice_keeps_the_first_record(tmp_path):
    trainer, callback = saving(tmp_path / "run", tmp_path / "run.keel", save_strategy="no")
    trainer.train()
    trainer.train()
    assert callback.guard.step == 4
    assert read(tmp_path / "run.keel")[0] == read(tmp_path / "run.keel", superseded=True)[0] == [1, 2, 3, 4]


def test_auto_find_batch_size_tries_again(tmp_path):
    """F2: AttachError, or no record any more."""
    failed = []

    class Small(transformers.Trainer):
        def training_step(self, model, inputs, *others):
            if self.state.global_step == 2 and len(inputs["input_ids"]) > 2:
                failed.append(len(inputs["input_ids"]))
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 EiB")
            return super().training_step(model, inputs, *others)

    callback = callback_of("zclip", record=tmp_path / "run.keel")
    trainer = trainer_of(
        tmp_path, max_grad_norm=0, kind=Small, callbacks=[callback],
        settings={"auto_find_batch_size": True, "per_device_train_batch_size": 4},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", gk.GradkeelWarning)
        trainer.train()
    assert callback.guard.step == 4
    assert callback.guard.report.stepped
    assert read(tmp_path / "run.keel")[0] == [1, 2, 3, 4]
    assert read(tmp_path / "run.keel", superseded=True)[0] == [1, 2] * len(failed)
    assert failed in ([4], [4, 3])  # an old accelerate halves the batch


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainers_logs_tell_of_the_guard_and_the_record_of_the_loss(tmp_path, accumulation):
    class Reporter(transformers.TrainerCallback):
        """Stands before the guard's callback, as the Trainer's own reporters do."""

        seen = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **others):
            self.seen.append(dict(logs))

    callback = callback_of(record=tmp_path / "run.keel")
    reporter = Reporter()
    reporter.seen = []
    trainer = trainer_of(
        tmp_path / "out",
        max_grad_norm=0,
        accumulation=accumulation,
        callbacks=[reporter, callback],
        settings={"logging_strategy": "steps", "logging_steps": 1},
    )
    trainer.train()
    with Reader(tmp_path / "run.keel") as run:
        norms, coefficients, losses = run.totals(), run.coefficients(), run.losses()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    for entries in (logs, [entry for entry in reporter.seen if "learning_rate" in entry]):
        assert [entry["grad_norm"] for entry in entries] == pytest.approx(norms.tolist(), rel=1e-6)
        assert [entry["clip_coefficient"] for entry in entries] == pytest.approx(
            coefficients.tolist(), rel=1e-6
        )
        assert [(entry["clipped_share"], entry["skipped_steps"]) for entry in entries] == [(1.0, 0.0)] * 4
    assert [entry["loss"] for entry in logs] == pytest.approx(losses.tolist(), abs=5e-5)  # old ones round
    assert "training_step" not in vars(trainer)


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_callback_sees_gradients_as_backward_left_them(tmp_path, value):
    """Set not to clip, the Trainer measures by a clip to inf, which makes all gradients NaN where one is not finite."""
    name = "transformer.h.0.mlp.c_fc.weight"

    class Spoiled(transformers.Trainer):
        def training_step(self, model, *arguments, **named):
            loss = super().training_step(model, *arguments, **named)
            if self.state.global_step == 2:
                model.get_parameter(name).grad[0, 0] = value
            return loss

    callback = callback_of(record=tmp_path / "run.keel")
    trainer = trainer_of(tmp_path / "out", max_grad_norm=0, kind=Spoiled, callbacks=[callback])
    trainer.train()
    with Reader(tmp_path / "run.keel") as run:
        ((step, reason),) = run.skips()
    assert (step, name in reason) == (3, True)
    assert "_get_grad_norm" not in vars(trainer)
    diagnosis = gk.explain.explain(tmp_path / "run.keel").diagnosis
    assert (diagnosis.onset, diagnosis.where[0]) == (3, name)


# -- autopsies --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::gradkeel.errors.GradkeelWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_autopsy_names_the_sample(tmp_path, accumulation):
    """The callback hands over batch and loss; the run is bit for bit that without an autopsy."""
    path = tmp_path / "run.keel"

    class Spoiled(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            rows = inputs["labels"]
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
            is_bad = (inputs["input_ids"] == bad).all(dim=1)
            return (losses.mean(dim=1) * torch.where(is_bad, 1e5, 1.0)).mean()

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(rows)

    bad = torch.full((8,), 3)
    rows = data() * 6
    rows[42 * accumulation + accumulation - 1] = {"input_ids": bad, "labels": bad}
    rows = rows[: 48 * accumulation]

    def train(**options):
        callback = callback_of("global-norm:1.0", **options)
        trainer = trainer_of(
            tmp_path,
            max_grad_norm=0,
            accumulation=accumulation,
            kind=Spoiled,
            settings={"max_steps": 12, "per_device_train_batch_size": 4},
            callbacks=[callback],
        )
        trainer.train_dataset = rows
        trainer.train()
        return trainer, callback

    plain, _ = train()
    watched, callback = train(autopsy=True, record=path)
    (told,) = gk.explain.explain(path).autopsies
    place = 42 * accumulation + accumulation - 1
    assert (told.cause, told.step, told.sample) == ("sample", 11, place % 4)
    assert told.micro == (None if accumulation == 1 else place // 4 % 2)
    assert told.experiments[0].norm == pytest.approx(told.norm, rel=1e-5)
    assert told == callback.autopsy.last
    for one, other in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert one.equal(other)
    assert "training_step" not in vars(watched)
