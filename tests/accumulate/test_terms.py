"""Several loss terms in one micro-batch, with one denominator or with several, and backwards that raise."""

import io

import pytest
import torch
from torch import nn

import gradkeel as gk

from tests.accumulate.loop import Loop

MICROS = [([1.0, 4.0], 1), ([5.0, 2.0], 3)]  # the window's gradient is [1.5, 1.5]
WIDE = [None, torch.float64]


class Raises(torch.autograd.Function):
    """The first node of a backward, which finds no memory."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("as at backward's first node")


# ---- backwards that raise ------------------------------------------------------------------------------------------


def raising(loop, micro, *, by_others, weight=2):
    loss = Raises.apply((loop.weight * 2.0).sum())
    if by_others:
        micro.weigh(weight)
        loss.backward()
    else:
        micro.backward(loss, weight=weight)


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("by_others", [False, True])
def test_failed_micro_batch_is_not_counted(by_others, wide):
    """Two micro-batches of 2 items with gradient 4 each: their mean is 2, whatever the one between them weighs."""
    loop = Loop(3, size=1, accumulate_dtype=wide)
    for index, micro in enumerate(loop.accumulate([([4.0], 2)] * 4)):
        if index == 1:
            with pytest.raises(torch.OutOfMemoryError), micro:
                raising(loop, micro, by_others=by_others)
            continue
        with micro:
            loop.backward(micro)
        if index == 0:
            assert loop.accumulate.loss == 0.0
    assert micro.closes_window
    loop.optimizer.step()
    assert loop.guard.report.norm == 2.0
    assert loop.moved == [2.0]


def test_a_failed_backward_that_is_caught_inside_of_the_block_may_be_tried_again():
    loop = Loop(2)
    for index, micro in enumerate(loop.accumulate(MICROS)):
        with micro:
            if index == 1:
                with pytest.raises(torch.OutOfMemoryError):
                    raising(loop, micro, by_others=False)
            loop.backward(micro)
    loop.optimizer.step()
    assert loop.moved == [1.5, 1.5]


def test_a_backward_that_fails_half_way_breaks_the_window_wherever_it_is_caught():
    loop = Loop(2)
    other = nn.Parameter(torch.zeros(2))
    loop.optimizer.add_param_group({"params": [other]})
    with next(loop.accumulate(MICROS)) as micro, pytest.raises(torch.OutOfMemoryError):
        micro.backward((other * Raises.apply(loop.weight)).sum(), weight=1)
    assert other.grad is not None
    with pytest.raises(gk.WindowError, match=r"micro-batch 1 of 2 raised OutOfMemoryError.*drop"):
        loop.optimizer.step()


@pytest.mark.parametrize("wide", WIDE)
def test_an_exception_after_one_of_the_terms_breaks_the_window(wide):
    loop = Loop(2, accumulate_dtype=wide)
    micro = next(loop.accumulate(MICROS))

    def breaks():
        with micro:
            loop.backward(micro)
            raising(loop, micro, by_others=False, weight=1)

    with pytest.raises(torch.OutOfMemoryError):
        breaks()
    with pytest.raises(gk.WindowError, match=r"micro-batch 1 of 2 raised OutOfMemoryError"):
        loop.optimizer.step()
    loop.accumulate.drop()
    loop.run(MICROS)
    assert loop.moved == [1.5, 1.5]


# ---- terms that share the weight -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize(
    "second", [{"weight": 2}, {"weight": 0}, {}, {"weight": torch.tensor(2.0)}], ids=repr
)
def test_loss_terms_share_a_micro_batch(second, wide):
    """(3 + 5) / 2, the micro-batch's two items counting once."""
    loop = Loop(1, size=1, accumulate_dtype=wide)
    with next(loop.accumulate([1])) as micro:
        micro.backward(3 * loop.weight.sum(), weight=2)
        micro.backward(5 * loop.weight.sum(), **second)
    loop.optimizer.step()
    assert loop.moved == [4.0]
    assert loop.guard.report.scalars["loss"] == 0.0


def test_terms_that_are_means_are_multiplied_by_the_weight_they_share():
    loop = Loop(2, size=1, reduction="mean")
    with torch.no_grad():
        loop.weight.fill_(1.0)
    for micro in loop.accumulate([(3.0, 1), (5.0, 3)]):
        gradient, amount = micro.batch
        with micro:
            hidden = loop.weight.sum() * gradient
            micro.backward(hidden, weight=amount, retain_graph=True)
            micro.backward(hidden * 0.5)  # a penalty, as it is
    loop.optimizer.step()
    assert loop.guard.report.norm == (3.0 * 1.5 * 1 + 5.0 * 1.5 * 3) / 4
    assert loop.guard.report.scalars["loss"] == (3.0 * 1.5 * 1 + 5.0 * 1.5 * 3) / 4


def test_micro_batches_that_count_alike_may_have_several_terms():
    loop = Loop(2, size=1)
    for micro in loop.accumulate([3.0, 5.0]):
        with micro:
            micro.backward(micro.batch * loop.weight.sum())
            micro.backward(loop.weight.sum())
    loop.optimizer.step()
    assert loop.moved == [5.0]


@pytest.mark.parametrize(("first", "second"), [(2, 3), (0, 2), (None, 2)])
def test_terms_of_one_micro_batch_cannot_weigh_differently(first, second):
    loop = Loop(2, size=1)
    with next(loop.accumulate([1])) as micro:
        micro.backward(loop.weight.sum(), weight=first)
        with pytest.raises(gk.WindowError, match=r"share its weight.*Accumulator\(per="):
            micro.backward(loop.weight.sum(), weight=second)


def test_a_micro_batch_without_items_has_no_terms_at_all():
    loop = Loop(2)
    for index, micro in enumerate(loop.accumulate([1, 2])):
        with micro:
            micro.backward(loop.weight.sum() * (float("nan") if index else 1.0), weight=1 - index)
            micro.backward(loop.weight.sum() * (float("nan") if index else 2.0))
    loop.optimizer.step()
    assert loop.moved == [3.0, 3.0]


# ---- several denominators ------------------------------------------------------------------------------------------

BATCHES = [(5, 1), (2, 3), (9, 2), (4, 4), (7, 0), (0, 2), (3, 1)]  # tokens and sequences of each micro-batch


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(count, 3, generator=generator) for count in counts) for counts in BATCHES]


def losses(model, tokens, sequences):
    """Sums over tokens and over sequences, which share nothing but the model."""
    return model(tokens)[:, 0].square().sum(), (model(sequences)[:, 1] - 1.0).square().sum()


def oracle(steps, bound):
    """float64, each window's tokens and sequences as one batch; the last window's gradient and the loss."""
    model = make(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = [tuple(part.double() for part in batch) for batch in batches()]
    for start in range(0, len(found), steps):
        tokens, sequences = (torch.cat([one[i] for one in found[start : start + steps]]) for i in (0, 1))
        token_sum, sequence_sum = losses(model, tokens, sequences)
        loss = token_sum / max(1, len(tokens)) + sequence_sum / max(1, len(sequences))
        optimizer.zero_grad()
        loss.backward()
        if bound is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), float(loss.detach())


def run(parts, found, *, scaler=None):
    model, optimizer, _, accumulate = parts
    for micro in accumulate(found):
        if micro.batch is None:
            return
        with micro:
            token_sum, sequence_sum = losses(model, *micro.batch)
            count, sequences = map(len, micro.batch)
            micro.backward(sequence_sum, weight=sequences, per="sequence", scaler=scaler)
            micro.backward(token_sum, weight=count, per="token", scaler=scaler)
        if micro.closes_window:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()


def build(steps, bound=None, **options):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    guard = gk.attach(optimizer, None if bound is None else gk.ClipByGlobalNorm(bound), model=model)
    return model, optimizer, guard, gk.Accumulator(guard, steps, per=("token", "sequence"), **options)


def weights_of(parts):
    return nn.utils.parameters_to_vector(parts[0].parameters()).detach().double()


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bound", [None, 0.05])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_two_denominators_in_one_window(steps, bound, scaled, wide):
    parts = build(steps, bound, accumulate_dtype=wide)
    run(parts, batches(), scaler=torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None)
    wanted, loss = oracle(steps, bound)
    torch.testing.assert_close(weights_of(parts), wanted, rtol=1e-5, atol=1e-6)
    assert float(parts[2].report.scalars["loss"]) == pytest.approx(loss, rel=1e-5)


def test_a_denominator_without_items_counts_nothing():
    parts = build(1)
    run(parts, [batches()[5]])  # sequences alone
    model = make(torch.float64)
    (losses(model, *(part.double() for part in batches()[5]))[1] / 2).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert parts[2].report.norm == pytest.approx(float(norm), rel=1e-5)
    empty = torch.empty(0, 3)
    run(parts, [(empty, empty)])
    assert parts[2].report.reason == "the window's weight is zero"


def test_a_window_of_two_denominators_resumes_bitwise_equal():
    whole, killed, resumed = build(4), build(4), build(4)
    found = batches()
    run(whole, found)
    run(killed, [*found[:2], None])
    path = io.BytesIO()
    torch.save([part.state_dict() for part in killed], path)
    path.seek(0)
    for part, state in zip(resumed, torch.load(path, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(resumed, found[2:])
    assert torch.equal(weights_of(whole), weights_of(resumed))
    with pytest.raises(gk.CheckpointError, match=r"per=\['token', 'sequence'\]"):
        Loop(4).accumulate.load_state_dict(killed[3].state_dict())


def test_a_complete_window_of_two_denominators_is_saved_as_it_is():
    killed, resumed = build(2), build(2)
    for micro in killed[3](batches()[:2]):
        with micro:
            for per, loss, part in zip(
                ("token", "sequence"), losses(killed[0], *micro.batch), micro.batch, strict=True
            ):
                micro.backward(loss, weight=len(part), per=per)
    resumed[3].load_state_dict(killed[3].state_dict())
    for parts in (killed, resumed):
        parts[1].step()
    assert torch.equal(weights_of(killed), weights_of(resumed))
    assert killed[2].report.scalars["loss"] == resumed[2].report.scalars["loss"]


def test_a_dropped_window_of_two_denominators_leaves_nothing_behind():
    dropped, fresh = build(2), build(2)
    found = batches()
    run(dropped, [found[3], None])
    dropped[3].drop()
    for parts in (dropped, fresh):
        run(parts, found[:2])
    assert torch.equal(weights_of(dropped), weights_of(fresh))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"per": "token"}, ValueError, "different names"),
        ({"per": ()}, ValueError, "different names"),
        ({"per": ("a", "a")}, ValueError, "different names"),
        ({"per": ("a", "b"), "noise_scale": True}, ValueError, "needs one denominator"),
    ],
)
def test_denominators_are_checked(options, error, words):
    with pytest.raises(error, match=words):
        Loop(2, **options)


@pytest.mark.parametrize("per", [None, "tokn"])
def test_a_term_must_say_which_denominator_is_its_own(per):
    loop = Loop(2, per=("token", "sequence"))
    with next(loop.accumulate([1])) as micro:
        with pytest.raises(ValueError, match=r"per=.*must be one of.*'token', 'sequence'") as caught:
            micro.backward(loop.weight.sum(), weight=1, per=per)
        assert ("did you mean 'token'?" in str(caught.value)) == (per == "tokn")
        with pytest.raises(ValueError, match="must be one of"):
            micro.weigh(2)


# ---- loops that draw their batches by calls ------------------------------------------------------------------------


def test_micro_batches_without_a_loader():
    loop = Loop(2)
    batches = iter([*MICROS, *MICROS])
    for _ in range(2):
        for index in range(2):
            with loop.accumulate.micro() as micro:
                assert (micro.batch, micro.index, micro.is_filler) == (None, index, False)
                gradient, amount = next(batches)
                micro.backward((loop.weight * torch.tensor(gradient)).sum(), weight=amount)
            assert micro.closes_window == (index == 1)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert loop.moved == [3.0, 3.0]


def test_a_window_without_a_loader_may_be_finished_early():
    loop = Loop(4)
    for gradient, amount in MICROS:
        with loop.accumulate.micro() as micro:
            micro.backward((loop.weight * torch.tensor(gradient)).sum(), weight=amount)
    with pytest.raises(gk.WindowError, match="after micro-batch 2 of 4"):
        loop.optimizer.step()
    loop.accumulate.finish()
    loop.optimizer.step()
    assert loop.moved == [1.5, 1.5]
    with pytest.raises(gk.WindowError, match="zero_grad"), loop.accumulate.micro():
        pass


# ---- the optimizer's groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_group_that_is_added_in_the_middle_of_a_window_is_named(is_complete):
    loop = Loop(2)
    micros = loop.accumulate(MICROS)
    for _ in range(2 if is_complete else 1):
        with next(micros) as micro:
            loop.backward(micro)
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    words = r"parameters have changed in the middle of the window.*only after optimizer\.step\(\)"
    if is_complete:
        with pytest.raises(gk.WindowError, match=words):
            loop.optimizer.step()
    else:
        with pytest.raises(gk.WindowError, match=words), next(micros):
            pass
    loop.accumulate.drop()
    loop.run(MICROS)
    assert loop.moved == [1.5, 1.5]
