"""FSDP1 through Accelerate's plugin and the Transformers Trainer, on two gloo ranks: the norm is the whole model's."""

import tempfile
import warnings

import pytest
import torch
from torch import nn

import gradkeel as gk

from tests.distributed.conftest import pool, ranks  # noqa: F401  # fixtures
from tests.distributed.test_agreement import outcome

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

BOUND = 0.05


def make_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def inputs(rank):
    return torch.arange(6.0).reshape(2, 3) * (0.1 + rank)


def oracle(batches):
    """Norm and coefficient of the first step over both ranks' batches, in float64."""
    model = make_model().double()
    (sum((model(batch.double()) - 1.0).square().mean() for batch in batches) / 2).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    return norm, BOUND / norm


def with_fsdp1_on_cpus(act):
    """Accelerate lets its plugin in on accelerators only; what it does with it is the same."""
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=1, use_orig_params=True)
    make = accelerate.state.AcceleratorState.__init__

    def patched(self, *arguments, **options):
        make(self, *arguments, **options)
        self.distributed_type, self.fsdp_plugin = accelerate.DistributedType.FSDP, plugin

    accelerate.state.AcceleratorState.__init__ = patched
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return act()
    finally:
        accelerate.state.AcceleratorState.__init__ = make
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


def with_accelerate(rank, attach):
    def act():
        accelerator = accelerate.Accelerator(cpu=True)
        plain = make_model()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        policy = gk.ClipByGlobalNorm(BOUND)
        guard = gk.attach(optimizer, policy, model=plain) if attach == "before" else None
        model, optimizer = accelerator.prepare(plain, optimizer)
        assert isinstance(model, torch.distributed.fsdp.FullyShardedDataParallel)
        if guard is None:
            guard = gk.attach(optimizer, policy, model=model)
        accelerator.backward((model(inputs(rank)) - 1.0).square().mean())
        optimizer.step()
        return guard.report.norm, guard.report.coefficient

    return with_fsdp1_on_cpus(lambda: outcome(act))


def test_fsdp1_through_accelerates_plugin(ranks):  # noqa: F811
    wanted = oracle([inputs(0), inputs(1)])
    for told in ranks(2, with_accelerate, "after"):
        assert told == pytest.approx(wanted, rel=1e-6)


def test_a_guard_that_was_attached_before_prepare_says_what_to_do(ranks):  # noqa: F811
    for name, words in ranks(2, with_accelerate, "before"):
        assert name == "AttachError"
        assert "with Accelerate: after prepare(), and the model that it returns" in words


def with_trainer(rank):
    import transformers

    from gradkeel.integrations.transformers import GuardCallback

    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = make_model()

        def forward(self, x, labels=None):
            seen.extend(x.tolist())
            return {"loss": (self.layers(x) - 1.0).square().mean()}

    def act():
        callback = GuardCallback(gk.ClipByGlobalNorm(BOUND))
        batches = [{"x": row, "labels": row} for row in torch.cat([inputs(0), inputs(1)])]
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder,
                use_cpu=True,
                max_steps=1,
                per_device_train_batch_size=2,
                max_grad_norm=0.0,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            trainer = transformers.Trainer(Model(), arguments, train_dataset=batches, callbacks=[callback])
            trainer.train()
        assert isinstance(trainer.model_wrapped, torch.distributed.fsdp.FullyShardedDataParallel)
        return callback.guard.report.norm, callback.guard.report.coefficient, seen

    return with_fsdp1_on_cpus(act)


def test_fsdp1_through_the_trainer(ranks):  # noqa: F811
    pytest.importorskip("transformers", reason="needs transformers")
    answers = ranks(2, with_trainer)
    wanted = oracle([torch.tensor(seen) for _, _, seen in answers])
    for norm, coefficient, _ in answers:
        assert (norm, coefficient) == pytest.approx(wanted, rel=1e-6)
