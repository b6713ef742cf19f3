"""What each rank contributes to norms, clips and reports, against one process that has all of the parameters."""

import math
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import gradkeel as gk
from gradkeel import policies as gp
from policy_rows import Run, gradients

from tests.distributed import layouts
from tests.distributed.test_agreement import WEIGHT, Window, outcome, quietly, sgd, sharded
from tests.distributed.test_layouts import local

# float64 sums of the same numbers in another order.
CLOSE = 1e-12


def told(report):
    """What a report says, selection by selection, in plain numbers."""
    return {
        one.label: {
            "norm": one.norm,
            "norms": one.norms,
            "coefficient": one.coefficient,
            "coefficients": one.coefficients,
            "clipped": one.clipped,
            "clipped_norm": one.clipped_norm,
            "sizes": one.measured.sizes,
            "groups": one.measured.groups,
        }
        for one in report.selections
    }


def assert_alike(mine, right):
    assert mine.keys() == right.keys()
    for label, wanted in right.items():
        for key, value in wanted.items():
            got = mine[label][key]
            if key == "clipped_norm" and got is None:
                continue  # values are clipped after the exchange, and are not measured again
            numbers = not isinstance(value, bool | tuple | None)
            assert got == (pytest.approx(value, rel=CLOSE) if numbers else value), (label, key)


# ---- several selections --------------------------------------------------------------------------------------------

POLICIES = [
    (gk.ClipByGlobalNorm(0.5), gp.AdaptiveGradientClip(0.01)),
    (gk.ClipByGlobalNorm(0.5, norm_type=math.inf), gk.ClipByNorm(0.4)),
    (gk.ClipByGlobalNorm(0.5, norm_type=1.0), gk.ClipByValue(0.4, min=-0.2)),
    (gp.AdaptiveGradientClip(0.1, unit_dim=1), gk.ClipByGlobalNorm(0.3, norm_type=math.inf)),
    (gk.ClipByValue(0.4, min=-0.2), gk.ClipByGlobalNorm(0.7, norm_type=1.0)),
    (None, gk.ClipByGlobalNorm(0.3)),
]
# The first is the main policy's, the second has its own clip; one parameter of the first is excluded.
SELECTED = (("linear", "bias"), ("conv", "table", "nothing"))


def selected(parameters, policy, **arguments):
    """A guard of two policies over those of the parameters that are here; the bias is excluded where it is."""
    main, other = policy
    groups = [{"params": [(n, parameters[n]) for n in group if n in parameters]} for group in SELECTED]
    groups[1]["clip"] = other
    optimizer = torch.optim.SGD(groups, lr=1e-30, foreach=False)
    return gk.attach(optimizer, main, exclude="bias" if "bias" in parameters else None, **arguments)


def alone(policy, scale):
    """One process: what its report says, and what it leaves of the gradients."""
    parameters = Run(None).parameters
    guard = selected(parameters, policy)
    for name, gradient in gradients(scale, seed=5).items():
        parameters[name].grad = gradient
    guard.optimizer.step()
    return told(guard.report), {name: parameter.grad for name, parameter in parameters.items()}


def spread(rank, count, make_layout):
    """For each pair of policies: this rank's report, that of one process, and the largest distance of gradients."""
    layout = make_layout(rank, count)
    found = []
    for policy in POLICIES:
        for scale in (1e-4, 3.0):
            right, left = alone(policy, scale)
            placed = {n: layout.place(n, p.detach()) for n, p in Run(None).parameters.items()}
            parameters = {name: nn.Parameter(piece) for name, piece in placed.items() if piece is not None}
            guard = selected(parameters, policy, **layout.arguments)
            whole = gradients(scale, seed=5)
            for name, parameter in parameters.items():
                parameter.grad = layout.gradient(name, whole[name])
            guard.optimizer.step()
            distances = [0.0]
            for name, parameter in parameters.items():
                mine, wanted = local(parameter.grad), local(layout.place(name, left[name]))
                if wanted.numel():
                    distances.append(float((mine - wanted).abs().max()) / scale)
            found.append((repr(policy), told(guard.report), right, max(distances)))
    return found


@pytest.mark.parametrize(
    ("count", "layout"),
    [
        (2, layouts.shards),
        (2, layouts.column_shards),
        (2, layouts.partial_gradients),
        (2, layouts.mixed_with_plain),
        (2, layouts.experts),
        (2, layouts.plain_columns),
        (2, layouts.stages),  # neither rank has parameters in each selection
        (2, layouts.everywhere),
        (4, layouts.hybrid),
        (4, layouts.sharded_stages),
    ],
)
def test_each_selection_is_that_of_one_process(ranks, count, layout):
    answers = ranks(count, spread, count, layout)
    for case in zip(*answers, strict=True):
        for policy, mine, right, distance in case:
            assert_alike(mine, right)
            assert distance < CLOSE, policy
        assert all(mine == case[0][1] for _, mine, _, _ in case)


# ---- copies count once ---------------------------------------------------------------------------------------------


def one_copy_missing(rank, count, make_layout, policy, lacking):
    """Two parameters, each with copies, of which the ``lacking`` ranks have no gradient of the first."""
    layout = make_layout(rank, count)
    parameters = {name: nn.Parameter(layout.place(name, WEIGHT)) for name in "ab"}
    guard = gk.attach(sgd(list(parameters.items())), policy, **layout.arguments)
    for name, factor in (("a", 1.0), ("b", 2.0)):
        parameters[name].grad = layout.gradient(name, WEIGHT * factor)
    if rank in lacking:
        parameters["a"].grad = None
    guard.optimizer.step()
    return guard.report.norm, guard.report.norms, guard.report.coefficient, guard.report.clipped


@pytest.mark.parametrize(
    ("count", "layout", "lacking"),
    [
        (2, layouts.everywhere, [0]),
        (2, layouts.everywhere, [1]),
        # Rank 0 and rank 2 have the same shard.
        (4, layouts.hybrid, [0]),
        (4, layouts.hybrid, [2, 3]),
    ],
)
@pytest.mark.parametrize(
    "policy",
    [gk.ClipByGlobalNorm(1.0), gk.ClipByGlobalNorm(1.0, norm_type=math.inf), gp.AdaptiveGradientClip(0.01)],
)
def test_a_copy_without_a_gradient_takes_nothing_away(ranks, count, layout, lacking, policy):
    wanted, _ = one_process({"a": WEIGHT, "b": WEIGHT * 2.0}, policy)
    for norm, norms, coefficient, clipped in ranks(count, one_copy_missing, count, layout, policy, lacking):
        assert norm == pytest.approx(wanted.norm, rel=CLOSE)
        assert norms == pytest.approx(wanted.norms, rel=CLOSE)
        assert coefficient == pytest.approx(wanted.coefficient, rel=CLOSE)
        assert clipped


def one_process(wholes, policy):
    """What one process tells, and leaves of the gradients, whose parameters all have the weight ``WEIGHT``."""
    parameters = {name: nn.Parameter(WEIGHT.clone()) for name in wholes}
    guard = gk.attach(sgd(list(parameters.items())), policy)
    for name, whole in wholes.items():
        parameters[name].grad = whole.clone()
    guard.optimizer.step()
    return guard.report, {name: parameter.grad for name, parameter in parameters.items()}


def tied(rank, policy, head, where):
    """An embedding on the first stage, the last stage's ``head`` that shares its weight, and a layer on each."""
    factors = {"embed": 1.0, "first": 2.0} if rank == 0 else {"second": 3.0, head: 1.0}
    parameters = {name: nn.Parameter(WEIGHT.clone()) for name in factors}
    shard_over = {"*": distributed.group.WORLD, head: where}
    guard = gk.attach(sgd(list(parameters.items())), policy, shard_over=shard_over)
    for name, factor in factors.items():
        parameters[name].grad = WEIGHT * factor
    guard.optimizer.step()
    return guard.report.norm, guard.report.norms, {n: p.grad.tolist() for n, p in parameters.items()}


@pytest.mark.parametrize(("head", "where"), [("head", "embed"), ("embed", None)])
@pytest.mark.parametrize(
    "policy",
    [gk.ClipByGlobalNorm(1.0), gk.ClipByGlobalNorm(1.0, norm_type=1.0), gp.AdaptiveGradientClip(0.01)],
)
def test_a_weight_tied_across_stages_counts_once(ranks, policy, head, where):
    wholes = {"embed": WEIGHT, "first": WEIGHT * 2.0, "second": WEIGHT * 3.0}
    wanted, left = one_process(wholes, policy)
    (*one, first), (*other, last) = ranks(2, tied, policy, head, where)
    for norm, norms in (one, other):
        assert norm == pytest.approx(wanted.norm, rel=CLOSE)
        assert norms == pytest.approx(wanted.norms, rel=CLOSE)
    last["embed"] = last.pop(head)
    for name, gradient in (*first.items(), *last.items()):
        assert torch.allclose(torch.tensor(gradient, dtype=torch.float64), left[name], rtol=CLOSE, atol=0.0)


def plain_and_sharded(rank, excess, steps):
    """A plain parameter beside a sharded one, whose gradient on rank 1 is larger; what is said of it, step by step."""
    parameters = {"sharded": nn.Parameter(sharded(WEIGHT)), "plain": nn.Parameter(WEIGHT.clone())}
    guard = gk.attach(sgd(list(parameters.items())), gk.ClipByGlobalNorm(1.0))
    counts = []
    for _ in range(steps):
        parameters["sharded"].grad = sharded(WEIGHT)
        parameters["plain"].grad = WEIGHT * (1.0 + excess * rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            guard.optimizer.step()
        counts.append(len(caught))
    return counts


@pytest.mark.parametrize(("excess", "is_told"), [(0.01, True), (1e-5, False)])
def test_copies_that_differ_by_more_than_rounding_are_told_once(ranks, excess, is_told):
    assert ranks(2, plain_and_sharded, excess, 3) == [[int(is_told), 0, 0]] * 2


def values_of_copies(rank):
    layout = layouts.everywhere(rank, 2)
    parameter = nn.Parameter(WEIGHT.clone())
    guard = gk.attach(sgd([("w", parameter)]), gk.ClipByValue(1.0), **layout.arguments)
    parameter.grad = WEIGHT.clone()
    guard.optimizer.step()
    return guard.is_sharded, guard.report.clipped, guard.report.clipped_norm


def test_copies_are_not_split_so_what_is_left_of_them_is_known(ranks):
    assert ranks(2, values_of_copies) == [(False, True, pytest.approx(math.sqrt(3.0), rel=CLOSE))] * 2


# ---- what the report says ------------------------------------------------------------------------------------------


def nowhere(rank, make_layout):
    layout = make_layout(rank, 2)
    parameters = {name: nn.Parameter(layout.place(name, WEIGHT)) for name in "abc"}
    guard = gk.attach(sgd(list(parameters.items())), gk.ClipByNorm(1.0), **layout.arguments)
    parameters["b"].grad = layout.gradient("b", WEIGHT * 0.0)
    parameters["c"].grad = layout.gradient("c", WEIGHT)
    guard.optimizer.step()
    return guard.report.norms, guard.report.stepped


@pytest.mark.parametrize("layout", [layouts.shards, layouts.experts, layouts.everywhere])
def test_a_parameter_without_a_gradient_on_any_rank_is_not_listed(ranks, layout):
    for norms, stepped in ranks(2, nowhere, layout):
        assert norms == {"b": 0.0, "c": pytest.approx(13.0, rel=CLOSE)}
        assert stepped


def two_bad(rank, where):
    """Parameters of several selections and stages; ``where`` tells which of them are bad on which rank."""
    parameters = [nn.Parameter(sharded(WEIGHT)) for _ in range(4)]
    names = ["good", "main", "excluded", "own"]
    groups = [
        {"params": list(zip(names[:3], parameters[:3], strict=True))},
        {"params": [("own", parameters[3])], "clip": gk.ClipByNorm(1.0)},
    ]
    guard = gk.attach(sgd(groups), gk.ClipByGlobalNorm(1.0), exclude="excluded")
    for name, parameter in zip(names, parameters, strict=True):
        parameter.grad = sharded(WEIGHT)
        if rank in where.get(name, ()):
            parameter.grad.to_local()[0, 1] = math.inf
    quietly(guard.optimizer.step)
    return guard.report.reason


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"main": [1]}, "'main' is not finite (inf) on rank 1"),
        ({"main": [0, 1]}, "'main' is not finite (inf) on rank 0"),
        ({"own": [1]}, "'own' is not finite (inf) on rank 1"),
        ({"excluded": [0]}, "'excluded' is not finite (inf) on rank 0"),
        ({"good": [1], "main": [0]}, "'main' is not finite (inf) on rank 0"),
        ({"main": [1], "own": [0], "excluded": [0]}, "'own' is not finite (inf) on rank 0"),
        (
            {"good": [0], "main": [0], "own": [0], "excluded": [0]},
            "all 4 gradients are not finite (inf) on rank 0: it",
        ),
        ({"own": [1], "excluded": [0]}, "'own' is not finite (inf) on rank 1"),
    ],
)
def test_where_it_begins_and_the_first_rank_that_has_it_are_named(ranks, where, words):
    for reason in ranks(2, two_bad, where):
        assert words in reason


def bad_stage(rank, bad):
    """Each stage has a parameter of its own; one rank's is bad."""
    parameter = nn.Parameter(WEIGHT.clone())
    where = {"*": distributed.group.WORLD}
    guard = gk.attach(sgd([(f"stage{rank}", parameter)]), gk.ClipByGlobalNorm(1.0), shard_over=where)
    parameter.grad = WEIGHT * (math.nan if rank == bad else 1.0)
    quietly(guard.optimizer.step)
    return guard.report.reason, torch.equal(parameter.detach(), WEIGHT)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_parameter_that_only_one_stage_has_is_named_on_all(ranks, bad):
    words = f"step 1: the gradient of 'stage{bad}' is not finite (NaN) on rank {bad}"
    assert ranks(2, bad_stage, bad) == [(words, True)] * 2


def kept(rank):
    parameter = nn.Parameter(sharded(WEIGHT))
    guard = gk.attach(sgd([("w", parameter)]), None, nonfinite="keep")
    parameter.grad = sharded(WEIGHT)
    if rank == 1:
        parameter.grad.to_local()[0, 0] = math.inf
    guard.optimizer.step()
    return guard.report.stepped, guard.report.norm


def test_a_bad_step_that_is_kept_is_made_on_all(ranks):
    assert ranks(2, kept) == [(True, math.inf)] * 2


# ---- groups that are not the whole job -----------------------------------------------------------------------------


def halves(rank, kind):
    """Ranks 0 and 1 decide together, and so do ranks 2 and 3; the last of all is the bad one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "inner"))
    group = mesh["inner"] if kind == "mesh" else mesh["inner"].get_group()
    found = {}

    def attached(policy=None, value=1.0, exclude=None):
        parameter = nn.Parameter(WEIGHT.clone())
        guard = gk.attach(sgd([("w", parameter)]), policy, process_group=group, exclude=exclude)
        parameter.grad = WEIGHT * value
        return guard

    guard = attached(value=math.nan if rank == 3 else 1.0)
    guard.log(loss=float(rank))
    quietly(guard.optimizer.step)
    found["bad"] = guard.report.stepped, guard.report.reason, float(guard.report.scalars["loss"])

    found["policy"] = outcome(lambda: bool(attached(gk.ClipByNorm(2.0 if rank == 3 else 1.0))))

    guard = attached(value=2.0 if rank == 3 else 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guard.optimizer.step()
    found["copies"] = [str(warning.message) for warning in caught]

    found["attach"] = outcome(lambda: bool(attached(exclude="nonsense" if rank == 3 else None)))

    guard = attached()
    guard.window = Window(is_bad=rank == 3)
    found["step"] = outcome(guard.optimizer.step)
    return found


@pytest.mark.parametrize("kind", ["group", "mesh"])
def test_ranks_are_named_by_their_numbers_in_the_whole_job(ranks, kind):
    answers = ranks(4, halves, kind)
    for answer in answers[:2]:
        assert answer["bad"] == (True, None, 0.5)
        assert answer["policy"] is True
        assert answer["copies"] == []
        assert (answer["attach"], answer["step"]) == (True, None)
    for answer in answers[2:]:
        assert answer["bad"] == (
            False,
            "step 1: the gradient of 'w' is not finite (NaN) on rank 3",
            2.5,
        )
        kind_of_error, words = answer["policy"]
        assert kind_of_error == "RankError"
        assert words.startswith("rank 2 has the selections and policies")
        assert "rank 3 has" in words
        assert "ClipByNorm(max_norm=1.0)" in words
        assert "ClipByNorm(max_norm=2.0)" in words
        (warned,) = answer["copies"]
        assert warned.startswith("ranks 2 and 3 have copies of 'w', but gradients of the norms 13 and 26")
    third, fourth = answers[2:]
    assert third["attach"][1].startswith("rank 3 could not set its guard up")
    assert fourth["attach"][0] == "SelectionError"
    assert third["step"][1].startswith("rank 3 raised an error before this step")
    assert fourth["step"] == ("WindowError", "not now")


def whole_mesh(rank):
    """A mesh of two axes over all ranks."""
    mesh = init_device_mesh("cpu", (2, 2))
    parameter = nn.Parameter(WEIGHT.clone())
    guard = gk.attach(sgd([(f"w{rank}", parameter)]), None, process_group=mesh)
    parameter.grad = WEIGHT.clone()
    guard.optimizer.step()
    return guard.report.norm, sorted(guard.report.norms)


def test_a_mesh_of_several_axes_is_all_of_its_ranks(ranks):
    assert ranks(4, whole_mesh) == [(pytest.approx(26.0, rel=CLOSE), ["w0", "w1", "w2", "w3"])] * 4


def partly_on_a_mesh(rank, policy):
    """A parameter on all three ranks, and one on the last two only, which the first knows but holds nothing of."""
    whole = torch.cat([WEIGHT, WEIGHT * 2.0, WEIGHT * 3.0])
    everyone, last = init_device_mesh("cpu", (3,)), DeviceMesh("cpu", [1, 2])
    pieces = {"all": distribute_tensor(whole.clone(), everyone, [Shard(0)])}
    held = WEIGHT[[rank - 1]].clone() if rank else WEIGHT[:0].clone()
    pieces["some"] = DTensor.from_local(
        held, last, [Shard(0)], run_check=False, shape=WEIGHT.shape, stride=WEIGHT.stride()
    )
    parameters = {name: nn.Parameter(piece) for name, piece in pieces.items()}
    guard = gk.attach(sgd(list(parameters.items())), policy)
    parameters["all"].grad = pieces["all"].clone()
    if rank:
        parameters["some"].grad = pieces["some"].clone()
    guard.optimizer.step()
    return guard.report.norm, guard.report.norms, guard.report.coefficient


@pytest.mark.parametrize("policy", [gk.ClipByGlobalNorm(1.0), gk.ClipByGlobalNorm(1.0, norm_type=1.0)])
def test_a_rank_outside_of_a_parameters_mesh_takes_part(ranks, policy):
    whole = torch.cat([WEIGHT, WEIGHT * 2.0, WEIGHT * 3.0])
    p = policy.norm_type
    norms = {"all": float(whole.flatten().norm(p)), "some": float(WEIGHT.flatten().norm(p))}
    total = float(torch.tensor(list(norms.values()), dtype=torch.float64).norm(p))
    for norm, mine, coefficient in ranks(3, partly_on_a_mesh, policy):
        assert norm == pytest.approx(total, rel=CLOSE)
        assert mine == pytest.approx(norms, rel=CLOSE)
        assert coefficient == pytest.approx(1.0 / total, rel=CLOSE)
