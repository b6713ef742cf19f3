"""A distributed model with a single rank: its exchange is put off as with many, and nothing else changes."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import gradkeel as gk

MICROS = [([1.0, 4.0], 1), ([5.0, 2.0], 3)]  # the window's gradient is [1.5, 1.5]


class Iterated:
    """A loader whose length is told, rightly or not, and which notes what it has been asked for."""

    def __init__(self, items, length):
        self.items, self.length, self.fetched = items, length, 0

    def __iter__(self):
        for item in self.items:
            self.fetched += 1
            yield item

    def __len__(self):
        return self.length


class Dot(nn.Module):
    """The inner product with a parameter of zeros: the batch is the gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        return (self.weight * batch).sum()


@pytest.fixture(scope="module")
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(params=["whole", "part"])
def model(request, one_rank):
    """Exchanges gradients itself, or has a part that does."""
    exchanging = DistributedDataParallel(Dot())
    return exchanging if request.param == "whole" else nn.Sequential(nn.Identity(), exchanging)


def exchanging(model):
    return model if isinstance(model, DistributedDataParallel) else model[1]


def make(model, steps=2, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, None, model=model)
    return optimizer, gk.Accumulator(guard, steps, model=model, **options)


def run(model, optimizer, accumulate, loader):
    """Whether each micro-batch's backward exchanged gradients, and at which ones the optimizer made a step."""
    exchanged, stepped = [], []
    for index, micro in enumerate(accumulate(loader)):
        gradient, amount = micro.batch
        with micro:
            exchanged.append(exchanging(model).require_backward_grad_sync)
            micro.backward(model(torch.tensor(gradient)), weight=amount)
        if micro.closes_window:
            stepped.append(index)
            optimizer.step()
            optimizer.zero_grad()
    return exchanged, stepped


def moved(model):
    return [-entry for entry in exchanging(model).module.weight.tolist()]


@pytest.mark.parametrize("wide", [None, torch.float64])
@pytest.mark.parametrize("has_length", [True, False])
def test_only_the_last_backward_of_a_window_exchanges(model, has_length, wide):
    optimizer, accumulate = make(model, accumulate_dtype=wide)
    batches = [*MICROS, *MICROS, ([2.0, 0.0], 4)]
    exchanged, stepped = run(model, optimizer, accumulate, batches if has_length else iter(batches))
    assert exchanged == [False, True, False, True, True]
    assert stepped == [1, 3, 4]
    assert moved(model) == [3.5, 3.0]


def test_a_length_spares_a_look_ahead(model):
    """With a length, no batch is fetched before the one that goes before it has been used."""
    optimizer, accumulate = make(model, steps=4)
    loader = Iterated(MICROS, 2)
    for index, micro in enumerate(accumulate(loader)):
        with micro:
            assert loader.fetched == index + 1
            micro.backward(model(torch.tensor(micro.batch[0])), weight=micro.batch[1])
    optimizer.step()
    assert moved(model) == [1.5, 1.5]


def test_a_loader_that_is_shorter_than_its_length_is_an_error(model):
    optimizer, accumulate = make(model, steps=4)
    with pytest.raises(gk.WindowError, match=r"ended after micro-batch 2 of 4.*shorter than its length"):
        run(model, optimizer, accumulate, Iterated(MICROS, 3))
    with pytest.raises(gk.WindowError, match=r"have not been exchanged between ranks.*drop\(\)"):
        accumulate.finish()
    accumulate.drop()
    assert run(model, optimizer, accumulate, Iterated(MICROS, 2)) == ([False, True], [1])
    assert moved(model) == [1.5, 1.5]


def test_a_window_whose_gradients_are_exchanged_may_be_finished(model):
    optimizer, accumulate = make(model)
    for micro in accumulate(MICROS):
        with micro:
            micro.backward(model(torch.tensor(micro.batch[0])), weight=micro.batch[1])
    accumulate.finish()
    optimizer.step()
    assert moved(model) == [1.5, 1.5]


def test_a_last_micro_batch_without_items_exchanges_all_the_same(model):
    """Other ranks wait for it; its own gradient is zero."""
    optimizer, accumulate = make(model, steps=3)
    heard = []
    exchanging(model).module.weight.register_post_accumulate_grad_hook(lambda weight: heard.append(1))
    exchanged, _ = run(model, optimizer, accumulate, [([8.0, 8.0], 0), MICROS[0], ([0.0, 0.0], 0)])
    assert exchanged == [False, False, True]
    assert len(heard) == 2  # the first micro-batch has no backward, as nobody waits for it
    assert moved(model) == [1.0, 4.0]


def test_what_needs_each_micro_batch_on_its_own_is_refused(model):
    with pytest.raises(ValueError, match=r"noise_scale=True.*needs one process"):
        make(model, noise_scale=True)
    optimizer, accumulate = make(model)
    micro = next(accumulate(MICROS))
    with micro:
        micro.backward(model(torch.tensor([1.0, 1.0])), weight=1)
    with pytest.raises(gk.CheckpointError, match="middle of a window"):
        accumulate.state_dict()
    accumulate.drop()
    assert accumulate.state_dict()["count"] == 0
    run(model, optimizer, accumulate, MICROS)
    assert moved(model) == [1.5, 1.5]


def test_a_float16_model_needs_no_other_rank_to_choose_its_divisor(model):
    model.half()
    optimizer, accumulate = make(model)
    for micro in accumulate([3072.0] * 2):
        with micro:
            micro.backward(model(torch.full((2,), micro.batch * 16, dtype=torch.float16)), weight=16)
    optimizer.step()
    assert moved(model) == [3072.0] * 2


def test_wide_sums_are_rounded_for_the_exchange_only(model):
    """256 + 1 + 1 = 258, but in bfloat16 256 + 1 = 256."""
    model.bfloat16()
    optimizer, accumulate = make(model, steps=4, accumulate_dtype=torch.float32)
    for micro in accumulate([256.0, 1.0, 1.0, 0.0]):
        with micro:
            micro.backward(model(torch.full((2,), micro.batch, dtype=torch.bfloat16)), weight=0.25)
    optimizer.step()
    assert moved(model) == [258.0] * 2


@pytest.mark.parametrize("closure", ["loss", "backward", "window"])
def test_an_optimizer_that_computes_gradients_in_its_step_is_told_what_to_do(closure):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.1), model=model)
    accumulate = gk.Accumulator(guard, steps=2)
    before = [p.detach().clone() for p in model.parameters()]

    def window():
        for micro in accumulate([torch.ones(1, 2)] * 2):
            with micro:
                loss = model(micro.batch).pow(2).sum()
                micro.backward(loss, weight=1)
        return loss

    def backward():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).pow(2).sum()
        loss.backward()
        return loss

    loss = None if closure == "window" else window()
    evaluated = {"loss": lambda: loss, "backward": backward, "window": window}[closure]
    with pytest.raises(gk.WindowError, match=r"LBFGS.step\(closure\): .*without an Accumulator"):
        optimizer.step(evaluated)
    assert all(map(torch.equal, before, model.parameters()))
