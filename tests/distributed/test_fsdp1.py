"""FSDP1 (`FullyShardedDataParallel`), whose plain parameters hold flat shards, against float64 in one process."""

import math
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import gradkeel as gk

from tests.distributed.test_agreement import outcome, quietly
from tests.distributed.test_windows import data, loss_sum
from tests.distributed.test_windows import oracle as oracle_of_windows

CPU = torch.device("cpu")
BOUND = 0.05


def make_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def wrap(model, strategy=ShardingStrategy.FULL_SHARD, use_orig_params=True, **options):
    """The last layer by itself, and the rest around it."""
    options |= {"sharding_strategy": strategy, "use_orig_params": use_orig_params, "device_id": CPU}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecation, CPUs, and NO_SHARD
        model[2] = FullyShardedDataParallel(model[2], **options)
        return FullyShardedDataParallel(model, **options)


def inputs(rank):
    return torch.arange(6, dtype=torch.float64).reshape(2, 3) * (0.1 + rank)


def loss_of(model, rank):
    return (model(inputs(rank)) - 1.0).square().mean()


def oracle(count, policy):
    """The mean over the ranks' batches, of one process: the norm, and the weights after two clipped steps."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gk.attach(optimizer, policy, model=model)
    for _ in range(2):
        optimizer.zero_grad()
        (sum(loss_of(model, rank) for rank in range(count)) / count).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).tolist(), optimizer


def weights(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FullyShardedDataParallel.summon_full_params(model):
            return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def train(rank, strategy, policy, use_orig_params):
    count, options = distributed.get_world_size(), {}
    if strategy is ShardingStrategy.HYBRID_SHARD:
        options["device_mesh"] = init_device_mesh(
            "cpu", (2, count // 2), mesh_dim_names=("replicate", "shard")
        )
    model = wrap(make_model(), strategy, use_orig_params, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, policy, model=model)
    coefficients = []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, rank).backward()
        optimizer.step()
        coefficients.append((guard.report.norm, guard.report.coefficient))
    return coefficients, weights(model)


STRATEGIES = [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD]


def check(answers, count, policy):
    wanted, optimizer = oracle(count, policy)
    report = optimizer._gradkeel_guard.report
    for told, after in answers:
        assert told == answers[0][0]
        assert told[-1] == (
            pytest.approx(report.norm, rel=1e-12),
            pytest.approx(report.coefficient, rel=1e-12),
        )
        assert after == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_fsdp1(ranks, strategy, use_orig_params):
    policy = gk.ClipByGlobalNorm(BOUND)
    check(ranks(2, train, strategy, policy, use_orig_params), 2, policy)


def test_fsdp1_tensor_by_tensor(ranks):
    policy = gk.ClipByNorm(0.2)
    wanted, _ = oracle(2, policy)
    for _, after in ranks(2, train, ShardingStrategy.FULL_SHARD, policy, True):
        assert after == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_fsdp1_in_replicas_of_shards(ranks):
    policy = gk.ClipByGlobalNorm(BOUND)
    check(ranks(4, train, ShardingStrategy.HYBRID_SHARD, policy, True), 4, policy)


def its_own_clip(rank):
    """FSDP1's clip knows float32 only."""
    model = wrap(make_model().float())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), model=model)
    model(inputs(rank).float()).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = float(model.clip_grad_norm_(BOUND))
    for gradient, parameter in zip(
        gradients, (p for p in model.parameters() if p.grad is not None), strict=True
    ):
        parameter.grad.copy_(gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.errors.DoubleClippingWarning)
        optimizer.step()
    return norm, guard.report.norm


def test_fsdp1_measures_what_its_own_clip_measures(ranks):
    for theirs, ours in ranks(2, its_own_clip):
        assert ours == pytest.approx(theirs, rel=1e-5)  # they sum in float32


def one_bad_shard(rank):
    model = wrap(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), model=model)
    before = weights(model)
    loss_of(model, rank).backward()
    if rank == 1:
        next(p.grad for p in model.parameters() if p.grad is not None)[0] = math.nan
    quietly(optimizer.step)
    return guard.report.stepped, guard.report.reason, weights(model) == before


def test_a_bad_shard_of_fsdp1_stops_all_ranks(ranks):
    for stepped, reason, is_unchanged in ranks(2, one_bad_shard):
        assert not stepped
        assert reason == "step 1: the gradient of '0.weight' is not finite (NaN) on rank 1"
        assert is_unchanged


def refused(rank, kind):
    plain = make_model()
    if kind == "wrapped later":
        optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
        guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), model=plain)
        model = wrap(plain)
        loss_of(model, rank).backward()
        return outcome(guard.optimizer.step)
    model = wrap(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    policy = gk.AdaptiveGradientClip() if kind == "units" else gk.ClipByGlobalNorm(BOUND)
    return outcome(lambda: gk.attach(optimizer, policy, model=model if kind == "units" else None))


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("no model", "AttachError", "attach(optimizer, policy, model=fsdp_model)"),
        ("wrapped later", "AttachError", "after the model has been wrapped"),
        ("units", "SelectionError", "use a policy of whole tensors, or FSDP2"),
    ],
)
def test_what_fsdp1_does_not_tell_is_refused(ranks, kind, error, words):
    for name, told in ranks(2, refused, kind):
        assert name == error
        assert words in told


# ---- accumulation --------------------------------------------------------------------------------------------------


def accumulated(rank, strategy, is_dropped):
    count, options = distributed.get_world_size(), {}
    if strategy is ShardingStrategy.HYBRID_SHARD:
        options["device_mesh"] = init_device_mesh(
            "cpu", (2, count // 2), mesh_dim_names=("replicate", "shard")
        )
    model = wrap(make_model(), strategy, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(BOUND), model=model)
    accumulate = gk.Accumulator(guard, 2, model=model)
    if is_dropped:
        with next(accumulate(data([7, 1], seed=9))) as micro:
            micro.backward(loss_sum(model, micro.batch), weight=7)
        accumulate.drop()
    windows = []
    for micro in accumulate(data(COUNTS[rank], seed=rank)):
        with micro:
            micro.backward(loss_sum(model, micro.batch), weight=len(micro.batch[0]))
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
            windows.append((guard.report.norm, guard.report.stepped, float(accumulate.loss)))
    return weights(model), windows


COUNTS = ([10, 1, 4, 3], [3, 50, 7, 1], [2, 2, 2, 2], [1, 8, 1, 8])


@pytest.mark.parametrize("is_dropped", [False, True])
@pytest.mark.parametrize(
    "strategy", [*STRATEGIES, ShardingStrategy.HYBRID_SHARD], ids=lambda strategy: strategy.name
)
def test_partition_invariance_under_fsdp1(ranks, strategy, is_dropped):
    count = 4 if strategy is ShardingStrategy.HYBRID_SHARD else 2
    wanted, told = oracle_of_windows(COUNTS[:count], 2)
    for after, windows in ranks(count, accumulated, strategy, is_dropped):
        assert after == pytest.approx([entry for one in wanted for entry in one], rel=1e-9, abs=1e-12)
        assert windows == [tuple(pytest.approx(number, rel=1e-9) for number in one) for one in told]


def refused_accumulator(rank, options):
    model = wrap(make_model())
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=1.0), None, model=model)
    return outcome(lambda: gk.Accumulator(guard, 2, model=model, **options))


@pytest.mark.parametrize(
    "options", [{"per": ("token", "sequence")}, {"accumulate_dtype": torch.float64}], ids=["per", "dtype"]
)
def test_what_fsdp1_keeps_together_is_refused(ranks, options):
    for name, words in ranks(2, refused_accumulator, options):
        assert name == "ValueError"
        assert "FullyShardedDataParallel (FSDP1)" in words
        assert "use FSDP2 (fully_shard)" in words
