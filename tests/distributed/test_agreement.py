"""What ranks must decide together, and that none waits for another in vain."""

import contextlib
import math
import warnings

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import gradkeel as gk
from gradkeel import policies as gp

from tests.distributed import layouts
from tests.distributed.layouts import shards

WEIGHT = torch.tensor([[3.0, 4.0], [0.0, 12.0]], dtype=torch.float64)  # norm 13


def sharded(whole):
    # A copy, for the first rank's shard may share the memory of what it is cut from.
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return distribute_tensor(whole.clone(), mesh, [Shard(0)])


def sgd(parameters, **groups):
    return torch.optim.SGD(parameters, lr=1.0, foreach=False, **groups)


def outcome(act):
    """The name and words of the exception that ``act`` raises, or those of what it returns."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001  # the tests look at which it is
        return type(error).__name__, str(error)


def quietly(act):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.errors.SkippedStepWarning)
        return act()


# ---- non-finite gradients ------------------------------------------------------------------------------------------


def bad_rows(rank, value, row, nonfinite):
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    optimizer = torch.optim.AdamW([("w", parameter)], lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), nonfinite=nonfinite)
    gradient = WEIGHT.clone()
    gradient[row, 0] = value
    parameter.grad = sharded(gradient)
    first = outcome(lambda: quietly(optimizer.step))
    is_same = torch.equal(parameter.detach().full_tensor(), WEIGHT)
    optimizer.zero_grad()
    words = guard.report.reason
    parameter.grad = sharded(WEIGHT)
    optimizer.step()
    return first, is_same, words, guard.report.stepped, guard.report.norm


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (-math.inf, "inf")])
@pytest.mark.parametrize("count", [2, 4])  # of four ranks two have no row
def test_rank_agreement(ranks, count, value, kind, row):
    for first, is_same, words, stepped, norm in ranks(count, bad_rows, value, row, "skip"):
        assert first is None
        assert is_same
        assert words == f"step 1: the gradient of 'w' is not finite ({kind}) on rank {row}"
        assert (stepped, norm) == (True, pytest.approx(13.0))


@pytest.mark.parametrize("count", [2, 4])
def test_raising_raises_on_every_rank_and_names_the_one(ranks, count):
    for (kind, words), is_same, _, stepped, _ in ranks(count, bad_rows, math.nan, 1, "raise"):
        assert kind == "NonFiniteGradientError"
        assert words.startswith("step 1: the gradient of 'w' is not finite (NaN) on rank 1")
        assert is_same
        assert stepped


def bad_plain(rank, arguments):
    arguments = (
        {"process_group": distributed.group.WORLD}
        if arguments == "process_group"
        else {"shard_over": {"*": distributed.group.WORLD}}
    )
    parameter = torch.nn.Parameter(WEIGHT.clone())
    guard = gk.attach(sgd([("w", parameter)]), None, **arguments)
    parameter.grad = WEIGHT * (math.inf if rank == 1 else 1.0)
    quietly(guard.optimizer.step)
    return guard.report.stepped, torch.equal(parameter, WEIGHT), parameter.grad is None


@pytest.mark.parametrize("arguments", ["process_group", "shard_over"])
def test_one_ranks_own_gradient_stops_all(ranks, arguments):
    assert ranks(2, bad_plain, arguments) == [(False, True, True)] * 2


def excluded(rank):
    parameters = [torch.nn.Parameter(sharded(WEIGHT)) for _ in range(2)]
    guard = gk.attach(
        sgd([("a", parameters[0]), ("b", parameters[1])]), gk.ClipByGlobalNorm(1.0), exclude="b"
    )
    parameters[0].grad, parameters[1].grad = (
        sharded(WEIGHT),
        sharded(WEIGHT * torch.tensor([[1.0], [math.nan]])),
    )
    quietly(guard.optimizer.step)
    return guard.report.stepped, guard.report.reason


def test_an_excluded_gradient_stops_all_ranks(ranks):
    for stepped, reason in ranks(2, excluded):
        assert not stepped
        assert "'b' is not finite (NaN) on rank 1" in reason


def scaled(rank, value):
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    optimizer = torch.optim.AdamW([("w", parameter)], lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # makes the scaler create its state
    parameter.grad = sharded(WEIGHT * 1024.0 * torch.tensor([[1.0], [value]]))
    scaler.step(optimizer)
    scaler.update()
    return guard.report.stepped, guard.report.norm, scaler.get_scale()


def test_a_loss_scaler_backs_off_on_every_rank(ranks):
    assert [(stepped, scale) for stepped, _, scale in ranks(2, scaled, math.inf)] == [(False, 512.0)] * 2
    for stepped, norm, scale in ranks(2, scaled, 1.0):
        assert (stepped, norm, scale) == (True, pytest.approx(13.0), 1024.0)


def repaired(rank, bad, is_sharded):
    """One rank's gradient is not finite when the scaler looks at it, and is mended before the step."""
    parameter = torch.nn.Parameter(sharded(WEIGHT) if is_sharded else WEIGHT.clone())
    arguments = {} if is_sharded else {"shard_over": {"w": distributed.group.WORLD}}
    optimizer = torch.optim.AdamW([("w", parameter)], lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # makes the scaler create its state
    parameter.grad = sharded(WEIGHT * 1024.0) if is_sharded else WEIGHT * 1024.0
    held = parameter.grad.to_local() if is_sharded else parameter.grad
    if rank == bad:
        held[0, 0] = math.inf
    scaler.unscale_(optimizer)
    held.nan_to_num_(posinf=0.0)
    scaler.step(optimizer)
    whole = parameter.detach().full_tensor() if is_sharded else parameter.detach()
    return guard.report.stepped, math.isfinite(guard.report.norm), torch.equal(whole, WEIGHT)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
def test_what_one_ranks_scaler_saw_stops_all(ranks, bad, is_sharded):
    # No norm tells of it any more, so it is the scaler's verdict that must travel.
    assert ranks(2, repaired, bad, is_sharded) == [(False, True, True)] * 2
    assert ranks(2, repaired, None, is_sharded) == [(True, True, False)] * 2


# ---- gradients that are not everywhere -----------------------------------------------------------------------------


def missing(rank, held):
    """``held``: for each rank, which of the two parameters have a gradient there."""
    parameters = [torch.nn.Parameter(sharded(WEIGHT)) for _ in range(2)]
    guard = gk.attach(sgd([("a", parameters[0]), ("b", parameters[1])]), gp.ZClip(warmup=1))
    for step in range(2):
        for name, parameter in zip("ab", parameters, strict=True):
            parameter.grad = sharded(WEIGHT * 10.0**step)  # a collective, so every rank must make it
            if name not in held[rank]:
                parameter.grad = None
        guard.optimizer.step()
    state = {key: value.tolist() for key, value in guard.state_dict()["states"]["main"].items()}
    return guard.report.norm, guard.report.norms, guard.report.stepped, guard.report.clipped, state


@pytest.mark.parametrize("held", [["ab", "a"], ["ab", "a", "", "b"]])
def test_missing_gradient_on_one_rank(ranks, held):
    answers = ranks(len(held), missing, held)
    rows = WEIGHT.norm(dim=1) * 10
    for norm, norms, stepped, clipped, _ in answers:
        assert norm == pytest.approx(math.hypot(*rows.tolist(), rows[0].item()))
        assert norms == {"a": pytest.approx(130.0), "b": pytest.approx(rows[0].item())}
        assert stepped
        assert clipped
    assert all(answer == answers[0] for answer in answers)


def test_a_rank_without_any_gradient_decides_like_the_others(ranks):
    answers = ranks(2, missing, ["ab", ""])
    assert answers[0] == answers[1]
    assert answers[0][2:4] == (True, True)


def test_no_gradient_on_any_rank_is_no_step(ranks):
    assert [stepped for _, _, stepped, _, _ in ranks(2, missing, ["", ""])] == [False, False]


def empty(rank):
    parameter = torch.nn.Parameter(sharded(torch.ones(1, 3, dtype=torch.float64)))
    guard = gk.attach(sgd([parameter]), gk.ClipByGlobalNorm(1.0, norm_type=math.inf))
    parameter.grad = sharded(torch.tensor([[1.0, -7.0, 2.0]], dtype=torch.float64))
    guard.optimizer.step()
    return parameter.to_local().numel(), guard.report.norm, guard.report.coefficient


@pytest.mark.parametrize("count", [2, 4])
def test_empty_shard(ranks, count):
    answers = ranks(count, empty)
    assert [size for size, _, _ in answers] == [3] + [0] * (count - 1)
    assert [answer[1:] for answer in answers] == [(7.0, 1 / 7)] * count


def positive_entries(rank):
    parameter = torch.nn.Parameter(sharded(torch.ones(1, 2, dtype=torch.float64)))
    guard = gk.attach(sgd([parameter]), gk.ClipByValue(9.0))
    parameter.grad = sharded(torch.tensor([[2.0, 3.0]], dtype=torch.float64))
    guard.optimizer.step()
    return guard.report.selections[0].measured.peaks.tolist(), guard.report.clipped


def test_an_empty_shard_is_not_the_lowest_entry(ranks):
    assert ranks(2, positive_entries) == [([[2.0, 3.0]], False)] * 2


def huge(rank, dtype, entry):
    parameter = torch.nn.Parameter(sharded(torch.ones(4, 25, dtype=dtype)))
    guard = gk.attach(sgd([parameter]), gk.ClipByGlobalNorm(1.0))
    parameter.grad = sharded(torch.full((4, 25), entry, dtype=dtype))
    guard.optimizer.step()
    left = parameter.grad.full_tensor().double()
    return guard.report.norm, float(left.norm()), guard.report.stepped


@pytest.mark.parametrize(
    ("dtype", "entry"),
    [(torch.float64, 1e300), (torch.float64, 1e-200), (torch.float32, 1e30), (torch.float16, 3000.0)],
)
def test_finite_overflow(ranks, dtype, entry):
    entry = torch.tensor(entry, dtype=dtype).item()
    for norm, after, stepped in ranks(2, huge, dtype, entry):
        # Without native kernels torch adds up 16-bit numbers in float32, up to 4,096 at a time.
        assert norm == pytest.approx(10 * entry, rel=1e-7 if dtype == torch.float16 else 1e-12)
        # A float16 entry has 11 bits.
        assert after == pytest.approx(min(1.0, 10 * entry), rel=1e-3 if dtype == torch.float16 else 1e-6)
        assert stepped


# ---- errors on one rank --------------------------------------------------------------------------------------------


class Window:
    """Refuses the step on one rank."""

    ranks = None

    def __init__(self, is_bad):
        self.is_bad = is_bad

    def check_step(self):
        if self.is_bad:
            raise gk.WindowError("not now")

    def factor(self):
        return 1.0

    def is_empty(self):
        return False

    def closed(self, *, stepped):
        self.is_bad = False


def refusing(rank):
    layout = shards(rank, 2)
    parameter = torch.nn.Parameter(layout.place("w", WEIGHT))
    guard = gk.attach(sgd([("w", parameter)]), gk.ClipByGlobalNorm(1.0))
    guard.window = Window(is_bad=rank == 1)
    parameter.grad = layout.place("w", WEIGHT)
    first = outcome(guard.optimizer.step)
    guard.window = None
    guard.optimizer.step()
    return first, guard.report.norm, guard.step


def test_an_error_on_one_rank_is_one_on_all(ranks):
    one, other = ranks(2, refusing)
    assert one[0][0] == "RankError"
    assert one[0][1].startswith("rank 1 raised an error before this step")
    assert other[0] == ("WindowError", "not now")
    assert one[1:] == other[1:] == (pytest.approx(13.0), 1)


def attaching(rank, exclude, policy, shard_over=None, is_sharded=False):
    parameter = torch.nn.Parameter(sharded(WEIGHT) if is_sharded else WEIGHT.clone())
    group = distributed.group.WORLD
    arguments = {"process_group": group} if shard_over is None else {"shard_over": {shard_over[rank]: group}}
    arguments = {} if is_sharded else arguments
    return outcome(
        lambda: bool(gk.attach(sgd([("w", parameter)]), policy[rank], exclude=exclude[rank], **arguments))
    )


@pytest.mark.parametrize("is_sharded", [False, True])
def test_attach_fails_together(ranks, is_sharded):
    policies = [gk.ClipByNorm(1.0)] * 2
    one, other = ranks(2, attaching, [None, "nope"], policies, None, is_sharded)
    assert one[0] == "RankError"
    assert one[1].startswith("rank 1 could not set its guard up")
    assert other[0] == "SelectionError"


def test_different_policies_are_refused_on_every_rank(ranks):
    answers = ranks(2, attaching, [None, None], [gk.ClipByNorm(1.0), gk.ClipByNorm(2.0)])
    assert {kind for kind, _ in answers} == {"RankError"}
    assert "ClipByNorm(max_norm=2.0)" in answers[0][1]


@pytest.mark.parametrize("other", [gk.ClipByNorm(2.0), gk.ClipByValue(1.0)])
def test_shards_under_different_policies_are_refused(ranks, other):
    answers = ranks(2, attaching, [None, None], [gk.ClipByNorm(1.0), other], None, True)
    for kind, words in answers:
        assert kind == "RankError"
        assert "rank 1 and rank 0 have other policies or other parameters" in words


@pytest.mark.parametrize("is_sharded", [False, True])
def test_functions_in_a_policy_have_no_address(ranks, is_sharded):
    schedule = gp.Clip("global", gp.Schedule(math.sqrt), gp.Hard())
    assert ranks(2, attaching, [None, None], [schedule, schedule], None, is_sharded) == [True, True]


def test_shard_over_must_match_on_some_rank(ranks):
    policies = [gk.ClipByNorm(1.0)] * 2
    assert ranks(2, attaching, [None, None], policies, ["w", "x"]) == [True, True]
    for kind, words in ranks(2, attaching, [None, None], policies, ["x", "x"]):
        assert (kind, words) == ("SelectionError", "shard_over='x' matches no parameter of any rank")


def undivided(rank, where):
    parameter = torch.nn.Parameter(WEIGHT.clone())
    where = {"*": (distributed.group.WORLD, where) if where is not None else distributed.group.WORLD}
    return outcome(
        lambda: bool(gk.attach(sgd([("w", parameter)]), gk.policies.AdaptiveGradientClip(), shard_over=where))
    )


def test_units_of_pieces_need_their_dimension(ranks):
    for kind, words in ranks(2, undivided, None):
        assert kind == "SelectionError"
        assert "say along which dimension it is split: {'w': (group, 0)}" in words
    assert ranks(2, undivided, 0) == [True, True]


def nameless(rank, size):
    """Stages whose optimizers do not know the parameters' names: each has one of the name '0'."""
    parameter = torch.nn.Parameter(torch.ones(size[rank]))
    group = distributed.group.WORLD
    return outcome(lambda: bool(gk.attach(sgd([parameter]), None, process_group=group)))


def test_copies_have_one_shape(ranks):
    assert ranks(2, nameless, [2, 2]) == [True, True]
    for kind, words in ranks(2, nameless, [2, 3]):
        assert kind == "SelectionError"
        assert "with the shapes (2,) and (3,), so they are no copies" in words


def small_group(rank):
    group = distributed.new_group([rank])
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    return outcome(lambda: gk.attach(sgd([parameter]), None, process_group=group))


def test_the_group_must_have_all_ranks_that_share_parameters(ranks):
    for kind, words in ranks(2, small_group):
        assert kind == "AttachError"
        assert "lacks the ranks" in words


# ---- what else must be the same ------------------------------------------------------------------------------------


def losses(rank):
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    guard = gk.attach(sgd([parameter]), gp.SkipStep(warmup=3, window=8))
    stepped = []
    for step in range(6):
        parameter.grad = sharded(WEIGHT)
        guard.log(loss=1.0 + 0.01 * step + (1000.0 * rank if step == 5 else 0.1 * rank))
        guard.optimizer.step()
        stepped.append(guard.report.stepped)
    return stepped, float(guard.report.scalars["loss"])


def test_the_loss_is_the_mean_over_ranks(ranks):
    answers = ranks(2, losses)
    assert answers[0] == answers[1]
    stepped, loss = answers[0]
    assert stepped == [True] * 5 + [False]
    assert loss == pytest.approx(1.05 + 500.0)


def last_stage_loss(rank):
    """Only the last pipeline stage has a loss."""
    parameter = torch.nn.Parameter(WEIGHT.clone())
    where = {"*": distributed.group.WORLD}
    guard = gk.attach(sgd([(f"stage{rank}", parameter)]), gp.SkipStep(warmup=3, window=8), shard_over=where)
    stepped = []
    for step in range(6):
        parameter.grad = WEIGHT.clone()
        if rank == 1:
            guard.log(loss=1.0 + 0.01 * step + 1000.0 * (step == 5))
        guard.optimizer.step()
        stepped.append(guard.report.stepped)
    return stepped, guard.report.norm, sorted(guard.report.norms)


def test_a_loss_on_one_rank_counts_on_all(ranks):
    answers = ranks(2, last_stage_loss)
    assert answers[0] == answers[1]
    stepped, norm, names = answers[0]
    assert stepped == [True] * 5 + [False]
    assert norm == pytest.approx(13.0 * math.sqrt(2))
    assert names == ["stage0", "stage1"]


def zero_learning_rate(rank):
    """The first step of a schedule from 0, where one rank's gradient is 0."""
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    optimizer = torch.optim.AdamW([parameter], lr=0.0)
    guard = gk.attach(optimizer, None)
    parameter.grad = sharded(WEIGHT * torch.tensor([[1.0], [0.0]]))
    optimizer.step()
    return guard.step, guard.report.norm


def test_a_zero_on_one_rank_is_no_hidden_step(ranks):
    assert ranks(2, zero_learning_rate) == [(1, 5.0)] * 2


def hidden(rank):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 3)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, gp.ZClip(), model=model)
    get_optimizer_state_dict(model, optimizer)
    return guard.step, len(optimizer.state)


def test_hidden_step(ranks):
    assert ranks(2, hidden) == [(0, 2)] * 2


def growing(rank):
    parameters = [torch.nn.Parameter(WEIGHT.clone()) for _ in range(2)]
    optimizer = sgd([parameters[0]])
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), shard_over={"*": distributed.group.WORLD})
    norms = []
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = WEIGHT.clone()
        optimizer.step()
        norms.append(guard.report.norm)
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [parameters[1]]})
    return norms


def test_a_group_that_is_added_is_shared_too(ranks):
    wanted = [13.0 * math.sqrt(2), 13.0 * math.sqrt(4)]
    assert ranks(2, growing) == [pytest.approx(wanted)] * 2


def copies(rank, is_synchronized):
    """A plain parameter beside sharded ones, whose gradient nobody exchanges."""
    parameters = {"sharded": torch.nn.Parameter(sharded(WEIGHT)), "plain": torch.nn.Parameter(WEIGHT.clone())}
    guard = gk.attach(sgd(list(parameters.items())), gk.ClipByGlobalNorm(1.0))
    parameters["sharded"].grad = sharded(WEIGHT)
    parameters["plain"].grad = WEIGHT.clone() * (1 if is_synchronized else rank + 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guard.optimizer.step()
    return [(warning.category.__name__, str(warning.message)) for warning in caught], guard.report.norm


def test_copies_with_different_gradients_are_told(ranks):
    for caught, _ in ranks(2, copies, False):
        (category, words), *_ = caught
        assert category == "GradkeelWarning"
        assert words.startswith("ranks 0 and 1 have copies of 'plain', but gradients of the norms 13 and 26")
    assert ranks(2, copies, True) == [([], pytest.approx(13 * math.sqrt(2)))] * 2


# ---- how many collectives ------------------------------------------------------------------------------------------


def collectives(rank, count, parameters, kind, has_maxima=True):
    mesh = init_device_mesh("cpu", (count,))
    placement = {"sharded": [Shard(0)], "replicated": [Replicate()]}[kind]
    whole = torch.ones(2, 2)
    own = [torch.nn.Parameter(distribute_tensor(whole, mesh, placement)) for _ in range(parameters)]
    third = len(own) // 3
    groups = [
        {"params": own[:third]},
        {
            "params": own[third : 2 * third],
            "clip": gk.ClipByGlobalNorm(1.0, norm_type=math.inf if has_maxima else 1.0),
        },
        {"params": own[2 * third :], "clip": gk.policies.AdaptiveGradientClip()},
    ]
    guard = gk.attach(sgd(groups), gk.ClipByValue(0.5) if has_maxima else gk.ClipByNorm(0.5))
    counts = []
    for _ in range(3):
        for parameter in own:
            parameter.grad = distribute_tensor(whole, mesh, placement)
        with CommDebugMode() as mode:
            guard._begin()
            guard._evaluate()
        guard._finish()
        counts.append(mode.get_total_counts())
    return counts


@pytest.mark.parametrize("parameters", [10, 100, 400])
@pytest.mark.parametrize("count", [2, 4])
def test_one_collective(ranks, count, parameters):
    assert ranks(count, collectives, count, parameters, "sharded", False) == [[1, 1, 1]] * count


def test_largest_and_lowest_entries_are_a_second_collective(ranks):
    assert ranks(2, collectives, 2, 10, "sharded") == [[2, 2, 2]] * 2


def test_no_collective_where_nothing_is_sharded(ranks):
    assert ranks(2, collectives, 2, 10, "replicated") == [[0, 0, 0]] * 2


def unused_copies(rank):
    """Of two plain copies one gets no gradient in some steps, on both ranks or on the first; collectives and norms."""
    parameters = {name: torch.nn.Parameter(WEIGHT.clone()) for name in "ab"}
    guard = gk.attach(sgd(list(parameters.items())), None, process_group=distributed.group.WORLD)
    found = []
    for lacking in ((), (0, 1), (0, 1), (0,), (0,), ()):
        parameters["a"].grad = WEIGHT.clone()
        parameters["b"].grad = None if rank in lacking else WEIGHT.clone()
        with CommDebugMode() as mode:
            guard._begin()
            guard._evaluate()
        guard._finish()
        found.append((mode.get_total_counts(), guard.report.norms.get("b", 0.0)))
    return found


def test_copies_without_gradients_cost_collectives_only_where_that_changes(ranks):
    full = pytest.approx(13.0)
    wanted = [(1, full), (3, 0.0), (1, 0.0), (3, full), (1, full), (3, full)]
    assert ranks(2, unused_copies) == [wanted] * 2


def sets_told(rank, make_layout):
    """How many objects ranks send each other in attach."""
    layout = make_layout(rank, 4)
    placed = {name: layout.place(name, torch.ones(4, 2)) for name in ("linear", "bias")}
    parameters = [(name, torch.nn.Parameter(value)) for name, value in placed.items() if value is not None]
    told, broadcast = [], distributed.broadcast_object_list

    def counted(values, *arguments, **options):
        told.append(values)
        return broadcast(values, *arguments, **options)

    distributed.broadcast_object_list = counted
    try:
        gk.attach(sgd(parameters), gk.ClipByNorm(1.0), **layout.arguments)
    finally:
        distributed.broadcast_object_list = broadcast
    return len(told)


@pytest.mark.parametrize(
    ("layout", "sets"),
    [(layouts.shards, 0), (layouts.experts, 0), (layouts.everywhere, 0), (layouts.sharded_stages, 2)],
)
def test_each_distinct_set_of_parameters_is_told_once(ranks, layout, sets):
    assert ranks(4, sets_told, layout) == [sets] * 4


def partial_gradients(rank):
    layout = layouts.partial_gradients(rank, 2)
    parameters = {name: torch.nn.Parameter(layout.place(name, WEIGHT)) for name in "abc"}
    parameters["sharded"] = torch.nn.Parameter(sharded(WEIGHT))
    guard = gk.attach(sgd(list(parameters.items())), gk.ClipByGlobalNorm(1.0))
    for name in "abc":
        parameters[name].grad = layout.gradient(name, WEIGHT)
    parameters["sharded"].grad = sharded(WEIGHT)
    with CommDebugMode() as mode:
        guard.optimizer.step()
    return mode.get_total_counts(), guard.report.norm


def test_partial_gradients_cost_one_collective_each(ranks):
    assert ranks(2, partial_gradients) == [(1 + 3, pytest.approx(13.0 * 2))] * 2


def by_value(rank):
    parameter = torch.nn.Parameter(sharded(WEIGHT))
    guard = gk.attach(sgd([parameter]), gk.ClipByValue(1.0))
    parameter.grad = sharded(WEIGHT)
    guard.optimizer.step()
    with CommDebugMode() as mode:
        told = guard.report.clipped, guard.report.clipped_norm, repr(guard.report)
    return *told, mode.get_total_counts()


def test_reading_a_report_is_no_collective(ranks):
    words = "StepReport(step 1, 2-norm 13, coefficient 1, clipped, stepped)"
    assert ranks(2, by_value) == [(True, None, words, 0)] * 2


def data_parallel(rank):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    optimizer = sgd(model.parameters())
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1e-3), model=model)
    model(torch.full((2, 3), rank + 1.0)).sum().backward()
    with CommDebugMode() as mode, contextlib.nullcontext():
        optimizer.step()
    return mode.get_total_counts(), guard.report.norm


def test_no_collective_under_ddp(ranks):
    answers = ranks(2, data_parallel)
    assert [count for count, _ in answers] == [0, 0]
    assert answers[0][1] == answers[1][1]
