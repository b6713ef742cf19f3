"""The trap suite, numbers and words: what is reported is what is applied, for every kind of tensor and model.

Oracle: float64, or torch itself. `test_traps` holds the rest of what needs one process.
"""

import copy
import math
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import gradkeel as gk
import reference
from gradkeel.record import Reader

quiet = pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
both_paths = pytest.mark.parametrize("switch", ["on", "off"])


def graded(*gradients):
    """Parameters of zeros with these very gradients, not copies of them."""
    parameters = [nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


# -- 43: conjugate and negative views ------------------------------------------------------------------------------


def product(w, x):
    return (w.conj() * x).real.sum()


def matrix_product(w, x):
    return (w.mH @ x).real.square().sum()


def adjoint(w, x):
    return torch.linalg.matrix_norm(torch.adjoint(w) @ x).square()


@both_paths
@pytest.mark.parametrize("forward", [product, matrix_product, adjoint])
@pytest.mark.parametrize("spec", ["global-norm:0.5", "norm:0.5", "value:-0.1,0.3", "agc:0.1", "none"])
def test_43_conjugate_gradients(forward, spec, switch, found):
    found.setenv("GRADKEEL_NATIVE", switch)
    torch.manual_seed(3)
    start, x = torch.randn(3, 3, dtype=torch.complex64), torch.randn(3, 3, dtype=torch.complex64)
    results = []
    for is_resolved in (False, True):
        w = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([w], lr=1.0)
        guard = gk.attach(optimizer, spec)
        forward(w, x).backward()
        if is_resolved:
            w.grad = w.grad.resolve_conj()
        optimizer.step()
        applied = torch.linalg.vector_norm(start - w.detach())
        # one float32 subtraction of numbers of size 1
        assert guard.report.clipped_norm == pytest.approx(float(applied), rel=1e-5)
        results.append((w.detach(), guard.report.norm, guard.report.coefficient))
    (got, *told), (wanted, *right) = results
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    assert told == pytest.approx(right, rel=1e-12)


@both_paths
@pytest.mark.parametrize("clip", [gk.clip_grad_norm_, gk.clip_grad_value_])
@pytest.mark.parametrize("make", [torch.conj, lambda z: torch.conj(z).imag, lambda z: torch.conj(z).T])
def test_43_views_whose_signs_are_not_stored(clip, make, switch, found):
    found.setenv("GRADKEEL_NATIVE", switch)
    gradient = make(torch.tensor([[3.0 + 4.0j, -1.0 + 2.0j]]))
    (seen,), (plain,) = graded(gradient), graded(gradient.resolve_conj().resolve_neg().clone())
    for parameter in (seen, plain):
        clip([parameter], 1.5)
    torch.testing.assert_close(seen.grad.resolve_conj().resolve_neg(), plain.grad, rtol=0, atol=0)


def test_43_conjugate_gradients_in_a_window():
    w = nn.Parameter(torch.tensor([1.0 + 2.0j, 0.5 - 1.0j]))
    x, start = torch.tensor([30.0 + 40.0j, 1.0j]), w.detach().clone()
    optimizer = torch.optim.SGD([w], lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    for micro in gk.Accumulator(guard, steps=2)([x, 2 * x]):
        with micro:
            micro.backward((w.conj() * micro.batch).real.sum(), weight=1)
    optimizer.step()
    norm = 1.5 * float(torch.linalg.vector_norm(x))
    assert guard.report.norm == pytest.approx(norm, rel=1e-6)
    assert float(torch.linalg.vector_norm(w.detach() - start)) == pytest.approx(1.0, rel=1e-6)


# -- 59: mixed lists, gradients in one place, tiny factors ----------------------------------------------------------


@both_paths
@pytest.mark.parametrize(
    "views", [lambda g: (g, g), lambda g: (g, g.view(2, 1)), lambda g: (g, g.view(1, 2), g)]
)
def test_59_gradients_in_one_place_are_multiplied_once(views, switch, found):
    found.setenv("GRADKEEL_NATIVE", switch)
    given = torch.tensor([3.0, 4.0])
    parameters = graded(*views(given))
    norm = gk.clip_grad_norm_(parameters, 1.0)
    assert norm == pytest.approx(5.0 * math.sqrt(len(parameters)), rel=1e-6)
    assert reference.norm([p.grad for p in parameters]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("exclude", [[], ["1"]])
def test_59_gradients_of_autograd_grad_in_one_place(exclude, fused):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p, q], lr=1.0, fused=fused)
    gk.attach(optimizer, gk.ClipByGlobalNorm(0.1), exclude=exclude)
    p.grad, q.grad = torch.autograd.grad((p + q).square().sum(), [p, q])
    assert p.grad is q.grad  # as torch gives them
    optimizer.step()
    applied = [1.0 - p.detach(), 1.0 - q.detach()]
    assert reference.norm(applied[: 2 - len(exclude)]) == pytest.approx(0.1, rel=1e-5)
    assert not exclude or torch.equal(applied[1], torch.full((2,), 4.0))


@both_paths
@pytest.mark.parametrize("spec", ["global-norm:1e-8", "norm:1e-8", "agc:1e-8"])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float64, 1e300)]
)
def test_59_a_factor_that_is_nothing_in_float32(dtype, size, spec, switch, found):
    found.setenv("GRADKEEL_NATIVE", switch)
    w = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    optimizer = torch.optim.SGD([w], lr=1.0)
    guard = gk.attach(optimizer, spec)
    w.grad = torch.full((2, 2), size, dtype=dtype)
    optimizer.step()
    # two roundings of bfloat16's 8 digits, or of float32
    rel = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    assert reference.norm([w.grad]) == pytest.approx(guard.report.clipped_norm, rel=rel)
    assert guard.report.clipped_norm == pytest.approx(
        1e-11 * math.sqrt(2) if "agc" in spec else 1e-8, rel=1e-6
    )


@pytest.mark.parametrize("fused", [True, False])
def test_59_a_tiny_factor_is_not_left_to_a_float32_kernel(fused):
    w = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([w], lr=1.0, fused=fused)
    gk.attach(optimizer, gk.ClipByGlobalNorm(1e-8))
    w.grad = torch.full((4,), 1e38)
    optimizer.step()
    assert reference.norm([w]) == pytest.approx(1e-8, rel=1e-6)
    (w,) = graded(torch.full((4,), 1e38))
    gk.clip_grad_norm_([w], 1e-8)
    assert reference.norm([w.grad]) == pytest.approx(1e-8, rel=1e-6)


@both_paths
def test_59_mixed_dtypes_in_one_list(switch, found):
    found.setenv("GRADKEEL_NATIVE", switch)
    given = [
        torch.tensor(3.0, dtype=torch.bfloat16),  # without dimensions
        torch.tensor(-4.0, dtype=torch.float16),
        torch.tensor([12.0]),
        torch.tensor([[84.0]], dtype=torch.float64),
        torch.tensor([36.0 + 77.0j]),
    ]
    parameters = graded(*given)
    total = math.sqrt(9 + 16 + 144 + 84**2 + 85**2)
    wanted = reference.scaled(given, total / 2 / (total + 1e-6))
    norm = gk.clip_grad_norm_(parameters, total / 2)
    assert (norm.dtype, float(norm)) == (torch.float64, pytest.approx(total, rel=1e-12))
    for parameter, right in zip(parameters, wanted, strict=True):
        # one rounding may fall on either side
        torch.testing.assert_close(parameter.grad, right, rtol=2.0**-8, atol=0)


@pytest.mark.full
def test_59_more_entries_than_an_int32_counts():
    count = 2**31 + 3
    (parameter,) = graded(torch.ones(1, dtype=torch.bfloat16).expand(count).contiguous())
    assert float(gk.clip_grad_norm_([parameter], math.sqrt(count) / 2)) == pytest.approx(
        math.sqrt(count), rel=1e-6
    )
    assert parameter.grad[-3:].tolist() == [0.5, 0.5, 0.5]


# -- equal names, compiled names, models that move ------------------------------------------------------------------


def test_50_two_networks_of_equal_names_are_told_apart(tmp_path):
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    for groups in (
        [*first.named_parameters(), *second.named_parameters()],
        [{"params": first.named_parameters()}, {"params": second.named_parameters()}],
    ):
        optimizer = torch.optim.SGD(groups, lr=0.1)
        guard = gk.attach(optimizer, gk.ClipByNorm(1.0), record=tmp_path / "run.keel", exclude="*.bias")
        (first(torch.ones(1, 2)) + 10 * second(torch.ones(1, 2))).sum().backward()
        optimizer.step()
        names = ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert sorted(guard.report.norms) == sorted(names)
        assert guard.report.norms["1.weight"] == pytest.approx(10 * guard.report.norms["0.weight"], rel=1e-6)
        guard.detach()
        with Reader(tmp_path / "run.keel") as run:
            assert sorted(run.names) == sorted(names)
        (tmp_path / "run.keel").unlink()
        optimizer.zero_grad()


def test_50_a_number_before_a_name_takes_nobodys_name():
    named = [(name, nn.Parameter(torch.ones(1))) for name in ("w", "w", "0.w", "1.w")]
    guard = gk.attach(torch.optim.SGD(named, lr=0.1), None)
    assert guard.names == ("2.w", "3.w", "0.w", "1.w")


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("pattern", ["0.bias", "_orig_mod.0.bias"])
def test_50_compiled_models_have_their_own_names(pattern, is_named):
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), backend="eager")
    parameters = model.named_parameters() if is_named else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = gk.attach(optimizer, gk.ClipByNorm(1.0), model=model, exclude=pattern)
    assert sorted(guard.names) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert guard.report.selections[-1].measured.names == ("0.bias",)


def test_50_wrapped_models_have_their_own_names():
    """Lightning Fabric's wrapper holds the model by this name; other names that end in it are the user's."""
    inner = nn.ModuleDict({"head": nn.Linear(2, 1), "my_forward_module": nn.Linear(2, 1)})
    model = nn.ModuleDict({"_forward_module": inner})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, gk.ClipByNorm(1.0), model=model, exclude="head.*")
    assert sorted(guard.names) == [
        "head.bias",
        "head.weight",
        "my_forward_module.bias",
        "my_forward_module.weight",
    ]
    assert guard.report.selections[-1].measured.names == ("head.weight", "head.bias")


def test_50_model_moves_after_attach_by_swapping_its_tensors():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.1), model=model)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            before = copy.deepcopy(model.state_dict())
            (100 * model(torch.ones(1, 2, dtype=dtype))).sum().backward()
            optimizer.step()
            moved = [old - new for old, new in zip(before.values(), model.state_dict().values(), strict=True)]
            assert reference.norm(moved) == pytest.approx(0.1, rel=1e-5)
            assert guard.report.clipped
            optimizer.zero_grad()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def test_50_lazy_parameters_are_refused_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        gk.AttachError, match=r"a lazy parameter has no shape yet.*run one batch through the model"
    ):
        gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    model(torch.ones(1, 3)).sum().backward()
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    optimizer.step()
    assert guard.report.stepped


# -- 49, 58: what may be said, and what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, gk.ClipByGlobalNorm(1.0)])
def test_49_measuring_only_gives_no_advice(policy):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gk.attach(optimizer, policy)
    (100 * model(torch.ones(1, 2))).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.warns(gk.errors.DoubleClippingWarning) as said:
        optimizer.step()
    (words,) = [str(one.message) for one in said]
    assert ("remove it" in words) == ("the guard clips already" in words) == (policy is not None)
    assert ("its norms are of what that has left" in words) == (policy is None)


def test_58_inner_loops_are_refused():
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w.clone()], lr=0.1, differentiable=True)
    with pytest.raises(
        gk.AttachError, match=r"differentiable=True.*no part of that graph; scale them in the graph"
    ):
        gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    assert not optimizer._optimizer_step_pre_hooks


# -- 55: where non-finite begins -------------------------------------------------------------------------------------


class Root(nn.Module):
    """Its value is 0 and its derivative is not finite; in the second half of the entries it does nothing."""

    def forward(self, x):
        return x + (x - x).abs().sqrt()


def layers(place):
    """Five layers, with what makes a NaN in backward behind the layer of this number, or without it."""
    torch.manual_seed(0)
    found = []
    for i in range(5):
        found.append((f"layer{i}", nn.Linear(3, 3, bias=False)))
        if i == place:
            found.append(("root", Root()))
    return nn.Sequential(OrderedDict(found))


@quiet
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("is_grouped", [False, True])
def test_55_nan_is_located(place, is_grouped, tmp_path):
    model = layers(place)
    parameters = list(model.parameters())
    if is_grouped:  # in another order than the model's, and under several selections
        groups = [
            {"params": parameters[3:]},
            {"params": parameters[:2], "clip": "norm:1"},
            {"params": parameters[2:3]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        guard = gk.attach(
            optimizer, "global-norm:1", model=model, exclude="layer1*", record=tmp_path / "run.keel"
        )
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        guard = gk.attach(optimizer, "global-norm:1", model=model, record=tmp_path / "run.keel")
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    wanted = f"step 1: the gradient of 'layer{place}.weight' is not finite (NaN)"
    assert guard.report.reason == wanted
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.skips() == [(1, wanted)]


@quiet
def test_55_without_a_model_the_optimizers_order_counts():
    model = layers(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, "global-norm:1")
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert guard.report.reason == "step 1: the gradient of '2' is not finite (NaN)"


@quiet
@pytest.mark.parametrize(("factor", "kind"), [(math.nan, "NaN"), (math.inf, "inf")])
def test_55_all_at_once_means_the_loss_or_the_batch(factor, kind):
    model = layers(None)
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, "global-norm:1", model=model)
    (model(torch.ones(1, 3)).sum() * factor).backward()
    optimizer.step()
    assert guard.report.reason == f"step 1: all 4 gradients are not finite ({kind}): it came with the loss"


# -- a checkout that is not installed --------------------------------------------------------------------------------

NOT_INSTALLED = """
import importlib.metadata as metadata, sys
real = metadata.distribution
def distribution(name):
    if name == "gradkeel":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
import torch, gradkeel as gk
from gradkeel.record import Reader
w = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([w], lr=0.1)
guard = gk.attach(optimizer, "global-norm:1", record=sys.argv[1])
w.grad = torch.ones(2)
optimizer.step()
guard.detach()
with Reader(sys.argv[1]) as run:
    assert len(run) == 1 and run.stepped().all()
"""


def test_50_a_checkout_that_is_not_installed_records(tmp_path):
    source = str(Path(gk.__file__).parents[1])
    command = [sys.executable, "-W", "error", "-c", NOT_INSTALLED, str(tmp_path / "run.keel")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": source}, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_49_a_guard_that_measures_says_nothing_where_nobody_clips():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gk.attach(optimizer, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
