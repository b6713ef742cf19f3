"""One line with Lightning, in `configure_optimizers`: the guard's training equals the Trainer's own clipping."""

import math
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.record import Reader

lightning = pytest.importorskip("lightning", reason="needs lightning")

BOUND = 0.05


class Module(lightning.LightningModule):
    """A regression; subclasses differ in who clips and in who steps."""

    def __init__(self, *, guarded, make=torch.optim.AdamW, spoil_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.guarded, self.make, self.spoil_at = guarded, make, spoil_at
        self.guard = None

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=0.01)
        if self.guarded:
            # torch's epsilon, so that the two differ by rounding alone
            self.guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND, eps=1e-6), model=self)
        return optimizer

    def training_step(self, batch, batch_index):
        return self.net(batch).square().mean() * (math.nan if batch_index == self.spoil_at else 1.0)


class Manual(Module):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_index))
        if not self.guarded:
            self.clip_gradients(optimizer, gradient_clip_val=BOUND, gradient_clip_algorithm="norm")
        optimizer.step()


def batches(count):
    return [torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) for step in range(count)]


def fit(module, ckpt_path=None, data=None, **arguments):
    trainer = lightning.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
        }
    )
    loader = torch.utils.data.DataLoader(data or batches(6), batch_size=None)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(
    ("make", "precision"),
    [
        (torch.optim.AdamW, "32-true"),
        (torch.optim.SGD, "32-true"),
        (torch.optim.LBFGS, "64-true"),  # iterates: in single precision two runs drift apart
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_guards_training_is_lightnings(make, precision, accumulation):
    own = {"accumulate_grad_batches": accumulation, "precision": precision}
    theirs = fit(Module(guarded=False, make=make), gradient_clip_val=BOUND, **own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", gk.GradkeelWarning)
        ours = fit(Module(guarded=True, make=make), **own)
    assert ours.guard.step == 6 // accumulation
    assert ours.guard.report.clipped
    assert "net.0.weight" in ours.guard.report.norms
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # two norms in another order of summation, and a few steps: seen 4e-8
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_under_lightnings_loss_scale():
    def fp16():
        return lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    theirs = fit(Module(guarded=False), gradient_clip_val=BOUND, plugins=[fp16()])
    ours = fit(Module(guarded=True), plugins=[fp16()])
    assert ours.guard.report.clipped
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    module = fit(Module(guarded=True, spoil_at=5), plugins=[fp16()])
    assert module.guard.report.reason.startswith("step 6: the loss scale overflowed")
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_manual_optimization():
    theirs, ours = fit(Manual(guarded=False)), fit(Manual(guarded=True))
    assert ours.guard.step == 6
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_their_clip_is_warned_of_by_the_arguments_name():
    with pytest.warns(
        gk.errors.DoubleClippingWarning, match=r"leave Trainer\(gradient_clip_val=None\)"
    ) as warned:
        fit(Module(guarded=True), gradient_clip_val=1.0)
    assert len([w for w in warned if issubclass(w.category, gk.GradkeelWarning)]) == 1


@pytest.mark.parametrize("kind", [Module, Manual])
def test_a_skipped_step_changes_nothing(kind):
    with pytest.warns(gk.errors.SkippedStepWarning, match="step 3: all 4 gradients are not finite"):
        module = fit(kind(guarded=True, spoil_at=2))
    assert module.guard.step == 6
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_several_optimizers_of_a_manual_loop():
    class Pair(Manual):
        def configure_optimizers(self):
            parts = [self.net[0], self.net[2]]
            optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
            self.guards = [gk.attach(o, gk.ClipByNorm(BOUND), model=self) for o in optimizers]
            return optimizers

        def training_step(self, batch, batch_index):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.net(batch).square().mean())
                optimizer.step()

    module = fit(Pair(guarded=True))
    assert [guard.step for guard in module.guards] == [6, 6]
    assert module.guards[0].names == ("net.0.weight", "net.0.bias")


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("spoil_at", [None, 2])
def test_several_optimizers_under_one_guard(spoil_at, precision):
    class Pair(Manual):
        def configure_optimizers(self):
            parts = [self.net[0], self.net[2]]
            optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
            if self.guarded:
                self.guard = gk.attach(optimizers, gk.ClipByGlobalNorm(BOUND, eps=1e-6), model=self)
            return optimizers

        def training_step(self, batch, batch_index):
            optimizers = self.optimizers()
            spoiled = math.nan if batch_index == self.spoil_at else 1.0
            self.manual_backward(self.net(batch).square().mean() * spoiled)
            if not self.guarded:
                torch.nn.utils.clip_grad_norm_(self.parameters(), BOUND)
            for optimizer in optimizers:
                if self.guarded or batch_index != 2 or spoil_at is None:
                    optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()

    scaler = torch.amp.GradScaler("cpu")
    plugins = [lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)] if precision else []
    ours = fit(Pair(guarded=True, spoil_at=spoil_at), plugins=plugins)
    assert ours.guard.step == 6
    assert len(ours.guard.report.norms) == 4
    if precision is None:  # Lightning's own way has no clip of several scaled optimizers to compare with
        theirs = fit(Pair(guarded=False, spoil_at=spoil_at))
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    elif spoil_at is not None:
        assert scaler.get_scale() < 65536.0
    assert all(parameter.isfinite().all() for parameter in ours.parameters())


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("attach", ["before", "after"])
def test_under_fabric(attach):
    def train(when):
        torch.manual_seed(0)
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        plain = optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        policy, guard = gk.ClipByGlobalNorm(BOUND, eps=1e-6), None
        if when == "before":
            guard = gk.attach(optimizer, policy, model=model)
        model, optimizer = fabric.setup(model, optimizer)
        if when == "after":
            guard = gk.attach(optimizer, policy, model=model)
        for step, batch in enumerate(batches(6)):
            fabric.backward(model(batch).square().mean() * (math.nan if step == 3 else 1.0))
            if guard is None:
                fabric.clip_gradients(model, optimizer, max_norm=BOUND, error_if_nonfinite=False)
            if guard is not None or step != 3:
                optimizer.step()
            optimizer.zero_grad()
        if guard is not None:
            assert guard.step == 6
            assert guard.names == ("0.weight", "0.bias", "2.weight", "2.bias")
            guard.detach()
            assert not any("gradkeel" in name for one in (plain, optimizer) for name in vars(one))
        return list(model.parameters())

    for one, other in zip(train(attach), train(None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- restarts ---------------------------------------------------------------------------------------------------


def callback_of(path, policy="zclip"):
    from gradkeel.integrations.lightning import GuardCallback

    return GuardCallback(policy, record=path)


def saving(folder):
    return lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_fit_from_a_checkpoint_goes_on_as_if_never_stopped(tmp_path):
    whole, first, second = (callback_of(tmp_path / name) for name in ("whole.keel", "run.keel", "run.keel"))
    fit(Module(guarded=False), max_epochs=2, callbacks=[whole])
    fit(
        Module(guarded=False),
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[first, saving(tmp_path / "run")],
    )
    (checkpoint,) = (tmp_path / "run").iterdir()
    fit(Module(guarded=False), max_epochs=2, callbacks=[second], ckpt_path=checkpoint)
    assert second.guard.step == 12
    for key, value in whole.guard.state_dict()["states"]["main"].items():
        torch.testing.assert_close(second.guard.state_dict()["states"]["main"][key], value, rtol=1e-9, atol=0)
    with Reader(tmp_path / "run.keel") as run, Reader(tmp_path / "whole.keel") as other:
        assert run.steps().tolist() == list(range(1, 13))
        assert run.rollbacks == []
        torch.testing.assert_close(run.totals(), other.totals(), rtol=1e-6, atol=0)


def test_fitting_again_takes_over(tmp_path):
    """F2: a module that attaches in configure_optimizers, and a trainer that is made again in the same process."""

    class Recorded(Module):
        def configure_optimizers(self):
            optimizer = self.make(self.parameters(), lr=0.01)
            self.guard = gk.attach(optimizer, "zclip", model=self, record=tmp_path / "run.keel")
            return optimizer

    module = Recorded(guarded=True)
    fit(module)
    fit(module)
    module.guard.detach()
    with Reader(tmp_path / "run.keel") as run, Reader(tmp_path / "run.keel", superseded=True) as old:
        assert run.steps().tolist() == old.steps().tolist() == list(range(1, 7))


def test_an_error_leaves_no_guard(tmp_path):
    class Broken(Module):
        def training_step(self, batch, batch_index):
            if batch_index == 3:
                raise KeyError("a batch that is not there")
            return super().training_step(batch, batch_index)

    callback = callback_of(tmp_path / "run.keel")
    with pytest.raises(KeyError):
        fit(Broken(guarded=False), callbacks=[callback])
    assert not hasattr(callback.guard.optimizer, "_gradkeel_guard")
    with Reader(tmp_path / "run.keel") as run:
        assert len(run) == 3


def test_pytorch_lightning_alone_will_do(monkeypatch, tmp_path):
    """Libraries that build on the package of the older name do not bring the other."""
    older = types.ModuleType("pytorch_lightning")
    older.Callback = lightning.Callback
    with monkeypatch.context() as patched:
        for name in ("lightning", "lightning.pytorch"):
            patched.setitem(sys.modules, name, None)
        patched.setitem(sys.modules, "pytorch_lightning", older)
        patched.delitem(sys.modules, "gradkeel.integrations.lightning", raising=False)
        callback = callback_of(tmp_path / "run.keel")
    fit(Module(guarded=False), callbacks=[callback])
    assert callback.guard.step == 6


def test_several_optimizers_are_refused_with_the_fix(tmp_path):
    class Pair(Manual):
        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]

    with pytest.raises(gk.AttachError, match="attach to each of them in configure_optimizers"):
        fit(Pair(guarded=False), callbacks=[callback_of(tmp_path / "run.keel")])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_callback_logs_what_steps_came_to_and_the_record_has_the_loss(tmp_path, accumulation):
    from gradkeel.integrations.lightning import GuardCallback

    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *batch):
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    class Telling(Module):
        losses = ()

        def training_step(self, batch, batch_index):
            loss = super().training_step(batch, batch_index)
            self.losses = (*self.losses, loss.item())
            return loss

    callback = GuardCallback(gk.ClipByGlobalNorm(BOUND), record=tmp_path / "run.keel")
    module = Telling(guarded=False)
    fit(module, callbacks=[callback, Watch()], accumulate_grad_batches=accumulation)
    with Reader(tmp_path / "run.keel") as run:
        norms, coefficients, losses = (
            run.totals().tolist(),
            run.coefficients().tolist(),
            run.losses().tolist(),
        )
    steps = seen[accumulation - 1 :: accumulation]
    assert len(norms) == 6 // accumulation
    assert [entry["grad_norm"] for entry in steps] == pytest.approx(norms, rel=1e-6)
    assert [entry["clip_coefficient"] for entry in steps] == pytest.approx(coefficients, rel=1e-6)
    assert [(entry["clipped_share"], entry["skipped_steps"]) for entry in steps] == [(1.0, 0.0)] * len(norms)
    means = [sum(module.losses[i : i + accumulation]) / accumulation for i in range(0, 6, accumulation)]
    assert losses == pytest.approx(means, rel=1e-6)


class Spoiled(Module):
    """A sample of large numbers weighs a million; and something is logged."""

    def training_step(self, batch, batch_index):
        weights = torch.where(batch.amax(dim=1, keepdim=True) > 100, 1e6, 1.0)
        loss = (self.net(batch).square() * weights).mean()
        self.log("seen", loss, on_step=False, on_epoch=True)
        return loss


@pytest.mark.filterwarnings("ignore::gradkeel.errors.GradkeelWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_autopsy_names_the_sample(tmp_path, accumulation):
    """The callback hands over batch and loss; the run, its logs included, is bit for bit that without an autopsy."""
    from gradkeel.integrations.lightning import GuardCallback

    def train(**options):
        callback = GuardCallback("global-norm:1.0", **options)
        data = batches(16 * accumulation)
        data[13 * accumulation - 1][5] = 1000.0
        module = fit(
            Spoiled(guarded=False), data=data, callbacks=[callback], accumulate_grad_batches=accumulation
        )
        assert "training_step" not in vars(module.trainer.strategy)
        return module, module.trainer.callback_metrics["seen"], callback

    plain, seen, _ = train()
    watched, seen_again, callback = train(autopsy=True, record=tmp_path / "run.keel")
    (told,) = gk.explain.explain(tmp_path / "run.keel").autopsies
    assert (told.cause, told.step, told.sample) == ("sample", 13, 5)
    assert told.micro == (None if accumulation == 1 else 1)
    assert told.experiments[0].norm == pytest.approx(told.norm, rel=1e-5)
    assert told == callback.autopsy.last
    assert seen == seen_again
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert one.equal(other)
