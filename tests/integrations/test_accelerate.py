"""One line with Accelerate: the guard's training equals Accelerate's own clipping."""

import math
import warnings

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.record import Reader

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

BOUND = 0.05


@pytest.fixture
def accelerator():
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def accumulating():
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) for step in range(6)]
    return model, optimizer, data


def train(accelerator, *, attach, own_clip, spoil_at=None):
    """Accelerate's own loop; ``attach`` is "before" or "after" prepare, or None."""
    model, optimizer, data = parts()
    guard = None
    # torch's epsilon, so that the two differ by rounding alone
    policy = gk.ClipByGlobalNorm(BOUND, eps=1e-6)
    if attach == "before":
        guard = gk.attach(optimizer, policy, model=model)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(data, batch_size=None)
    )
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1, gamma=0.9))
    if attach == "after":
        guard = gk.attach(optimizer, policy, model=model)
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(batch).square().mean() * (math.nan if step == spoil_at else 1.0)
            accelerator.backward(loss)
            if own_clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), BOUND)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, guard, scheduler


@pytest.mark.parametrize("setting", ["accelerator", "accumulating"])
@pytest.mark.parametrize("attach", ["before", "after"])
def test_the_guards_training_is_accelerates(setting, attach, request):
    accelerator = request.getfixturevalue(setting)
    theirs, _, _ = train(accelerator, attach=None, own_clip=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", gk.GradkeelWarning)
        ours, guard, _ = train(accelerator, attach=attach, own_clip=False)
    assert guard.step == (6 if setting == "accelerator" else 3)
    assert guard.report.clipped
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # two norms in another order of summation, and a few steps of AdamW: seen 3e-8
        torch.testing.assert_close(one, other, rtol=5e-6, atol=1e-7)


def test_their_clip_is_warned_of(accelerator):
    with pytest.warns(gk.errors.DoubleClippingWarning, match=r"accelerator\.clip_grad_norm_") as warned:
        train(accelerator, attach="before", own_clip=True)
    assert len(warned) == 1


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("attach", ["before", "after"])
def test_a_skip_is_a_skip_to_accelerates_schedulers(accelerator, attach):
    _, guard, scheduler = train(accelerator, attach=attach, own_clip=False, spoil_at=2)
    assert guard.step == 6
    assert scheduler.scheduler.last_epoch == 5
    assert not scheduler.optimizers[0].step_was_skipped


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_the_loss_scale_is_a_skip_to_accelerate(accelerator, fused):
    model, _, _ = parts()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    guard = gk.attach(inner, "global-norm:1.0", model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    said = []
    for step in range(4):
        scaler.scale(model(torch.ones(2, 4)).square().mean() * (math.inf if step == 1 else 1.0)).backward()
        optimizer.step()
        said.append((optimizer.step_was_skipped, guard.report.stepped))
        optimizer.zero_grad()
    assert said == [(False, True), (True, False), (False, True), (False, True)]


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("setting", ["accelerator", "accumulating"])
@pytest.mark.parametrize("spoil_at", [None, 3])
def test_several_optimizers_under_one_guard(setting, spoil_at, request):
    accelerator = request.getfixturevalue(setting)
    results = []
    for guarded in (True, False):
        model, _, data = parts()
        pair = [
            torch.optim.SGD(model[0].parameters(), lr=0.1),
            torch.optim.AdamW(model[2].parameters(), lr=0.01),
        ]
        model, *pair = accelerator.prepare(model, *pair)
        guard = gk.attach(pair, gk.ClipByGlobalNorm(BOUND, eps=1e-6), model=model) if guarded else None
        skipped = []
        for step, batch in enumerate(data):
            with accelerator.accumulate(model):
                spoiled = math.nan if step == spoil_at else 1.0
                accelerator.backward(model(batch).square().mean() * spoiled)
                is_skipped = False
                if not guarded and accelerator.sync_gradients:
                    is_skipped = not accelerator.clip_grad_norm_(model.parameters(), BOUND).isfinite()
                for optimizer in () if is_skipped else pair:
                    optimizer.step()
                if accelerator.sync_gradients:
                    skipped.append([optimizer.step_was_skipped for optimizer in pair])
                for optimizer in pair:
                    optimizer.zero_grad()
        if guarded:
            assert guard.step == (6 if setting == "accelerator" else 3)
            assert [all(one) for one in skipped if any(one)] == [True] * (spoil_at is not None)
        results.append(list(model.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_accelerates_checkpoints_hold_the_guard(accelerator, tmp_path):
    """`register_for_checkpointing`: after load_state both guard and record go on from there."""
    model, optimizer, data = parts()
    model, optimizer = accelerator.prepare(model, optimizer)
    guard = gk.attach(optimizer, "zclip", model=model, record=tmp_path / "run.keel")
    accelerator.register_for_checkpointing(guard)

    def go(batches):
        for batch in batches:
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    go(data[:3])
    accelerator.save_state(str(tmp_path / "checkpoint"))
    go(data[3:])
    expected = guard.state_dict()
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert guard.step == 3
    go(data[3:])
    for key, value in expected["states"]["main"].items():
        assert torch.equal(guard.state_dict()["states"]["main"][key], value)
    guard.detach()
    with Reader(tmp_path / "run.keel") as run, Reader(tmp_path / "run.keel", superseded=True) as old:
        assert run.steps().tolist() == [1, 2, 3, 4, 5, 6]
        assert old.steps().tolist() == [4, 5, 6]
        assert torch.equal(run.totals(start=4), old.totals())
