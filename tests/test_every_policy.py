"""One battery over every policy; the rows are in `policy_rows`."""

import io
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradkeel import policies as gp
from gradkeel.norms import GradientNorms
from gradkeel.policies.spec.parse import COMPOSITES, REGISTRY
from policy_rows import GROUPS, ROWS, Run, gradients, seasoned

every = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)

SMALL, LARGE = 1e-4, 50.0


def test_every_registered_policy_has_a_row():
    found = {getattr(row.policy, "spec_name", None) for row in ROWS}
    assert set(REGISTRY) | set(COMPOSITES) <= found


def seasoned_run(row, dtype=torch.float64):
    return Run(row.policy, dtype, seasoned(row)[0])


def cells(row, gradients):
    """The gradients' entries, cell by cell."""
    if row.cell == "global":
        return [torch.cat([g.flatten() for g in gradients.values()])]
    if row.cell == "group":
        return [torch.cat([gradients[name].flatten() for name in group]) for group in GROUPS]
    if row.cell == "tensor":
        return [g.flatten() for g in gradients.values()]
    dim = row.policy.needs.unit_dim
    found = []
    for g in gradients.values():
        found += [unit.flatten() for unit in g.unbind(dim)] if g.dim() > 1 else [g]
    return found


@every
def test_below_the_bound_gradients_stay_bit_identical(row):
    before = gradients(SMALL, seed=1000)
    run = seasoned_run(row)
    after = run.step({name: g.clone() for name, g in before.items()})
    assert run.guard.report.stepped
    same = all(torch.equal(after[name], before[name]) for name in before)
    assert same != row.touches_small
    clamp = run.guard.report.selections[0].decision.clamp
    assert clamp is None or all(bool((g >= clamp[0]).all() and (g <= clamp[1]).all()) for g in after.values())


@every
def test_above_the_bound_the_bound_holds(row):
    run = seasoned_run(row)
    after = run.step(gradients(LARGE, seed=1000))
    report = run.guard.report
    if row.skips:
        assert not report.stepped
        assert after == {}
        return
    decision = report.selections[0].decision
    assert report.clipped
    if decision.clamp is not None:
        low, high = decision.clamp
        assert all(bool((g >= low).all() and (g <= high).all()) for g in after.values())
        return
    p = report.norm_type
    if decision.bound.dim() == 0:
        norms = torch.linalg.vector_norm(torch.cat([g.flatten() for g in after.values()]), p)
    elif row.cell == "group":
        of_group = [torch.linalg.vector_norm(entries, p) for entries in cells(row, after)]
        norms = torch.stack([of_group[i] for i, group in enumerate(GROUPS) for _ in group])
    elif row.cell == "unit" and decision.bound.shape[0] == len(
        after
    ):  # the tightest unit of each tensor is told
        units = [torch.linalg.vector_norm(g.reshape(max(1, g.shape[0]), -1), dim=1) for g in after.values()]
        norms = torch.stack([each.min() for each in units])
    elif decision.bound.shape[0] == len(after):
        norms = torch.stack([torch.linalg.vector_norm(g, p) for g in after.values()])
    else:
        norms = torch.stack([torch.linalg.vector_norm(unit) for unit in cells(row, after)])
    # Roundings of float64 in the norm, the coefficient and the product.
    assert bool((norms <= decision.bound * (1 + 1e-12)).all())


@every
def test_norm_scopes_keep_the_direction(row):
    if row.cell == "value":
        pytest.skip("clamping changes the direction: that is what it is")
    before = gradients(LARGE, seed=1000)
    run = seasoned_run(row)
    after = run.step({name: g.clone() for name, g in before.items()})
    if row.skips:
        assert not run.guard.report.stepped
        return
    for old, new in zip(cells(row, before), cells(row, after), strict=True):
        if old.numel():
            ratio = new.norm() / old.norm()
            assert ratio > 0
            torch.testing.assert_close(new, ratio * old, rtol=1e-12, atol=0)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_gives_the_same_gradients_to_its_rounding(row, dtype):
    exact = seasoned_run(row).step(gradients(LARGE, seed=1000))
    after = seasoned_run(row, dtype).step(gradients(LARGE, seed=1000, dtype=dtype))
    assert set(after) == set(exact)
    for name, entries in after.items():
        assert entries.dtype == dtype
        # Half a unit in the last place for each of two multiplications (units and tensors), and in the coefficient;
        # below the smallest normal number the place is fixed.
        kind = torch.finfo(dtype)
        torch.testing.assert_close(
            entries.double(), exact[name], rtol=1.5 * kind.eps, atol=kind.smallest_normal
        )


@every
def test_a_missing_gradient_is_a_zero_gradient(row):
    whole = gradients(LARGE, seed=1000)
    zero = {name: torch.zeros_like(g) if name in {"conv", "bias"} else g.clone() for name, g in whole.items()}
    missing = {name: g.clone() for name, g in whole.items() if name not in {"conv", "bias"}}
    expected, after = seasoned_run(row).step(zero), seasoned_run(row).step(missing)
    assert all(torch.equal(after[name], expected[name]) for name in after)
    assert bool(expected) == bool(after)


@every
def test_a_sparse_gradient_is_its_dense_one(row):
    dense = gradients(LARGE, seed=1000)
    rows = torch.tensor([[3, 0, 3]])
    values = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(3, 3)
    sparse = torch.sparse_coo_tensor(rows, values, dense["table"].shape, check_invariants=True)
    expected = seasoned_run(row).step(
        {name: g.clone() for name, g in dense.items()} | {"table": sparse.to_dense()}
    )
    after = seasoned_run(row).step(dense | {"table": sparse})
    assert set(after) == set(expected)
    for name, entries in after.items():
        torch.testing.assert_close(entries, expected[name], rtol=1e-14, atol=0)


@every
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_nan_and_inf_leave_no_trace_in_the_state(row, value):
    run = seasoned_run(row)
    bad = gradients(1.0, seed=1000)
    if value == 0.0:
        bad = {name: torch.zeros_like(g) for name, g in bad.items()}
    else:
        bad["conv"][1, 0, 2] = value
    if value == 0.0:
        after = run.step(bad)
        assert run.guard.report.stepped
        assert all(not g.any() for g in after.values())
    else:
        with pytest.warns(UserWarning, match="conv"):
            run.step(bad)
        assert not run.guard.report.stepped
    assert_same_states(run.guard.state_dict(), seasoned(row)[0])


def assert_same_states(state, expected):
    assert state["states"].keys() == expected["states"].keys()
    for label, tensors in expected["states"].items():
        assert tensors.keys() == state["states"][label].keys()
        for key, tensor in tensors.items():
            assert torch.equal(state["states"][label][key], tensor), f"{label} {key}"


@every
def test_only_the_broken_cell_is_kept_out_of_the_statistics(row):
    """On norms alone, as under ``nonfinite="keep"``: no state ever becomes NaN."""
    _, reports = seasoned(row)
    measured = reports[0].measured
    state = row.policy.init(measured)
    for norm in (math.nan, math.inf, 0.0):
        broken = with_norm(measured, norm)
        decision, state = row.policy.decide(broken, state)
        assert not any(torch.isnan(tensor).any() for tensor in state.values())
        for factor in (decision.coefficients, decision.unit_coefficients):
            assert factor is None or bool((torch.isfinite(factor) & (factor > 0)).all())


def with_norm(measured, norm):
    """The same measurement, the first tensor's norm and its units' replaced."""
    norms = measured.norms.clone()
    norms[0] = norm
    units = None if measured.units is None else measured.units.clone()
    if units is not None:
        units[: measured.unit_counts[0]] = norm
    fields = {name: getattr(measured, name) for name in GradientNorms.__slots__}
    total = torch.linalg.vector_norm(norms, measured.norm_type)
    return GradientNorms(**fields | {"norms": norms, "units": units, "total": total})


@every
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(row):
    straight = seasoned_run(row)
    file = io.BytesIO()
    torch.save(straight.guard.state_dict(), file)
    file.seek(0)
    resumed = Run(row.policy, state=torch.load(file, weights_only=True))
    for step, scale in enumerate([1.0, 3.0, 0.5, 20.0, 1.0]):
        left, right = (run.step(gradients(scale, seed=step)) for run in (straight, resumed))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert_same_states(resumed.guard.state_dict(), straight.guard.state_dict())


@every
def test_replay_on_recorded_norms_is_the_live_run(row):
    state_dict, reports = seasoned(row)
    state = row.policy.init(reports[0].measured)
    for report in reports:
        decision, state = row.policy.decide(report.measured, state)
        live = report.decision
        assert decision.clamp == live.clamp
        for name in ("coefficients", "unit_coefficients", "bound"):
            replayed, seen = getattr(decision, name), getattr(live, name)
            # A live step that was skipped keeps its bound only.
            assert name != "bound" or (replayed is None) == (seen is None)
            assert seen is None or torch.equal(replayed, seen)
    for key, tensor in state_dict["states"].get("main", {}).items():
        assert torch.equal(state[key], tensor)


class Tensors(TorchDispatchMode):
    """While somebody watches operations, policies decide by tensors, as on a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class NoHostSync(TorchDispatchMode):
    """Refuses every operation that brings a value to the host, or a value from the host to the device."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "equal",
        "lift_fresh",
        "unique",
        "masked_select",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        masks = name in {"index", "index_put"} and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] if i is not None
        )
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        assert not masks, f"{name} with a mask waits for the device"
        return func(*args, **kwargs or {})


@every
def test_deciding_does_not_sync_the_host(row):
    _, reports = seasoned(row)
    state = row.policy.init(reports[0].measured)
    with Tensors():
        for report in reports[:2]:  # what is made once is made
            _, state = row.policy.decide(report.measured, state)
    with NoHostSync():
        for report in reports[2:5]:
            _, state = row.policy.decide(report.measured, state)


@every
def test_deciding_reads_no_value(row):
    """On the meta device there are none."""
    measured = seasoned(row)[1][0].measured
    fields = {name: getattr(measured, name) for name in GradientNorms.__slots__}
    unread = GradientNorms(
        **{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    )
    state = row.policy.init(unread)
    for _ in range(2):
        decision, state = row.policy.decide(unread, state)
    for part in (decision.coefficients, decision.unit_coefficients, decision.skip):
        assert part is None or part.device.type == "meta"


@every
def test_the_spec_makes_the_policy_again(row):
    if isinstance(row.policy, gp.Clip):
        with pytest.raises(TypeError, match="cannot be written as a spec string"):
            _ = row.policy.spec
        return
    again = gp.parse(row.policy.spec)
    assert again.policy == row.policy
    assert hash(again.policy) == hash(row.policy)
    assert again.spec == row.policy.spec
    excluding = gp.PolicySpec(row.policy, ("*.bias", "head*"))
    assert gp.parse(excluding.spec) == excluding


@every
def test_without_parameters_nothing_happens(row):
    nothing = torch.zeros(0, dtype=torch.float64)
    measured = {"weights": nothing, "units": nothing, "unit_weights": nothing}
    empty = GradientNorms((), nothing, nothing.sum(), row.policy.needs.norm_type, (), 1, **measured)
    decision, _ = row.policy.decide(empty, row.policy.init(empty))
    assert decision.skip is None or not bool(decision.skip)
