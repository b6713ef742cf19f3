"""torch's four functions, and the table of gradients, on distributed parameters."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import gradkeel as gk
import reference
from policy_rows import GROUPS, Run, gradients

from tests.distributed import layouts
from tests.distributed.test_layouts import local
from tests.distributed.test_windows import fsdp, loss_sum, make_model, tensor_parallel

MADE_OF_DTENSORS = [
    (2, layouts.shards),
    (2, layouts.column_shards),
    (2, layouts.replicas),
    (2, layouts.partial_gradients),
    (2, layouts.mixed_with_plain),
    (4, layouts.hybrid),
    (4, layouts.two_meshes),
    (4, layouts.both_dims),
    (4, layouts.same_dim_twice),
]


def placed(layout, missing=()):
    parameters = {}
    whole = gradients(1.0, seed=3)
    for name in (name for group in GROUPS for name in group):
        parameters[name] = nn.Parameter(layout.place(name, Run(None).parameters[name].detach()))
        parameters[name].grad = layout.gradient(name, whole[name].clone())
        if name in missing:
            parameters[name].grad = None
    return parameters, {name: g for name, g in whole.items() if name not in missing}


def clipped(rank, count, make_layout, norm_type):
    layout = make_layout(rank, count)
    parameters, whole = placed(layout)
    own = [parameter.grad for parameter in parameters.values()]
    with CommDebugMode() as mode:
        gk.get_total_norm(own, norm_type)
    messages = mode.get_total_counts()
    before = gk.get_total_norm(own, norm_type)
    told = gk.clip_grad_norm_(parameters.values(), 0.5, norm_type)
    right = torch.linalg.vector_norm(torch.cat([g.flatten() for g in whole.values()]), norm_type)
    errors = [0.0]
    for name, parameter in parameters.items():
        wanted = local(layout.place(name, whole[name] * min(1.0, 0.5 / (float(right) + 1e-6))))
        if wanted.numel():
            errors.append(float((local(parameter.grad) - wanted).abs().max()))
    return float(before), float(told), float(right), max(errors), messages


@pytest.mark.parametrize("norm_type", [0.0, 1.0, 2.0, 3.0, math.inf, -1.0, -math.inf])
@pytest.mark.parametrize(("count", "layout"), MADE_OF_DTENSORS)
def test_norms_and_clips(ranks, count, layout, norm_type):
    answers = ranks(count, clipped, count, layout, norm_type)
    for before, told, right, error, messages in answers:
        assert before == told == pytest.approx(right, rel=1e-12)
        assert error < 1e-12
        assert messages <= (
            6 if layout is layouts.partial_gradients else 1
        )  # partial gradients are reduced one by one
    assert len({told for _, told, _, _, _ in answers}) == 1


def missing_on_one(rank):
    layout = layouts.shards(rank, 2)
    parameters, _ = placed(
        layout, missing=() if rank == 0 else ("linear", "bias", "conv", "table", "nothing")
    )
    own = [local(p.grad).flatten() for p in parameters.values() if p.grad is not None]
    right = float(torch.cat(own).norm()) if own else None
    return float(gk.clip_grad_norm_(parameters.values(), 0.5)), right


def test_missing_gradients(ranks):
    (told, own), (other, nothing) = ranks(2, missing_on_one)
    assert told == other == pytest.approx(own, rel=1e-12)
    assert nothing is None


def far_apart(rank, dtype, exponents, norm_type):
    """Rows of very different size, one on each rank and a third beside the first."""
    whole = torch.tensor([[3.0, 4.0], [2.0, -1.0], [1.0, 1.0], [5.0, 0.0]], dtype=torch.float64)
    whole = (whole * torch.tensor(exponents, dtype=torch.float64).reshape(-1, 1)).to(dtype)
    layout = layouts.shards(rank, 2)
    gradients_here = layout.place("w", whole)
    norm = gk.get_total_norm(gradients_here, norm_type)
    parameter = nn.Parameter(layout.place("w", torch.ones_like(whole)))
    parameter.grad = gradients_here
    guard = gk.attach(
        torch.optim.SGD([parameter], lr=0.0, foreach=False), gk.ClipByGlobalNorm(1e300, norm_type=norm_type)
    )
    guard.optimizer.step()
    return float(norm), guard.report.norm, reference.norm([whole], norm_type), guard.report.stepped


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, 7.0, 50.0])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float64, (1e200, 1e-200, 1e-310, 1e199)),
        (torch.float64, (1e-200, 1e-201, 1e-202, 1e-199)),
        (torch.float64, (1e307, 1.0, 1e-5, 1e305)),
        (torch.float32, (1e37, 1e-40, 1e-3, 1e36)),
        (torch.float32, (1e-44, 1e-45, 1e-43, 1e-42)),
    ],
)
def test_norms_of_any_size_add_up(ranks, dtype, exponents, norm_type):
    for told, guarded, right, stepped in ranks(2, far_apart, dtype, exponents, norm_type):
        # Powers and roots of float64 numbers, each off by a few units in the last place times the order of the norm;
        # what the function tells of float32 gradients is rounded to float32.
        assert guarded == pytest.approx(right, rel=1e-12, abs=0.0)
        assert told == pytest.approx(right, rel=1e-12 if dtype == torch.float64 else 1e-6, abs=1e-45)
        assert stepped


def values(rank, make_layout):
    layout = make_layout(rank, 2)
    parameters, whole = placed(layout)
    gk.clip_grad_value_(parameters.values(), 0.3)
    return all(
        torch.equal(local(p.grad), local(layout.place(name, whole[name].clamp(-0.3, 0.3))))
        for name, p in parameters.items()
    )


@pytest.mark.parametrize("layout", [layouts.shards, layouts.partial_gradients])
def test_values(ranks, layout):
    # Addends that are reduced are rounded once, so only shards are bit-equal.
    assert all(ranks(2, values, layout)) or layout is layouts.partial_gradients


def table(rank):
    model = nn.Linear(3, 5).double()
    weight = model.weight.detach().clone()
    fully_shard(model)
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    row = gk.gradients(model)["weight"]
    return row.shape, row.weight_norm, float(weight.norm()), row.gradient_norm


def test_table(ranks):
    for shape, weight_norm, right, gradient_norm in ranks(2, table):
        assert shape == (5, 3)
        assert weight_norm == pytest.approx(right, rel=1e-12)
        assert gradient_norm == pytest.approx(2.0 * math.sqrt(15), rel=1e-12)


# ---- models as torch shards them -----------------------------------------------------------------------------------


def tensor_and_data_parallel(model, rank, count):
    """Rows cut by tensor parallelism and cut again by fully_shard, in uneven parts."""
    mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


def offloaded(model, rank, count):
    return fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def model_of(rows):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, rows), nn.Tanh()).double()


def units(rank, count, wrap, rows):
    """Row by row: AGC on a sharded model against the whole one."""
    found = []
    inputs = torch.arange(12.0, dtype=torch.float64).reshape(4, 3) / 10
    for model in (wrap(model_of(rows), rank, count), model_of(rows)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        guard = gk.attach(optimizer, gk.policies.AdaptiveGradientClip(0.05), model=model)
        for _ in range(2):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        measured = guard.report.selections[0].measured
        weights = [
            p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()
        ]
        found.append((measured.units.tolist(), [w.flatten().tolist() for w in weights], guard.report.clipped))
    return found


@pytest.mark.parametrize("rows", [3, 5, 8])  # torch cannot cut one row twice
@pytest.mark.parametrize(
    ("count", "wrap"), [(2, fsdp), (2, offloaded), (4, fsdp), (4, tensor_and_data_parallel)]
)
def test_units_of_real_shards(ranks, count, wrap, rows):
    for (mine, weights, was_clipped), (wanted, whole_weights, must_clip) in ranks(
        count, units, count, wrap, rows
    ):
        assert mine == pytest.approx(wanted, rel=1e-9)
        for one, other in zip(weights, whole_weights, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        assert was_clipped == must_clip is True


def optimizers(rank, name):
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
        "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "adam-loop": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }
    found = []
    torch.manual_seed(2)
    batches = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(4)]
    for model in (fsdp(make_model(torch.float32), rank, 2), make_model(torch.float32)):
        optimizer = kinds[name](model.parameters())
        guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.1), model=model)
        told = []
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            loss = loss_sum(model, batch) * (math.inf if step == 2 else 1.0)
            loss.backward()
            with pytest.warns(gk.SkippedStepWarning) if step == 2 else torch.enable_grad():
                optimizer.step()
            told.append((guard.report.stepped, guard.report.clipped))
        weights = [
            p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()
        ]
        found.append((told, [w.flatten().tolist() for w in weights]))
    return found


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "adam-loop", "sgd-momentum"])
def test_training_equals_one_process(ranks, name):
    for (told, weights), (right_told, right) in ranks(2, optimizers, name):
        assert told == right_told
        assert [stepped for stepped, _ in told] == [True, True, False, True]
        for one, other in zip(weights, right, strict=True):
            # float32 sums in another order, through Adam's division by small second moments.
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def tensor_parallel_alone(rank):
    found = []
    inputs = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    for model in (tensor_parallel(make_model(), rank, 2), make_model()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        guard = gk.attach(optimizer, gk.ClipByNorm(0.05), model=model)
        model(inputs).square().sum().backward()
        optimizer.step()
        found.append(sorted(guard.report.norms.values()))
    return found


def test_tensor_parallel(ranks):
    for mine, wanted in ranks(2, tensor_parallel_alone):
        assert mine == pytest.approx(wanted, rel=1e-9)


# ---- as torch's own tests of FSDP2 ask ------------------------------------------------------------------------------


def beside_torchs(rank, count, wrap, norm_type):
    """What code that was written for torch's clip under FSDP2 gets from the drop-ins."""
    made = []
    for clip, total, halve in (
        (nn.utils.clip_grad_norm_, nn.utils.get_total_norm, nn.utils.clip_grads_with_norm_),
        (gk.clip_grad_norm_, gk.get_total_norm, gk.clip_grads_with_norm_),
    ):
        model = wrap(model_of(8), rank, count)
        parameters = list(model.parameters())
        found = []
        for in_halves in (False, True):
            model.zero_grad()
            (10.0 * model(torch.arange(12.0, dtype=torch.float64).reshape(4, 3)).square().sum()).backward()
            before = [p.grad.to_local().clone() for p in parameters]
            if in_halves:
                # torch's own total, which is Partial, must do for both.
                norm = nn.utils.get_total_norm([p.grad for p in parameters], norm_type)
                halve(parameters, 0.5, norm)
                norm = total([p.grad for p in parameters], norm_type)
            else:
                norm = clip(parameters, 0.5, norm_type, foreach=True)
            changed = [
                not torch.equal(p.grad.to_local(), one) or not one.any()
                for p, one in zip(parameters, before, strict=True)
            ]
            found.append(
                (float(norm.full_tensor()), tuple(norm.device_mesh.shape), len(norm.placements), changed)
            )
        made.append((found, [local(p.grad).flatten().tolist() for p in parameters]))
    return made


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize(("count", "wrap"), [(2, fsdp), (2, offloaded)])
def test_beside_torchs_clip(ranks, count, wrap, norm_type):
    for (wanted, right), (got, gradients_here) in ranks(count, beside_torchs, count, wrap, norm_type):
        for (norm, *rest), (true, *expected) in zip(got, wanted, strict=True):
            assert norm == pytest.approx(true, rel=1e-9)
            assert rest == expected
            assert all(rest[-1])
        for one, other in zip(gradients_here, right, strict=True):
            assert one == pytest.approx(other, rel=1e-9)


def mixed_norms(rank, make_layout):
    """The norms of DTensors beside others: what is no DTensor in torch, which refuses, is none here."""
    parameters, _ = placed(make_layout(rank, 4 if make_layout is layouts.two_meshes else 2))
    norm = gk.clip_grad_norm_(parameters.values(), 0.5)
    return type(norm).__name__, float(norm)


@pytest.mark.parametrize(("count", "layout"), [(2, layouts.mixed_with_plain), (4, layouts.two_meshes)])
def test_a_norm_on_no_one_mesh_is_plain(ranks, count, layout):
    assert {name for name, _ in ranks(count, mixed_norms, layout)} == {"Tensor"}


def norm_of_nothing(rank):
    layout = layouts.replicas(rank, 2)
    parameters, _ = placed(layout, missing=gradients(1.0, seed=3))
    norm = gk.clip_grad_norm_(parameters.values(), 0.5)
    return type(norm).__name__, norm.dtype, float(norm.full_tensor())


def test_the_norm_of_copies_without_gradients_is_what_it_is_with_them(ranks):
    assert set(ranks(2, norm_of_nothing)) == {("DTensor", torch.float64, 0.0)}


def addends(rank):
    """A parameter that is itself a sum over ranks, beside a plain one."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Partial()]))
    parameter.grad = DTensor.from_local(torch.tensor([3.0 * rank, 4.0 - 4.0 * rank]), mesh, [Partial()])
    beside = nn.Parameter(torch.zeros(1))
    beside.grad = torch.tensor([12.0])
    norm = gk.clip_grad_norm_([parameter, beside], 1.3)
    return float(norm), parameter.grad.full_tensor().tolist() + beside.grad.tolist()


def test_a_parameter_that_is_partial_counts_by_its_sum(ranks):
    for norm, clipped_to in ranks(2, addends):
        assert norm == pytest.approx(13.0)
        assert clipped_to == pytest.approx([0.3, 0.4, 1.2], rel=1e-5)
