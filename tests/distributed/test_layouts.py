"""Every policy on every layout against one process: the norms, what is done, and bits that are alike on all ranks."""

import dataclasses
import functools
import hashlib
import io
import math

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import gradkeel as gk
from gradkeel import policies as gp
from policy_rows import GROUPS, ROWS, SHAPES, Run, gradients, seasoned, weights

from tests.distributed import layouts
from tests.distributed.layouts import LAYOUTS

SCALES = (1e-4, 50.0, 1.0)  # below every bound, above every one, and in between

cases = [
    pytest.param(count, layout, "as they are", id=f"{count}-{layout.__name__}")
    for count in LAYOUTS
    for layout in LAYOUTS[count]
]


def under(norm_type):
    """The rows whose policies are one clip, under another norm."""
    for row in ROWS:
        clip = getattr(row.policy, "parts", row.policy)
        if isinstance(clip, gp.Clip):
            yield dataclasses.replace(row, policy=dataclasses.replace(clip, norm_type=norm_type))


BATTERIES = {"as they are": ROWS, "1-norm": [*under(1.0)], "inf-norm": [*under(math.inf)]}
# Parts of rows, empty parts, interleaved rows, replicas, plain pieces, parameters of other ranks.
OTHER_NORMS = {
    2: [layouts.column_shards, layouts.experts, layouts.partial_gradients],
    4: [layouts.shards, layouts.both_dims, layouts.same_dim_twice, layouts.hybrid, layouts.sharded_stages],
}
cases += [
    pytest.param(count, layout, kind, id=f"{count}-{layout.__name__}-{kind}")
    for kind in ("1-norm", "inf-norm")
    for count, chosen in OTHER_NORMS.items()
    for layout in chosen
]


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class SpreadRun:
    """The battery's run, with parameters laid out over ranks."""

    def __init__(self, policy, layout, state=None):
        self.layout = layout
        placed = {name: layout.place(name, value) for name, value in weights().items()}
        self.parameters = {name: torch.nn.Parameter(p) for name, p in placed.items() if p is not None}
        groups = [
            {"params": [(name, self.parameters[name]) for name in group if name in self.parameters]}
            for group in GROUPS
        ]
        self.optimizer = torch.optim.SGD(groups, lr=1e-30, foreach=False)
        self.guard = gk.attach(self.optimizer, policy, **layout.arguments)
        if state is not None:
            self.guard.load_state_dict(state)

    def step(self, placed):
        for name, parameter in self.parameters.items():
            parameter.grad = placed[name].clone()
        self.optimizer.step()
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def error(self, left, expected):
        """The largest relative difference between the gradients here and the whole ones."""
        if left.keys() != expected.keys() & self.parameters.keys():
            return float("inf")
        errors = [0.0]
        for name, gradient in left.items():
            mine, wanted = local(gradient), local(self.layout.place(name, expected[name]))
            if wanted.numel():
                errors.append(float((mine - wanted).abs().max() / expected[name].abs().max()))
        return max(errors)


def digest(report):
    """Equal only for the same norms and decisions, bit by bit."""
    result = hashlib.sha256()
    for selection in report.selections:
        measured, decision = selection.measured, selection.decision
        for tensor in (
            *(
                measured.norms,
                measured.total,
                measured.weights,
                measured.units,
                measured.unit_weights,
                measured.peaks,
            ),
            *(decision.coefficients, decision.unit_coefficients, decision.skip, decision.bound),
        ):
            if tensor is not None:
                result.update(str(tensor.tolist()).encode())
    return result.hexdigest()


def said(row, scale, report):
    """What a report says of a step of a row."""
    return {
        "row": f"{row.id} at {scale}",
        "norm": report.norm,
        "norms": report.norms,
        "coefficient": report.coefficient,
        "verdict": (report.clipped, report.stepped, report.reason),
        "sizes": report.selections[0].measured.sizes,
    }


@functools.cache
def alone(kind):
    """What one process finds, for each row and step; and, stored, each row's state with the gradients that are left."""
    found, stored = [], []
    for row in BATTERIES[kind]:
        state = seasoned(row)[0]
        run, left = Run(row.policy, state=state), []
        for seed, scale in enumerate(SCALES):
            left.append(run.step(gradients(scale, seed)))
            found.append(said(row, scale, run.guard.report))
        stored.append((state, left))
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    return found, buffer.getvalue()


@functools.cache
def loaded(stored):
    """Once for all layouts of a rank's process."""
    return torch.load(io.BytesIO(stored), weights_only=True)


def battery(rank, count, make_layout, kind, stored):
    """For each row and step: what this rank finds, and how far its gradients are from those of one process."""
    layout = make_layout(rank, count)
    given = [
        {name: layout.gradient(name, whole) for name, whole in gradients(scale, seed).items()}
        for seed, scale in enumerate(SCALES)
    ]
    found = []
    for row, (state, wanted) in zip(BATTERIES[kind], loaded(stored), strict=True):
        run = SpreadRun(row.policy, layout, state)
        for scale, placed, expected in zip(SCALES, given, wanted, strict=True):
            left = run.step(placed)
            report = run.guard.report
            found.append(
                said(row, scale, report) | {"error": run.error(left, expected), "digest": digest(report)}
            )
    return found


@pytest.mark.parametrize(("count", "layout", "kind"), cases)
def test_layouts(ranks, count, layout, kind):
    expected, stored = alone(kind)
    # Sums of the same float64 numbers in another order.
    close = functools.partial(pytest.approx, rel=1e-12, abs=1e-300)
    for wanted, *answer in zip(expected, *ranks(count, battery, count, layout, kind, stored), strict=True):
        for one in answer:
            assert one["norm"] == close(wanted["norm"]), wanted["row"]
            assert one["norms"] == close(wanted["norms"]), wanted["row"]
            assert one["coefficient"] == close(wanted["coefficient"]), wanted["row"]
            assert one["verdict"] == wanted["verdict"], wanted["row"]
            assert one["sizes"] == wanted["sizes"]
            assert one["error"] < 1e-12, wanted["row"]
        assert len({one["digest"] for one in answer}) == 1, wanted["row"]


def messages(rank, count, make_layout):
    """How many collectives two steps cost."""
    run = SpreadRun(gp.AdaptiveGradientClip(0.01), make_layout(rank, count))
    counts = []
    for seed in range(2):
        for name, parameter in run.parameters.items():
            parameter.grad = run.layout.gradient(name, gradients(1.0, seed)[name])
        with CommDebugMode() as mode:
            run.optimizer.step()
        counts.append(mode.get_total_counts())
    return counts


@pytest.mark.parametrize(
    ("count", "layout"),
    [pytest.param(n, one, id=f"{n}-{one.__name__}") for n in LAYOUTS for one in LAYOUTS[n]],
)
def test_one_collective(ranks, count, layout):
    # Nothing is split where there is one shard or none; a partial gradient is reduced by a collective of its own.
    expected = {layouts.replicas: 0, layouts.partial_gradients: len(SHAPES)}.get(layout, 1)
    expected = 0 if (count, layout) == (2, layouts.hybrid) else expected
    assert ranks(count, messages, count, layout) == [[expected, expected]] * count


def test_the_layouts_have_empty_pieces():
    assert SHAPES["conv"][0] < 4
