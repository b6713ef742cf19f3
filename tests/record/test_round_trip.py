"""What goes into a record comes out of it, for every kind of policy, through a real guard."""

import contextlib
import math
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel import policies as gp
from gradkeel.guard import SkipReason
from gradkeel.policies import parse
from gradkeel.record import Reader, Recorder
from gradkeel.record.schema import SERIES, TABLES


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


SKIPS_EVERYTHING = gp.Clip("global", gp.Constant(1e-9), gp.SkipAbove())


def train(path, policy, steps=8, *, spoil=(), optimizer=None, log=True, **options):
    """Train for a few steps; returns what the guard reported at each."""
    model = network()
    optimizer = (optimizer or (lambda m: torch.optim.SGD(m.parameters(), lr=0.5)))(model)
    guard = gk.attach(optimizer, policy, model=model, record=path, **options)
    seen = []
    for step in range(1, steps + 1):
        loss = (model(torch.randn(6, 3)) ** 2).sum() * (math.nan if step in spoil else 1.0)
        loss.backward()
        if log:
            guard.log(loss=loss, accuracy=step / 10)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(guard.report)
    guard.detach()
    return seen


@pytest.mark.parametrize(
    "policy",
    [
        None,
        "global-norm:0.5",
        "norm:0.2",
        "global-norm:0.5,norm_type=inf",
        "agc:0.05",
        "zclip",
        "skip-step+norm:0.2",
    ],
)
def test_record_equals_the_reports(tmp_path, policy):
    reports = train(tmp_path / "run.keel", policy)
    with Reader(tmp_path / "run.keel") as run:
        assert run.names == ("0.weight", "0.bias", "2.weight", "2.bias")
        assert run.policy == parse(policy or "none").spec
        assert run.norm_type == reports[0].norm_type
        assert run.steps().tolist() == [report.step for report in reports]
        # Bit-equal: norms are float64 from the measurement to the file.
        assert run.totals().tolist() == [report.norm for report in reports]
        assert run.coefficients().tolist() == [report.coefficient for report in reports]
        assert run.clipped().tolist() == [report.clipped for report in reports]
        assert run.stepped().all()
        assert not run.nonfinite().any()
        assert run.norms().tolist() == [list(report.norms.values()) for report in reports]
        assert run.losses().tolist() == [float(report.scalars["loss"]) for report in reports]
        assert run.scalar("accuracy").tolist() == [step / 10 for step in range(1, 9)]
        assert run.scalar("lr").tolist() == [0.5] * 8
        assert run.scalar_names == ["accuracy", "loss", "lr"]
        # One multiplication or one root of a sum may round differently on the way to the clipped norm.
        torch.testing.assert_close(
            run.clipped_totals().tolist(), [report.clipped_norm for report in reports], rtol=1e-12, atol=0
        )
        assert run.parameter_coefficients().tolist() == [
            list(report.selections[0].coefficients.values()) for report in reports
        ]


def test_training_is_the_same_with_and_without_a_record(tmp_path):
    results = []
    for record in (None, tmp_path / "run.keel"):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.5), model=model, record=record)
        for _ in range(120):
            model(torch.randn(6, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        guard.detach()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_value_clip_is_measured_again_for_the_record(tmp_path):
    reports = train(tmp_path / "run.keel", gk.ClipByValue(0.1))
    with Reader(tmp_path / "run.keel") as run:
        assert run.clipped().any()
        assert run.clipped().tolist() == [report.clipped for report in reports]
        assert (run.clipped_totals() < run.totals()).all()
        # 32 entries of at most 0.1 each (a little more in float32).
        assert (run.clipped_totals() <= 0.1 * math.sqrt(32) + 1e-6).all()
        peaks = run.series("peaks")
        assert peaks.shape == (8, 4, 2)
        assert (peaks[..., 0] <= peaks[..., 1]).all()
        assert run.bounds().tolist() == pytest.approx([0.1] * 8)  # stored as a float64 on the way


@pytest.mark.parametrize("spec", ["warmup:5/value:0.001/global-norm:1000", "warmup:3/agc:0.001/norm:1000"])
def test_a_policy_that_changes_its_form_within_a_batch(tmp_path, spec):
    reports = train(tmp_path / "run.keel", spec)
    with Reader(tmp_path / "run.keel") as run:
        assert run.clipped().tolist() == [report.clipped for report in reports]
        assert set(run.clipped().tolist()) == {True, False}
        # A past report cannot measure clamped gradients again; the record did so in time.
        expected = [report.clipped_norm for report in reports]
        clipped = run.clipped_totals().tolist()
        assert not any(math.isnan(total) for total in clipped)
        assert None not in expected[5:]
        # One multiplication or one root of a sum may round differently.
        assert clipped == pytest.approx(
            [c if e is None else e for c, e in zip(clipped, expected, strict=True)], rel=1e-12
        )


def test_what_is_clipped_beside_a_coefficient_that_is_not_finite_is_recorded_as_clipped(tmp_path):
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    guard = gk.attach(optimizer, "agc:0.01", nonfinite="keep", record=tmp_path / "run.keel")
    reports = []
    for spoiled in (1.0, math.nan, 1.0, 1.0):
        first.grad, second.grad = torch.full((2,), spoiled), torch.ones(2)
        optimizer.step()
        reports.append(guard.report)
    guard.detach()
    assert math.isnan(reports[-1].coefficient)  # the weights are
    with Reader(tmp_path / "run.keel") as run:
        assert run.clipped().tolist() == [report.clipped for report in reports] == [True] * 4


def test_skipped_steps_are_recorded_with_their_reason(tmp_path):
    with pytest.warns(gk.GradkeelWarning, match="not finite"):
        train(tmp_path / "run.keel", gk.ClipByGlobalNorm(1.0), spoil={3})
    with Reader(tmp_path / "run.keel") as run:
        assert run.stepped().tolist() == [step != 3 for step in range(1, 9)]
        assert run.nonfinite().tolist() == [step == 3 for step in range(1, 9)]
        assert [step for step, _ in run.skips()] == [3]
        assert "all 4 gradients are not finite (NaN)" in run.skips()[0][1]
        assert run.coefficients()[2] == 1
        assert math.isnan(run.totals()[2])


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize(
    ("policy", "spoil", "kind"),
    [("global-norm:1.0", {3}, SkipReason.NONFINITE), (SKIPS_EVERYTHING, (), SkipReason.POLICY)],
)
def test_a_skip_has_one_of_a_few_reasons(tmp_path, policy, spoil, kind):
    reports = train(tmp_path / "run.keel", policy, spoil=spoil)
    wanted = {report.step: report.skip_reason for report in reports if not report.stepped}
    assert set(wanted.values()) == {kind}
    with Reader(tmp_path / "run.keel") as run:
        assert run.skip_reasons() == wanted
        assert run.skips() == [(report.step, report.reason) for report in reports if not report.stepped]


@pytest.fixture(params=[1, 2])
def old_record(request, tmp_path):
    """70 steps by version 0.1, the tenth skipped and the last five recorded twice; version 1 had no kind of skip."""
    path = tmp_path / "run.keel"
    shutil.copy(Path(__file__).with_name("version-2.sqlite"), path)
    if request.param == 1:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(
                "ALTER TABLE skips DROP COLUMN kind; PRAGMA user_version = 1;"
                "UPDATE meta SET value = '1' WHERE key = 'schema_version';"
            )
    return path


def continue_from(path, step):
    model = nn.Linear(3, 1)
    guard = gk.attach(
        torch.optim.SGD(model.parameters(), lr=0.5), "global-norm:1.0", model=model, record=path
    )
    guard.load_state_dict({**guard.state_dict(), "step": step})
    (model(torch.randn(6, 3)).sum() * math.inf).backward()
    guard.optimizer.step()
    guard.detach()


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("step", [70, 67])
def test_a_record_of_an_older_schema_is_read_and_continued(old_record, step):
    bytes_before = old_record.read_bytes()
    with Reader(old_record) as run:
        assert run.steps().tolist() == list(range(1, 71))
        assert run.skip_reasons() == {10: SkipReason.NONFINITE}
        assert [s.first_step for s in run.sessions] == [1, 66]
        assert run.rollbacks == []
        before = run.norms()
    assert old_record.read_bytes() == bytes_before
    continue_from(old_record, step)
    with Reader(old_record) as run:
        assert run.steps().tolist() == list(range(1, step + 2))
        assert run.skip_reasons() == {10: SkipReason.NONFINITE, step + 1: SkipReason.NONFINITE}
        assert torch.equal(run.norms(stop=step + 1).nan_to_num(-1), before[:step].nan_to_num(-1))
        assert [s.first_step for s in run.sessions] == [1, 66, step + 1]
    with Reader(old_record, superseded=True) as run:
        assert run.steps().tolist() == list(range(step + 1, 71))
        assert torch.equal(run.norms(), before[step:])


@pytest.mark.parametrize("why", SkipReason)
def test_words_of_a_reason_tell_it_again(why):
    assert SkipReason.of_words(why.words(7, "step 7: the gradient of 'a' is not finite (inf)")) is why
    assert SkipReason.of_words(why.words(7)) is why


def test_excluded_parameters_and_group_policies(tmp_path):
    def optimizer(model):
        head = {"params": model[2].parameters(), "clip": "norm:0.05"}
        return torch.optim.SGD([{"params": model[0].parameters()}, head], lr=0.1)

    reports = train(tmp_path / "run.keel", "global-norm:0.2", optimizer=optimizer, exclude=["0.bias"])
    with Reader(tmp_path / "run.keel") as run:
        assert run.names == (
            "0.weight",
            "0.bias",
            "2.weight",
            "2.bias",
        )  # the model's order, not the selections'
        assert [p.selection for p in run.parameters] == ["main", "excluded", "group 1", "group 1"]
        assert [p.optimizer_group for p in run.parameters] == [0, 0, 1, 1]
        assert [p.shape for p in run.parameters] == [(5, 3), (5,), (2, 5), (2,)]
        assert "max_norm=0.05" in run.parameters[2].policy
        assert run.parameters[1].policy == "None"
        assert run.main.tolist() == [True, False, False, False]
        coefficients = run.parameter_coefficients()
        assert (coefficients[:, 1] == 1).all()
        for row, report in zip(coefficients, reports, strict=True):
            expected = {name: c for s in report.selections for name, c in s.coefficients.items()}
            assert dict(zip(run.names, row.tolist(), strict=True)) == expected
            assert report.norm == pytest.approx(report.norms["0.weight"])


def test_coefficients_that_follow_from_the_policy_take_no_room(tmp_path):
    train(tmp_path / "one.keel", "global-norm:0.2", exclude=["0.bias"])
    train(tmp_path / "each.keel", "norm:0.2")
    for name, stored in (("one", 0), ("each", 1)):
        with Reader(tmp_path / f"{name}.keel") as run:
            rows = run.store.query("SELECT count(*) FROM series WHERE name = 'coefficients'")
            assert rows == [(stored,)]
            assert run.parameter_coefficients().shape == (8, 4)


def test_parameters_without_gradients(tmp_path):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

    model = Unused()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, model=model, record=tmp_path / "run.keel")
    for _ in range(3):
        model.used(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.present().tolist() == [[True, True, False, False]] * 3
        assert (run.norms()[:, 2:] == 0).all()


def test_an_optimizer_without_parameters_is_recorded(tmp_path):
    optimizer = torch.optim.SGD([{"params": []}], lr=0.1)
    guard = gk.attach(optimizer, "norm:0.1", record=tmp_path / "run.keel")
    for _ in range(2):
        optimizer.step()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.steps().tolist() == [1, 2]
        assert run.norms().shape == (2, 0)


def test_weights_and_updates_are_sampled(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, model=model, record=tmp_path / "run.keel")
    weights, updates = [], []
    for _ in range(160):
        model(torch.randn(6, 3)).square().sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        weights.append([float(b.norm()) for b in before])
        updates.append(
            [float((p.detach() - b).norm()) for p, b in zip(model.parameters(), before, strict=True)]
        )
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        steps, weight_norms, update_norms = run.weight_samples()
        assert {*range(1, 101), 150} <= set(steps.tolist())
        assert len(steps) < 160
        expected = torch.tensor([weights, updates], dtype=torch.float64)[:, steps - 1]
        # The measured norms are float64 over float32 entries; torch's own are float32.
        torch.testing.assert_close(weight_norms, expected[0], rtol=1e-5, atol=0)
        measured = ~update_norms.isnan().any(dim=1)
        assert measured[(steps <= 100) | (steps == 150)].all()
        torch.testing.assert_close(update_norms[measured], expected[1][measured], rtol=1e-5, atol=1e-9)


def test_a_jump_of_the_norm_is_sampled_whatever_the_interval(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    guard = gk.attach(optimizer, None, model=model, record=tmp_path / "run.keel")
    for step in range(1, 141):
        (model(torch.randn(6, 3)).square().sum() * (1000 if step == 123 else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        steps, _, updates = run.weight_samples()
        assert [step for step in steps.tolist() if step > 100] == [*range(123, 134)]
        assert updates.isfinite().all()


def test_many_blocks_and_every_way_to_slice_them(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel")
    for step in range(1, 301):
        recorder.record(make_report(step))
    recorder.close()
    with Reader(tmp_path / "run.keel") as run:
        assert len(run.store.blocks) == 5
        whole = torch.arange(1, 301)
        norms = torch.stack([whole.double() + i / 10 for i in range(3)], dim=1)
        for start, stop, stride in [
            (None, None, 1), (1, 301, 1), (64, 65, 1), (65, 200, 1), (10, 290, 7), (3, 280, 64), (5, 299, 100),
            (100, 100, 1), (200, 100, 1), (0, 9999, 3), (250, None, 1), (None, 3, 2), (1, 300, 299),
        ]:  # fmt: skip
            expected = [s for s in range(1, 301) if (start or 0) <= s < (stop or 9999)][::stride]
            assert run.steps(start, stop, stride).tolist() == expected
            rows = torch.tensor(expected, dtype=torch.int64) - 1
            torch.testing.assert_close(run.norms(start, stop, stride), norms[rows], rtol=0, atol=0)
            assert run.bounds(start, stop, stride).tolist() == [50.0] * len(expected)
            assert run.losses(start, stop, stride).isnan().all()  # never logged
        with pytest.raises(ValueError, match="stride=0: it must be 1 or more"):
            run.steps(stride=0)


def test_scalars_that_come_and_go(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel")
    for step in range(1, 101):
        recorder.record(make_report(step, **({"loss": torch.tensor(float(step))} if step % 2 else {})))
    recorder.close()
    with Reader(tmp_path / "run.keel") as run:
        losses = run.losses()
        assert losses[::2].tolist() == list(range(1, 101, 2))
        assert losses[1::2].isnan().all()


def test_a_logged_tensor_is_taken_at_once(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel")
    running = torch.zeros((), requires_grad=True)
    buffer = running * 1.0
    for step in range(1, 4):
        with torch.no_grad():
            buffer.fill_(step)
        recorder.record(make_report(step, loss=buffer))
    recorder.close()
    with Reader(tmp_path / "run.keel") as run:
        assert run.losses().tolist() == [1.0, 2.0, 3.0]


class Fragile(torch.optim.SGD):
    """Its step may raise, as where memory runs out."""

    raises = False

    def step(self, closure=None):
        if self.raises:
            raise MemoryError
        return super().step(closure)


def test_a_step_that_is_tried_again_has_the_learning_rate_of_then(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    optimizer = Fragile([weight], lr=0.5)
    guard = gk.attach(optimizer, None, record=tmp_path / "run.keel")
    weight.grad, optimizer.raises = torch.ones(2), True
    with pytest.raises(MemoryError):
        optimizer.step()
    weight.grad, optimizer.raises, optimizer.param_groups[0]["lr"] = torch.ones(2), False, 0.25
    optimizer.step()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.scalar("lr").tolist() == [0.25]


def test_parameters_added_later(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, record=tmp_path / "run.keel")
    for step in range(1, 7):
        if step == 4:
            optimizer.add_param_group({"params": list(model[2].parameters())})
        model(torch.randn(6, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.names == ("0", "1", "2", "3")
        norms = run.norms()
        assert norms[:3, 2:].isnan().all()
        assert norms[3:].isfinite().all()
        assert len(run.store.blocks) == 2
        assert run.parameters[3].optimizer_group == 1


def test_the_file_says_what_is_in_it(tmp_path):
    train(tmp_path / "run.keel", gk.ClipByValue(0.1))
    connection = sqlite3.connect(tmp_path / "run.keel")
    described = {name for (name,) in connection.execute("SELECT name FROM series_types")}
    stored = {name for (name,) in connection.execute("SELECT DISTINCT name FROM series")}
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert described == {*SERIES, "scalar:NAME"}
    assert {name for name in stored if not name.startswith("scalar:")} <= described
    assert tables == {line.split()[2] for line in TABLES.splitlines() if line.startswith("CREATE TABLE")}
    assert connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone() == ("3",)
    connection.close()


def test_only_the_record_is_left_behind(tmp_path):
    train(tmp_path / "run.keel", gk.ClipByGlobalNorm(1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["run.keel"]


@pytest.mark.parametrize("policy", ["value:0.3", "global-norm:0.3", "norm:0.3"])
def test_a_skipped_step_has_the_bound_that_was_in_force(tmp_path, policy):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    guard = gk.attach(optimizer, policy, record=tmp_path / "run.keel")
    for value in (1.0, math.nan, 1.0):
        weight.grad = torch.full_like(weight, value)
        if value != value:
            with pytest.warns(gk.errors.SkippedStepWarning):
                optimizer.step()
        else:
            optimizer.step()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        assert run.stepped().tolist() == [True, False, True]
        assert run.bounds().tolist() == [0.3] * 3
