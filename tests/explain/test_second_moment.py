"""Adam's second moment behind its gradients: measured with the samples of the weights, and a cause of its own."""

import pytest
import torch
from torch import nn

import gradkeel as gk

STEPS, JUMP = 180, 120


def trained(path, weight, kind=torch.optim.AdamW, **options):
    """A regression; from step ``JUMP`` on ``weight(step)`` multiplies the loss that is differentiated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    inputs = torch.randn(4096, 10)
    targets = inputs.sum(dim=1, keepdim=True)
    guard = gk.attach(optimizer, None, model=model, record=path)
    for step in range(1, STEPS + 1):
        rows = torch.randint(4096, (32,))
        loss = nn.functional.mse_loss(model(inputs[rows]), targets[rows])
        (loss * weight(step)).backward()
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    with gk.record.Reader(path) as run:
        return run.scalar("second_moment_lag"), gk.explain.explain(path)


@pytest.mark.parametrize("beta2", [0.999, 0.9999])
def test_gradients_that_grow_for_good_are_ahead_of_it(tmp_path, beta2):
    lags, found = trained(
        tmp_path / "run.keel", lambda step: 100.0 if step >= JUMP else 1.0, betas=(0.9, beta2)
    )
    assert lags[:100].nan_to_num(1.0).median() < 2
    assert lags[JUMP - 1] > 10
    assert found.diagnosis.cause == "second_moment_lag"


@pytest.mark.parametrize("weight", [lambda step: 1.0, lambda step: 100.0 if step == JUMP else 1.0])
def test_a_single_batch_or_none_is_no_lag(tmp_path, weight):
    _, found = trained(tmp_path / "run.keel", weight)
    assert found.diagnosis.cause is None


def test_what_it_is(tmp_path):
    """By hand in float64: after steps with gradients g1, g2 the third is compared with their bias-corrected mean."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter], lr=1e-3, betas=(0.9, 0.99))
    guard = gk.attach(optimizer, "global-norm:2.0", record=tmp_path / "run.keel")
    gradients = [torch.tensor(values) for values in ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [6.0, 8.0, 0.0])]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    guard.detach()
    moment = (0.01 * 0.99 * gradients[0].double() ** 2 + 0.01 * gradients[1].double() ** 2) / (1 - 0.99**2)
    with gk.record.Reader(tmp_path / "run.keel") as run:
        lags = run.scalar("second_moment_lag")
    assert lags[0].isnan()  # nothing is remembered yet
    assert float(lags[2]) == pytest.approx(2.0 / float(moment.sum().sqrt()), rel=1e-5)  # clipped from 10 to 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_without_a_second_moment_have_none(tmp_path, kind):
    lags, _ = trained(tmp_path / "run.keel", lambda step: 1.0, kind)
    assert lags.isnan().all()


def lag_of(tmp_path, optimizer, steps, policy=None):
    """The lag at each step, and by hand in float64: gradients as applied, over moments of what has a gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    guard = gk.attach(optimizer, policy, record=tmp_path / "run.keel")
    expected = []
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        squares = moments = 0.0
        known = {
            p: (state.get("max_exp_avg_sq", state["exp_avg_sq"]).double().sum(), float(state["step"]))
            for p, state in optimizer.state.items()
        }
        optimizer.step()
        for parameter in parameters:
            if parameter.grad is not None and parameter in known:
                moment, made = known[parameter]
                squares += float(parameter.grad.double().square().sum())
                moments += float(moment) / (1 - optimizer.param_groups[0]["betas"][1] ** made)
        expected.append((squares / moments) ** 0.5 if moments else torch.nan)
    guard.detach()
    with gk.record.Reader(tmp_path / "run.keel") as run:
        return run.scalar("second_moment_lag").tolist(), pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_only_what_has_a_gradient_counts_by_its_own_steps(tmp_path):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(4, 3)) for _ in range(2)]
    steps = [(torch.randn(4, 3) if i in (0, 8) else None, torch.randn(4, 3)) for i in range(10)]
    found, expected = lag_of(tmp_path, torch.optim.Adam(parameters), steps)
    assert found == expected


def test_clipped_units_count_as_they_are_applied(tmp_path):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))]
    scales = torch.tensor([[100.0], [1.0], [1.0], [1e-3]])
    steps = [(torch.randn(4, 3) * scales, torch.randn(4)) for _ in range(5)]
    found, expected = lag_of(tmp_path, torch.optim.Adam(parameters), steps, "agc:0.3")
    assert found == expected


def test_amsgrad_divides_by_the_highest(tmp_path):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(50))], betas=(0.9, 0.9), amsgrad=True)
    steps = [(torch.randn(50) * (1000.0 if i < 5 or i > 77 else 1.0),) for i in range(80)]
    found, expected = lag_of(tmp_path, optimizer, steps)
    assert found == expected
    assert found[78] < 2


class Strange(torch.optim.Optimizer):
    """Keeps something else under Adam's names."""

    def __init__(self, parameters, **state):
        super().__init__(parameters, {"lr": 0.1, "betas": state.pop("betas", (0.9, 0.99))})
        self.kept = state

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"step": 1, "exp_avg_sq": torch.ones(3)} | self.kept


@pytest.mark.parametrize(
    "state",
    [
        {"exp_avg_sq": [1.0, 1.0, 1.0]},
        {"exp_avg_sq": torch.ones(3, dtype=torch.uint8)},
        {"step": None},
        {"betas": None},
        {"betas": (0.9,)},
        {"betas": (0.9, "0.99")},
        {"betas": (0.9, torch.ones(2))},
        {"betas": (0.9, 7.0), "step": 1e6},
        {"betas": (0.9, 0.0), "step": -1},
        {"step": torch.tensor([1.0, 2.0])},
        {"step": torch.tensor(1.0, device="meta")},
        {"betas": (0.9, torch.tensor(0.99, device="meta"))},
        {"betas": (0.9, 0.99j)},
    ],
)
def test_what_other_optimizers_keep_under_the_names_ends_no_record(tmp_path, state):
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = Strange([parameter], **state)
    guard = gk.attach(optimizer, None, record=tmp_path / "run.keel")
    for _ in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step()
    guard.detach()
    with gk.record.Reader(tmp_path / "run.keel") as run:
        assert len(run) == 3


class ForMatrices(torch.optim.Adam):
    """Adam for matrices; of vectors it keeps nothing that has names."""

    def __init__(self, matrix, vector, kept):
        super().__init__([matrix])
        self.vector, self.kept = vector, kept
        self.add_param_group({"params": [vector]})

    def step(self, closure=None):
        gradient, self.vector.grad = self.vector.grad, None
        super().step(closure)
        self.vector.grad = gradient
        self.state[self.vector] = self.kept


@pytest.mark.parametrize("kept", [None, (), 0])
def test_a_parameter_of_which_nothing_is_kept_is_passed_over(tmp_path, kept):
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    guard = gk.attach(ForMatrices(matrix, vector, kept), None, record=tmp_path / "run.keel")
    for size in (1.0, 1.0, 10.0):
        matrix.grad, vector.grad = torch.full((2, 2), size), torch.ones(3)
        guard.optimizers[0].step()
    guard.detach()
    with gk.record.Reader(tmp_path / "run.keel") as run:
        assert run.scalar("second_moment_lag")[1:].tolist() == pytest.approx([1.0, 10.0], rel=1e-5)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor(3.0), torch.tensor([3.0])])
def test_whatever_counts_the_steps(tmp_path, step):
    parameter = nn.Parameter(torch.zeros(3))
    guard = gk.attach(Strange([parameter], step=step), None, record=tmp_path / "run.keel")
    for _ in range(2):
        parameter.grad = torch.full((3,), 2.0)
        guard.optimizers[0].step()
    guard.detach()
    with gk.record.Reader(tmp_path / "run.keel") as run:
        expected = (12 / (3 / (1 - 0.99**3))) ** 0.5
        assert float(run.scalar("second_moment_lag")[1]) == pytest.approx(expected, rel=1e-9)


def test_a_step_that_is_made_again_has_its_own(tmp_path):
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    guard = gk.attach(optimizer, None, record=tmp_path / "run.keel")
    for size in (1.0, 1.0, 1.0):
        parameter.grad = torch.full((3,), size)
        optimizer.step()
    guard.load_state_dict(guard.state_dict() | {"step": 2})
    parameter.grad = torch.full((3,), 1000.0)
    optimizer.step()
    guard.detach()
    with gk.record.Reader(tmp_path / "run.keel") as run:
        assert float(run.scalar("second_moment_lag")[2]) == pytest.approx(1000.0, rel=1e-5)
        assert run.weight_samples()[0].tolist() == [1, 2, 3]
