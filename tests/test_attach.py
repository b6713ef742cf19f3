"""`attach` and `detach`: what can be guarded, what is refused, what is left behind, and copies."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.record import Reader
from optimizers import BY_NAME


@pytest.fixture
def net():
    return nn.Linear(2, 1)


@pytest.fixture
def optimizer(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


class Wrapper(torch.optim.Optimizer):
    """As Accelerate and Lightning wrap: an Optimizer that holds another one, and passes gradients on as they are."""

    __module__ = "accelerate.optimizer"

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


# -- arguments ------------------------------------------------------------------------------------------------


def test_the_arguments_and_their_defaults():
    given = inspect.signature(gk.attach).parameters
    assert list(given)[:6] == [
        "optimizer",
        "policy",
        "model",
        "exclude",
        "nonfinite",
        "max_consecutive_skips",
    ]
    assert {p.kind.name for name, p in given.items() if name not in ("optimizer", "policy")} == {
        "KEYWORD_ONLY"
    }
    assert [given[name].default for name in list(given)[2:6]] == [None, None, "skip", 10]


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (
            {"policy": 1.0},
            TypeError,
            r"attach\(policy=1.0\): policy must be a policy such as ClipByGlobalNorm",
        ),
        ({"policy": gk.ClipByNorm}, TypeError, "policy must be a policy"),
        ({"policy": "nrm:1"}, gk.PolicySpecError, "unknown policy"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be 'skip', 'raise' or 'keep'"),
        ({"nonfinite": None}, ValueError, "nonfinite must be 'skip', 'raise' or 'keep'"),
        ({"max_consecutive_skips": 0}, ValueError, "must be at least 1"),
        ({"max_consecutive_skips": True}, TypeError, "must be an int"),
        ({"max_consecutive_skips": 1.5}, TypeError, "must be an int"),
        ({"model": "net"}, TypeError, r"attach\(model=...\): model must be a torch.nn.Module, not str"),
        ({"model": []}, TypeError, "model must be a torch.nn.Module, not list"),
        ({"exclude": 3}, TypeError, r"attach\(exclude=...\): exclude must be a name pattern.*, not int"),
    ],
)
def test_wrong_arguments_are_named(optimizer, arguments, kind, words):
    with pytest.raises(kind, match=words):
        gk.attach(optimizer, **{"policy": None, **arguments})
    gk.attach(optimizer, None).detach()  # nothing was left behind


def test_only_optimizers_can_be_guarded(net):
    with pytest.raises(
        TypeError, match=r"attach\(optimizer=Linear\): optimizer must be a torch.optim.Optimizer"
    ):
        gk.attach(net, None)


def test_a_policy_may_be_a_spec_string(optimizer):
    guard = gk.attach(optimizer, "global-norm:0.25")
    assert guard.policy == gk.ClipByGlobalNorm(0.25)
    assert guard.policy_spec == "global-norm:0.25"


def test_the_environment_overrides_the_policy_and_says_so(optimizer, net, monkeypatch):
    monkeypatch.setenv("GRADKEEL_POLICY", "norm:0.5,exclude=*.bias")
    with pytest.warns(gk.GradkeelWarning, match=r"environment has GRADKEEL_POLICY=norm:0\.5") as warned:
        guard = gk.attach(
            optimizer,
            gk.ClipByGlobalNorm(1.0),
            model=nn.Sequential(net),
            exclude="*.weight",
            nonfinite="raise",
        )
    assert len(warned) == 1
    assert guard.policy == gk.ClipByNorm(0.5)
    assert guard.nonfinite == "raise"
    assert guard.report.selections[-1].measured.names == ("0.bias",)


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "keep"])
def test_the_environments_none_measures_and_never_weakens_nonfinite(optimizer, net, monkeypatch, nonfinite):
    monkeypatch.setenv("GRADKEEL_POLICY", "none")
    with pytest.warns(gk.GradkeelWarning, match="unset GRADKEEL_POLICY"):
        guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), nonfinite=nonfinite)
    assert (guard.policy, guard.nonfinite) == (None, nonfinite)


def test_the_environments_record_is_said(optimizer, net, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADKEEL_RECORD", str(tmp_path / "run.keel"))
    with pytest.warns(gk.GradkeelWarning, match="unset GRADKEEL_RECORD"):
        guard = gk.attach(optimizer, None)
    guard.detach()
    assert (tmp_path / "run.keel").exists()


def test_what_compare_sets_is_not_said(optimizer, net, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADKEEL_POLICY", "none")
    monkeypatch.setenv("GRADKEEL_RECORD", str(tmp_path / "run.keel"))
    monkeypatch.setenv("GRADKEEL_SEED", "0")
    gk.attach(optimizer, "norm:1.0").detach()


def test_an_empty_variable_is_none(optimizer, net, monkeypatch):
    monkeypatch.setenv("GRADKEEL_POLICY", "")
    monkeypatch.setenv("GRADKEEL_RECORD", "")
    guard = gk.attach(optimizer, "norm:1.0")
    assert guard.policy == gk.ClipByNorm(1.0)
    assert guard.recorders == []


def test_an_environment_that_cannot_be_read_is_named(optimizer, net, monkeypatch):
    monkeypatch.setenv("GRADKEEL_POLICY", "norm:")
    with (
        pytest.warns(gk.GradkeelWarning),
        pytest.raises(gk.errors.PolicySpecError, match="GRADKEEL_POLICY=norm:, in the environment"),
    ):
        gk.attach(optimizer, None)
    assert not optimizer._optimizer_step_pre_hooks


# -- a record that cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "kind", "words"),
    [
        ("", ValueError, r"attach\(record=\.\.\.\): '' is no path"),
        ("  ", ValueError, "is no path"),
        ("run\0.keel", ValueError, "is no path"),
        (True, TypeError, "not True"),
        (123, TypeError, "not 123"),
        (b"run.keel", TypeError, "a record is a path such as"),
        (gk.Recorder, TypeError, "a record is a path such as"),
        ([], TypeError, "a record is a path such as"),
    ],
)
def test_what_is_no_path_is_refused_before_anything_is_guarded(optimizer, record, kind, words):
    before = set(vars(optimizer))
    with pytest.raises(kind, match=words):
        gk.attach(optimizer, None, record=record)
    assert set(vars(optimizer)) == before
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "record", [".", "folder", "file/run.keel", "loop", "x" * 300, "/proc/run.keel", "/dev/full"]
)
def test_a_path_that_cannot_be_written_is_said_once_and_training_goes_on(
    optimizer, net, tmp_path, monkeypatch, record
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.warns(gk.errors.RecordWarning, match="training goes on without a record") as warned:
        guard = gk.attach(optimizer, gk.ClipByNorm(0.1), record=record)
    assert len(warned) == 1
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert guard.report.clipped
    guard.detach()


def test_a_recorder_that_cannot_be_bound_leaves_no_guard(optimizer):
    class Broken:
        def record(self, report):
            pass

        def bind(self, guard):
            raise OSError("no")

    with pytest.raises(OSError, match="no"):
        gk.attach(optimizer, None, record=Broken())
    assert not optimizer._optimizer_step_pre_hooks
    assert not hasattr(optimizer, "_gradkeel_guard")


# -- wrappers -------------------------------------------------------------------------------------------------


def test_the_optimizer_inside_a_wrapper_is_guarded(net, optimizer):
    guard = gk.attach(Wrapper(Wrapper(optimizer)), gk.ClipByNorm(0.1), model=net)
    assert guard.optimizer is optimizer
    net(torch.ones(1, 2)).sum().backward()
    Wrapper(optimizer).step()
    assert guard.report.clipped


def test_the_optimizer_inside_a_wrapper_is_taken_over(optimizer):
    first = gk.attach(optimizer, None)
    second = gk.attach(Wrapper(optimizer), None)
    assert optimizer._gradkeel_guard is second is not first


class Noisy(torch.optim.Optimizer):
    """An optimizer of its own that holds another one, and changes gradients before that one's step."""

    def __init__(self, optimizer, key="optimizer", *, is_whole=True):
        if is_whole:
            super().__init__(optimizer.param_groups, {})
        setattr(self, key, optimizer)
        self.inner = key
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(1000.0)
        return getattr(self, self.inner).step(closure)


@pytest.mark.parametrize("key", ["optimizer", "base_optimizer"])
def test_a_wrapper_that_changes_gradients_is_guarded_itself(net, optimizer, key):
    outer = Noisy(optimizer, key)
    guard = gk.attach(outer, gk.ClipByGlobalNorm(0.1), model=net)
    assert guard.optimizer is outer
    net(torch.ones(1, 2)).sum().backward()
    outer.step()
    assert guard.report.norm == pytest.approx(3.0**0.5, rel=1e-6)  # without the noise
    with pytest.raises(gk.AttachError, match="guarded already"):
        gk.attach(Noisy(outer, key), None)


@pytest.mark.parametrize("key", ["optimizer", "original_optimizer"])
def test_an_optimizer_that_never_called_its_parents_init_is_refused_and_the_inner_one_named(
    net, optimizer, key
):
    outer = Noisy(optimizer, key, is_whole=False)
    with pytest.raises(
        gk.AttachError, match=rf"never called torch.optim.Optimizer.__init__.*attach to its \.{key}, which"
    ):
        gk.attach(outer, None)
    assert not optimizer._optimizer_step_pre_hooks


# -- attaching again --------------------------------------------------------------------------------------------


def test_attaching_again_takes_over(net, optimizer, tmp_path):
    """A cell of a notebook that runs again: the old guard is detached, and its record goes on."""
    path = tmp_path / "run.keel"

    def step():
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = gk.attach(optimizer, gk.ClipByNorm(0.1), model=net, record=path)
    for _ in range(5):
        step()
    second = gk.attach(optimizer, gk.ClipByNorm(0.2), model=net, record=path)
    for _ in range(3):
        step()
    assert (first.step, second.step) == (5, 8)
    assert second.report.clipped_norm == pytest.approx(0.2 * 2**0.5, rel=1e-6)  # two tensors
    second.detach()
    with Reader(path) as run:
        assert run.steps().tolist() == list(range(1, 9))
        assert [(s.first_step, s.policy) for s in run.sessions] == [(1, "norm:0.1"), (6, "norm:0.2")]
        assert run.rollbacks == []


def test_statistics_go_on_under_the_same_policy(net, optimizer):
    first = gk.attach(optimizer, "zclip")
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept = first.state_dict()
    assert gk.attach(optimizer, "zclip").state_dict() == kept
    assert gk.attach(optimizer, "autoclip").state_dict() != kept


def test_a_guard_that_cannot_be_made_leaves_the_old_one(net, optimizer):
    guard = gk.attach(optimizer, gk.ClipByNorm(0.1), model=net)
    with pytest.raises(gk.errors.SelectionError):
        gk.attach(optimizer, gk.ClipByNorm(0.2), model=net, exclude="nothing.of.this.name")
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert guard.report.clipped
    assert net.weight.grad.norm().item() == pytest.approx(0.1, rel=1e-6)


def test_an_accumulator_of_the_old_guard_is_refused(net, optimizer):
    """It would sum up gradients that nobody divides."""
    old = gk.Accumulator(gk.attach(optimizer, None, model=net), 2)
    for micro in old([torch.ones(1, 2)] * 2):
        with micro:
            micro.backward(net(micro.batch).sum(), weight=1)
        break  # a cell that was interrupted
    guard = gk.attach(optimizer, None, model=net)
    assert net.weight.grad is None
    with pytest.raises(gk.AttachError, match="make an Accumulator for the new guard"):
        next(old([torch.ones(1, 2)] * 2)).__enter__()
    new = gk.Accumulator(guard, 2)
    for micro in new([torch.ones(1, 2)] * 2):
        with micro:
            micro.backward(net(micro.batch).sum(), weight=1)
        if micro.closes_window:
            optimizer.step()
    assert guard.report.norm == pytest.approx(3**0.5)


# -- detach ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD-loop", "AdamW-fused", "LBFGS"])
def test_detach_leaves_no_hook_and_no_attribute(name):
    case = BY_NAME[name]
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    attributes = set(vars(optimizer))
    amp = getattr(optimizer, "_step_supports_amp_scaling", None)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.1), model=model)
    case.step(optimizer, lambda: loss(0))
    guard.detach()
    guard.detach()
    assert set(vars(optimizer)) == attributes
    assert getattr(optimizer, "_step_supports_amp_scaling", None) is amp
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    report = guard.report
    case.step(optimizer, lambda: loss(1))
    assert guard.report is report
    copy.deepcopy(optimizer)  # warns of nothing


def test_a_detached_optimizer_can_be_guarded_again(net, optimizer):
    gk.attach(optimizer, gk.ClipByNorm(0.1)).detach()
    guard = gk.attach(optimizer, gk.ClipByNorm(0.2))
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert net.weight.grad.norm().item() == pytest.approx(0.2, rel=1e-6)
    assert guard.step == 1


def test_detach_closes_the_recorders(optimizer):
    class Recorder:
        closed = 0

        def record(self, report):
            pass

        def close(self):
            self.closed += 1

    recorder = Recorder()
    guard = gk.attach(optimizer, None, record=recorder)
    guard.detach()
    assert recorder.closed == 1


def test_a_guard_does_not_keep_its_optimizer_alive(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gk.attach(optimizer, gk.ClipByNorm(1.0), model=net)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_a_second_optimizer_may_take_over_the_parameters(net):
    gk.attach(torch.optim.SGD(net.parameters(), lr=0.1), gk.ClipByNorm(0.1))
    guard = gk.attach(torch.optim.Adam(net.parameters(), lr=0.1), gk.ClipByNorm(0.2))
    net(torch.ones(1, 2)).sum().backward()
    guard.optimizer.step()
    assert net.weight.grad.norm().item() == pytest.approx(0.2, rel=1e-6)


# -- copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copied_optimizer_warns_and_can_be_guarded(optimizer, copied):
    gk.attach(optimizer, gk.ClipByNorm(0.1))
    with pytest.warns(
        gk.errors.UnguardedCopyWarning, match="carries no gradkeel guard and would train unclipped"
    ):
        other = copied(optimizer)
    guard = gk.attach(other, gk.ClipByNorm(0.1))
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    assert guard.report.clipped


class ByDict(torch.optim.SGD):
    """Its state is all of its attributes, as that of plain Python objects is."""

    def __getstate__(self):
        return self.__dict__


class ByDeepCopy(torch.optim.SGD):
    def __getstate__(self):
        return {"all": copy.deepcopy(self.__dict__)}

    def __setstate__(self, state):
        self.__dict__.update(state["all"])


def noted(optimizer, args, kwargs):
    optimizer.noted = True


@pytest.mark.parametrize("kind", [ByDict, ByDeepCopy])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_of_all_attributes_carries_no_guard(net, kind, copied):
    optimizer = kind(net.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(noted)
    attributes = set(vars(optimizer))
    guard = gk.attach(optimizer, gk.ClipByNorm(0.1))
    held = dict(vars(optimizer))
    with pytest.warns(gk.errors.UnguardedCopyWarning):
        other = copied(optimizer)
    assert vars(optimizer) == held
    assert set(vars(other)) == attributes
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    assert other.noted
    assert guard.step == 0
    assert other.param_groups[0]["params"][0].grad.max() == 1.0
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert guard.report.clipped
    again = gk.attach(other, None)
    other.step()
    assert again.step == 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, pickle.dumps, lambda it: torch.save(it, io.BytesIO())]
)
@pytest.mark.parametrize("holder", ["guard", "accumulator", "trainer"])
def test_a_guard_is_saved_by_its_state(net, optimizer, tmp_path, copied, holder):
    guard = gk.attach(optimizer, gk.ClipByNorm(0.1), model=net, record=tmp_path / "run.keel")
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    what = {"guard": guard, "accumulator": gk.Accumulator(guard, steps=2), "trainer": [guard]}[holder]
    if copied is not copy.copy or holder == "guard":
        with pytest.raises(
            TypeError, match=r"a Guard cannot be copied or pickled.*save guard.state_dict\(\)"
        ):
            copied(what)
    copied(guard.state_dict())
    guard.detach()


def test_a_models_copies_are_clean(net, optimizer):
    """The guard watches one parameter; a copy of the model for an average of weights must not be watched too."""
    gk.attach(optimizer, gk.ClipByNorm(0.1), model=net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        other(torch.ones(1, 2)).sum().backward()
        assert other.weight.grad.norm() > 0


def test_state_dict_holds_nothing_of_the_guard(net):
    plain, guarded = (torch.optim.AdamW(net.parameters(), lr=0.1) for _ in range(2))
    gk.attach(guarded, gk.ClipByNorm(0.1), model=net)
    net(torch.ones(1, 2)).sum().backward()
    guarded.step()
    plain.step()
    assert guarded.state_dict().keys() == plain.state_dict().keys()
    assert guarded.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


# -- repr -----------------------------------------------------------------------------------------------------


def test_repr_lists_what_is_guarded_by_what():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "clip": "norm:0.1"}]
    guard = gk.attach(torch.optim.SGD(groups, lr=0.1), "global-norm:1.0", model=model, exclude="0.bias")
    assert repr(guard).splitlines() == [
        "Guard(SGD, step 0, nonfinite='skip')",
        "  main: ClipByGlobalNorm(max_norm=1.0)  # all tensors together; 1 parameter",
        "    0.weight",
        "  group 1: ClipByNorm(max_norm=0.1)  # each tensor separately; 2 parameters",
        "    1.weight",
        "    1.bias",
        "  excluded: measured, not clipped; 1 parameter",
        "    0.bias",
    ]
    assert "measured, not clipped; 2 parameters" in repr(
        gk.attach(torch.optim.SGD(model[0].parameters()), None)
    )


def test_policies_say_what_they_bound():
    assert "each tensor separately" in repr(gk.ClipByNorm(1.0))
    assert "all tensors together" in repr(gk.ClipByGlobalNorm(1.0))
    assert "each entry separately" in repr(gk.ClipByValue(1.0))


def test_summary_prints_what_explain_says(tmp_path, capsys):
    from gradkeel.explain import explain

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model, record=tmp_path / "run.keel")
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    guard.summary()
    printed = capsys.readouterr().out
    guard.detach()
    assert printed.strip() == str(explain(tmp_path / "run.keel")).strip()
    assert "3 steps" in printed


def test_summary_needs_a_record():
    parameter = nn.Parameter(torch.ones(1))
    guard = gk.attach(torch.optim.SGD([parameter], lr=0.1), None)
    with pytest.raises(ValueError, match="record="):
        guard.summary()


def test_the_repr_of_a_guard_of_many_parameters_is_short():
    parameters = [(f"layer{i}", torch.nn.Parameter(torch.ones(1))) for i in range(1000)]
    guard = gk.attach(torch.optim.SGD(parameters, lr=0.1), "norm:1.0")
    words = repr(guard)
    assert "1,000 parameters" in words
    assert "layer9" in words
    assert "... and 990 more" in words
    assert len(words.splitlines()) < 20


def test_an_optimizer_that_is_none_of_torchs_is_told_another_way():
    class Own:  # as fastai's and Pyro's
        def step(self):
            pass

    with pytest.raises(TypeError, match=r"call gradkeel\.clip_grad_norm_\(parameters, bound\) yourself"):
        gk.attach(Own(), "global-norm:1")
