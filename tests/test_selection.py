"""Which parameters a policy is for: names, exclude entries, groups with their own policy."""

import io
import math
import warnings

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.policies import Clip, Constant, Hard
from gradkeel.record import Reader

BIG = 100.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 2)


NAMES = ("embed.weight", "norm.weight", "norm.bias", "head.weight", "head.bias")


@pytest.fixture
def model():
    return Block()


def fill(model, value=BIG):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def stepped(model, optimizer, policy, **arguments):
    """The guard after one step on equal gradients, and which parameters' gradients it made smaller, by name."""
    guard = gk.attach(optimizer, policy, model=model, **arguments)
    fill(model)
    optimizer.step()
    names = dict(zip(map(id, model.parameters()), dict(model.named_parameters()), strict=True))
    return guard, {
        names[id(p)] for p in model.parameters() if not torch.equal(p.grad, torch.full_like(p, BIG))
    }


# -- names ----------------------------------------------------------------------------------------------------


def test_names_come_from_named_parameters(model):
    guard = gk.attach(torch.optim.SGD(model.named_parameters(), lr=0.1), None)
    assert guard.names == NAMES


def test_names_come_from_the_model(model):
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=0.1), None, model=model)
    assert guard.names == NAMES


def test_the_optimizers_own_names_come_before_the_models(model):
    guard = gk.attach(torch.optim.SGD(model.head.named_parameters(), lr=0.1), None, model=model)
    assert guard.names == ("weight", "bias")


def test_names_are_positions_else(model):
    groups = [{"params": model.head.parameters()}, {"params": model.norm.parameters()}]
    guard = gk.attach(torch.optim.SGD(groups, lr=0.1), None)
    assert guard.names == ("0", "1", "2", "3")


def test_parameters_that_the_model_does_not_have_are_positions_and_warned_of(model):
    stranger = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.head.parameters(), stranger], lr=0.1)
    with pytest.warns(gk.GradkeelWarning, match="1 of the optimizer's parameters are not in model"):
        guard = gk.attach(optimizer, None, model=model)
    assert guard.names == ("head.weight", "head.bias", "2")


def test_parameters_whose_place_in_the_model_others_have_are_warned_of(model):
    """As where weights are quantized after the optimizer was built: those of the model are not trained any more."""
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    model.head = nn.Linear(3, 2).requires_grad_(False)
    model.norm.requires_grad_(False)
    with pytest.warns(gk.GradkeelWarning, match="2 of the optimizer's parameters are not in model"):
        gk.attach(optimizer, None, model=model)


def test_a_loss_with_parameters_of_its_own_is_not_warned_of(model):
    """As ArcFace has them; under nn.ModuleDict they have names too."""
    loss = nn.Linear(2, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    both = nn.ModuleDict({"model": model, "loss": loss})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard = gk.attach(optimizer, None, model=model)
        assert guard.names[-2:] == (str(len(NAMES)), str(len(NAMES) + 1))
        guard = gk.attach(optimizer, None, model=both)
    assert guard.names[-2:] == ("loss.weight", "loss.bias")


# -- exclude --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (lambda model: "*.bias", {"norm.bias", "head.bias"}),
        (lambda model: ["*.bias", "embed.*"], {"norm.bias", "head.bias", "embed.weight"}),
        (lambda model: model.norm, {"norm.weight", "norm.bias"}),
        (lambda model: [model.norm, model.head.bias], {"norm.weight", "norm.bias", "head.bias"}),
        (lambda model: model.embed.weight, {"embed.weight"}),
        (
            lambda model: lambda name, parameter: parameter.dim() < 2,
            {"norm.weight", "norm.bias", "head.bias"},
        ),
        (lambda model: (p for p in model.head.parameters()), {"head.weight", "head.bias"}),
        (lambda model: "*", set(NAMES)),
    ],
)
def test_excluded_parameters_are_left_alone_and_count_in_no_norm(model, exclude, left_out):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard, clipped = stepped(model, optimizer, gk.ClipByGlobalNorm(1.0), exclude=exclude(model))
    assert clipped == set(NAMES) - left_out
    main, excluded = guard.report.selections
    assert (main.label, set(main.measured.names)) == ("main", set(NAMES) - left_out)
    assert (excluded.label, set(excluded.measured.names)) == ("excluded", left_out)
    entries = sum(p.numel() for name, p in model.named_parameters() if name not in left_out)
    assert guard.report.norm == pytest.approx(BIG * entries**0.5, rel=1e-9)
    assert set(guard.report.norms) == set(NAMES)


def test_an_excluded_gradient_counts_in_the_nonfinite_check(model):
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=0.1), "norm:1.0,exclude=head.bias", model=model)
    fill(model)
    model.head.bias.grad[0] = torch.nan
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.warns(gk.errors.SkippedStepWarning, match=r"'head\.bias' is not finite \(NaN\)"):
        guard.optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_pattern_that_matches_nothing_lists_near_names(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        gk.SelectionError, match=r"'head\.wieght' matches no parameter; near names: head\.weight"
    ):
        gk.attach(optimizer, None, model=model, exclude="head.wieght")


def test_a_pattern_without_names_says_where_names_come_from(model):
    with pytest.raises(gk.SelectionError, match="have no names; pass model=, or build the optimizer from"):
        gk.attach(torch.optim.SGD(model.parameters(), lr=0.1), None, exclude="*.bias")


def test_a_pattern_may_match_a_parameter_of_the_model_that_this_optimizer_does_not_have(model):
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, model=model, exclude="norm.*")
    assert guard.report.selections[-1].measured.names == ()


@pytest.mark.parametrize(
    ("exclude", "words"),
    [
        (nn.Linear(2, 2), "exclude: Linear selects none of the optimizer's parameters"),
        (nn.Parameter(torch.ones(2)), "exclude: Parameter selects none"),
        (lambda name, parameter: False, "selects none"),
        ([3], "must be a name pattern, a module, a parameter, or a predicate"),
    ],
)
def test_an_entry_that_selects_nothing_is_an_error(model, exclude, words):
    with pytest.raises(gk.SelectionError, match=words):
        gk.attach(torch.optim.SGD(model.parameters(), lr=0.1), None, model=model, exclude=exclude)


def test_excluded_in_two_places_is_refused(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="say what is excluded in one place only"):
        gk.attach(optimizer, "norm:1.0,exclude=*.bias", model=model, exclude="*.weight")


@pytest.mark.parametrize(("kept", "excluded"), [("weight", "bias"), ("bias", "weight")])
def test_weight_only_and_bias_only_as_in_the_paddle_tutorial(kept, excluded):
    net = nn.Linear(10, 10)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    gk.attach(optimizer, gk.ClipByNorm(1.0), exclude=f"*{excluded}")
    net(torch.rand(10, 10)).mean().mul(1000.0).backward()
    raw = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    after = dict(net.named_parameters())
    moved = {name: (before[name] - after[name]).norm().item() for name in after}
    # lr times norm, in fp32
    assert moved[kept] == pytest.approx(0.1 * 1.0, rel=1e-5)
    assert moved[excluded] == pytest.approx(0.1 * raw[excluded].norm().item(), rel=1e-5)


# -- the group key "clip" -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [gk.ClipByNorm(0.1), "norm:0.1"])
def test_a_group_may_have_its_own_policy(model, clip):
    groups = [{"params": model.norm.parameters()}, {"params": model.head.parameters(), "clip": clip}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    guard, _ = stepped(model, optimizer, gk.ClipByGlobalNorm(1.0))
    assert model.head.weight.grad.norm().item() == pytest.approx(0.1, rel=1e-6)
    assert model.head.bias.grad.norm().item() == pytest.approx(0.1, rel=1e-6)
    assert optimizer.param_groups[1]["clip"] == "norm:0.1"
    main, head, excluded = guard.report.selections
    assert [part.label for part in guard.report.selections] == ["main", "group 1", "excluded"]
    # the report's own numbers are the main policy's: four entries of BIG
    assert guard.report.norm == main.norm == pytest.approx(BIG * 2, rel=1e-9)
    assert head.norm == pytest.approx(BIG * 6**0.5, rel=1e-9)
    assert guard.report.coefficient == pytest.approx(1 / (BIG * 2), rel=1e-9)
    assert head.coefficient == pytest.approx(0.1 / (BIG * 2), rel=1e-9)
    assert head.coefficients["head.bias"] == pytest.approx(0.1 / (BIG * 2**0.5), rel=1e-9)
    assert excluded.norm == 0.0


def test_a_group_with_clip_none_is_excluded(model):
    groups = [{"params": model.head.parameters()}, {"params": model.norm.parameters(), "clip": None}]
    _, clipped = stepped(model, torch.optim.SGD(groups, lr=0.0), gk.ClipByNorm(1.0))
    assert {name for name in clipped if not name.startswith("embed")} == {"head.weight", "head.bias"}


def test_exclude_reaches_into_groups_with_their_own_policy(model):
    groups = [{"params": model.norm.parameters()}, {"params": model.head.parameters(), "clip": "norm:0.1"}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    _, clipped = stepped(model, optimizer, gk.ClipByNorm(1.0), exclude="*.bias")
    assert clipped == {"norm.weight", "head.weight"}


def test_two_groups_with_equal_policies_are_measured_apart(model):
    groups = [{"params": m.parameters(), "clip": "global-norm:1"} for m in (model.norm, model.head)]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    guard, _ = stepped(model, optimizer, None)
    assert [part.label for part in guard.report.selections] == ["main", "group 0", "group 1", "excluded"]
    for module in (model.norm, model.head):
        assert torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (0.1, "'clip' must be a policy, a spec string such as 'norm:1.0', or None, not float"),
        ("none", "must name a policy and nothing else; pass None"),
        ("norm:1.0,exclude=*.bias", "must name a policy and nothing else"),
        ("nrm:1.0", "did you mean 'norm'"),
    ],
)
def test_a_groups_clip_that_is_no_policy_is_an_error(model, clip, words):
    with pytest.raises(ValueError, match=words):
        gk.attach(torch.optim.SGD([{"params": model.parameters(), "clip": clip}], lr=0.1), None)


def test_a_groups_clip_that_cannot_be_written_down_is_an_error(model):
    unnamed = Clip("tensor", Constant(1.0), Hard())
    with pytest.raises(TypeError, match="cannot be written as a spec string"):
        gk.attach(torch.optim.SGD([{"params": model.parameters(), "clip": unnamed}], lr=0.1), None)


def test_group_policies_survive_a_checkpoint(model):
    def optimizer_of(model):
        groups = [
            {"params": model.head.parameters(), "clip": gk.ClipByNorm(0.1)},
            {"params": model.norm.parameters(), "clip": None},
            {"params": model.embed.parameters()},
        ]
        return torch.optim.AdamW(groups, lr=0.1)

    optimizer = optimizer_of(model)
    gk.attach(optimizer, "global-norm:1.0", model=model)
    fill(model)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = optimizer_of(model)
    guard = gk.attach(fresh, "global-norm:1.0", model=model)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    fill(model)
    fresh.step()
    assert [part.label for part in guard.report.selections] == ["main", "group 0", "excluded"]
    assert guard.report.selections[1].policy == repr(gk.ClipByNorm(0.1))
    assert guard.report.selections[2].measured.names == ("norm.weight", "norm.bias")


def test_a_checkpoint_from_before_the_guard_leaves_group_policies_alone(model):
    groups = [{"params": model.head.parameters()}, {"params": model.norm.parameters()}]
    old = torch.optim.SGD(groups, lr=0.1).state_dict()
    groups[0]["clip"], groups[1]["clip"] = "norm:0.1", None
    optimizer = torch.optim.SGD(groups, lr=0.1)
    guard = gk.attach(optimizer, None, model=model)
    optimizer.load_state_dict(old)
    fill(model)
    optimizer.step()
    assert [part.label for part in guard.report.selections] == ["main", "group 0", "excluded"]
    assert [group["clip"] for group in optimizer.param_groups] == ["norm:0.1", None]


def test_a_groups_policy_may_be_changed_while_training(model):
    optimizer = torch.optim.SGD([{"params": model.head.parameters(), "clip": "norm:0.1"}], lr=0.0)
    guard = gk.attach(optimizer, None, model=model)
    for clip, norm in [("norm:0.1", 0.1), (gk.ClipByNorm(0.2), 0.2), (None, BIG * 2)]:
        optimizer.param_groups[0]["clip"] = clip
        fill(model)
        optimizer.step()
        assert model.head.weight.grad.norm().item() == pytest.approx(norm, rel=1e-6)
    assert guard.report.selections[-1].measured.names == ("head.weight", "head.bias")


def gradients_of(scale, *parameters):
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, scale)


def test_a_changed_clip_is_reported_and_begins_its_statistics_anew(model):
    groups = [
        {"params": model.norm.parameters()},
        {"params": model.head.parameters(), "clip": "zclip:warmup=2"},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    guard = gk.attach(optimizer, "robust:warmup=2", model=model)

    def step(clip, scale=1.0):
        optimizer.param_groups[1]["clip"] = clip
        gradients_of(scale, *model.norm.parameters(), *model.head.parameters())
        optimizer.step()
        states = {
            label: state["seen"].item() for label, state in guard.state_dict()["states"].items() if state
        }
        return guard.report.selections[1], states

    for count in (1, 2, 3):
        part, states = step("zclip:warmup=2")
        assert states == {"main": count, "group 1": count}
    assert part.policy == repr(gk.policies.ZClip(warmup=2))
    # Another parameter of the same policy is another policy; the main one goes on.
    part, states = step(gk.policies.ZClip(2.0, warmup=2))
    assert (part.label, part.policy) == ("group 1", repr(gk.policies.ZClip(2.0, warmup=2)))
    assert states == {"main": 4, "group 1": 1}
    assert part.outcome.bound() == math.inf
    # Written in another way it is the same, and keeps what it has learned.
    part, states = step("zclip:z=2,warmup=2")
    assert states == {"main": 5, "group 1": 2}
    part, states = step("zclip:z=2.0,warmup=2", scale=100.0)
    assert states == {"main": 6, "group 1": 3}
    assert part.clipped
    # One that remembers nothing, and then the first again: its old statistics are gone.
    part, states = step("norm:0.5")
    assert (part.policy, part.coefficients["head.bias"]) == (
        repr(gk.ClipByNorm(0.5)),
        pytest.approx(0.5 / 2**0.5),
    )
    assert states == {"main": 7}
    part, states = step("zclip:warmup=2", scale=100.0)
    assert states == {"main": 8, "group 1": 1}
    assert not part.clipped
    # None leaves the group out: it is still measured, but nobody clips it.
    part, states = step(None)
    assert (part.label, part.policy, part.measured.names) == (
        "excluded",
        "None",
        ("head.weight", "head.bias"),
    )
    assert part.coefficients == {"head.weight": 1.0, "head.bias": 1.0}
    assert states == {"main": 9}


def test_a_changed_clip_is_recorded_from_that_step_on(model, tmp_path):
    groups = [{"params": model.norm.parameters()}, {"params": model.head.parameters(), "clip": "norm:0.5"}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    guard = gk.attach(optimizer, "global-norm:1.0", model=model, record=tmp_path / "run.keel")
    for clip in ("norm:0.5", "norm:0.5", "global-norm:0.25", None, "norm:0.2", "norm:0.1"):
        optimizer.param_groups[1]["clip"] = clip
        gradients_of(BIG, *model.norm.parameters(), *model.head.parameters())
        optimizer.step()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.names == ("norm.weight", "norm.bias", "head.weight", "head.bias")
        # What is said of a parameter is what held last.
        assert [p.selection for p in run.parameters] == ["main", "main", "group 1", "group 1"]
        assert [p.policy for p in run.parameters][2:] == [repr(gk.ClipByNorm(0.1))] * 2
        assert run.main.tolist() == [True, True, False, False]
        coefficients = run.parameter_coefficients()
        assert run.norms().tolist() == [pytest.approx([BIG * n**0.5 for n in (2, 2, 4, 2)], rel=1e-6)] * 6
        assert run.coefficients().tolist() == pytest.approx([1 / (2 * BIG)] * 6, rel=1e-6)
    # Four weights and two biases of the head, each of BIG.
    tensors, together = (BIG * 2, BIG * 2**0.5), BIG * 6**0.5
    wanted = [[0.5 / n for n in tensors]] * 2 + [
        [0.25 / together] * 2,
        [1.0, 1.0],
        [0.2 / n for n in tensors],
        [0.1 / n for n in tensors],
    ]
    assert coefficients[:, 2:].tolist() == [pytest.approx(row, rel=1e-6) for row in wanted]
    assert coefficients[:, :2].tolist() == [pytest.approx([1 / (2 * BIG)] * 2, rel=1e-6)] * 6


# -- the optimizer changes ------------------------------------------------------------------------------------


def test_groups_that_are_added_later_are_followed(model):
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    fill(model)
    optimizer.step()
    optimizer.add_param_group({"params": model.norm.parameters()})
    optimizer.add_param_group({"params": model.embed.parameters(), "clip": "value:2.0"})
    fill(model)
    optimizer.step()
    assert set(guard.names) == set(NAMES)
    assert guard.report.norm == pytest.approx(BIG * 10**0.5, rel=1e-9)
    assert model.embed.weight.grad.max() == 2.0


def test_a_group_that_is_added_later_resets_no_other_groups_statistics(model):
    groups = [{"params": model.norm.parameters()}, {"params": model.head.parameters(), "clip": "zclip"}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    guard = gk.attach(optimizer, "autoclip", model=model)

    def step():
        fill(model)
        optimizer.step()
        return guard.state_dict()["states"]

    for _ in range(3):
        before = step()
    optimizer.add_param_group({"params": [model.embed.weight], "clip": "zclip"})
    # Connecting alone changes nothing, and neither does looking.
    guard.connect()
    connected = guard.state_dict()["states"]
    for label in ("main", "group 1"):
        assert all(torch.equal(connected[label][key], value) for key, value in before[label].items())
    assert {label: state["seen"].tolist() for label, state in connected.items()} == {
        "main": [3],
        "group 1": [3],
        "group 2": [0],
    }
    assert {label: state["seen"].tolist() for label, state in step().items()} == {
        "main": [4],
        "group 1": [4],
        "group 2": [1],
    }


def test_a_group_that_joins_the_main_policy_makes_only_that_begin_anew(model):
    """Norms of more tensors are other norms; those of a group with its own policy are the same as before."""
    groups = [{"params": model.norm.parameters()}, {"params": model.head.parameters(), "clip": "zclip"}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    guard = gk.attach(optimizer, "autoclip", model=model)
    for _ in range(3):
        fill(model)
        optimizer.step()
    optimizer.add_param_group({"params": [model.embed.weight]})
    fill(model)
    optimizer.step()
    states = guard.state_dict()["states"]
    assert {label: state["seen"].tolist() for label, state in states.items()} == {"main": [1], "group 1": [4]}


def test_a_tied_parameter_is_one_parameter(model):
    model.head.weight = nn.Parameter(torch.ones(3, 2))
    model.embed.weight = model.head.weight
    guard = gk.attach(torch.optim.SGD(model.parameters(), lr=0.1), None, model=model)
    assert guard.names == ("embed.weight", "norm.weight", "norm.bias", "head.bias")


def test_a_setting_of_the_optimizers_own_that_is_called_clip_is_none_of_ours():
    class Clipping(torch.optim.SGD):
        def __init__(self, parameters, lr=0.1, clip=1.0):
            super().__init__(parameters, lr)
            self.defaults["clip"] = clip
            for group in self.param_groups:
                group["clip"] = clip

    optimizer = Clipping([torch.nn.Parameter(torch.ones(2))])
    guard = gk.attach(optimizer, "norm:0.5")
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert guard.report.selections[0].norm == 5.0
    assert guard.report.clipped
    assert optimizer.param_groups[0]["clip"] == 1.0
