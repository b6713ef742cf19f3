"""Records as tables for other programs."""

import csv
import math

import pytest
import torch

import gradkeel as gk
from gradkeel.errors import MissingExtraError
from gradkeel.record import Reader, Recorder, export


@pytest.fixture
def record(tmp_path, make_report):
    recorder = Recorder(tmp_path / "run.keel")
    for step in range(1, 101):
        norms = [math.nan, 1.0, 2.0] if step == 50 else None
        recorder.record(
            make_report(step, norms=norms, stepped=step != 50, **({"loss": step / 2} if step > 10 else {}))
        )
    recorder.close()
    return tmp_path / "run.keel"


def test_csv(record, tmp_path):
    with Reader(record) as run:
        assert export(run, tmp_path / "run.csv") == 100
        totals = run.totals().tolist()
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 101))
    assert [float(row["norm"] or "nan") for row in rows] == pytest.approx(totals, nan_ok=True, rel=0)
    assert [row["loss"] for row in rows[:12]] == [""] * 10 + ["5.5", "6.0"]
    assert (rows[49]["stepped"], rows[49]["finite"], rows[49]["norm:a.weight"]) == ("0", "0", "")
    assert rows[49]["reason"] == "step 50: the gradient of 'a.weight' is not finite (NaN)"
    assert float(rows[9]["norm:b.bias"]) == 10.2


def test_csv_without_parameters(record, tmp_path):
    with Reader(record) as run:
        export(run, tmp_path / "run.csv", parameters=False)
    assert "norm:" not in (tmp_path / "run.csv").read_text()


def test_parquet(record, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    with Reader(record) as run:
        assert export(run, tmp_path / "run.parquet") == 100
        norms, stepped = run.norms(), run.stepped().tolist()
    table = parquet.read_table(tmp_path / "run.parquet")
    assert table.column("step").to_pylist() == list(range(1, 101))
    assert table.column("stepped").to_pylist() == stepped
    for i, name in enumerate(("a.weight", "b.weight", "b.bias")):
        values = torch.tensor(table.column(f"norm:{name}").to_pylist(), dtype=torch.float64)
        torch.testing.assert_close(values, norms[:, i], rtol=0, atol=0, equal_nan=True)


def test_another_ending(record, tmp_path):
    with Reader(record) as run, pytest.raises(ValueError, match=r"must end in .csv or .parquet"):
        export(run, tmp_path / "run.xls")


def test_parquet_without_pyarrow(record, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with Reader(record) as run, pytest.raises(MissingExtraError, match=r"pip install 'gradkeel\[parquet\]'"):
        export(run, tmp_path / "run.parquet")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def trained(tmp_path):
    """A real run, with weights, updates and a loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(
        optimizer, gk.ClipByNorm(0.05), model=model, exclude=["1.bias"], record=tmp_path / "trained.keel"
    )
    kept = []
    for _ in range(8):
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        guard.log(loss=loss)
        before = {name: p.detach().double().norm().item() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        kept.append((loss.item(), guard.report.norms, before, guard.report.selections[0].coefficients))
    guard.detach()
    return tmp_path / "trained.keel", kept


def test_a_long_table_has_norms_weights_updates_coefficients_and_loss(trained, tmp_path):
    path, kept = trained
    with Reader(path) as run:
        assert export(run, tmp_path / "long.csv", long=True) == 8
    rows = read(tmp_path / "long.csv")
    assert len(rows) == 8 * 4
    for row in rows:
        loss, norms, weights, coefficients = kept[int(row["step"]) - 1]
        name, norm, weight = row["parameter"], float(row["norm"]), float(row["weight_norm"])
        coefficient = coefficients.get(name, 1.0)  # the excluded one has none
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-6)
        assert norm == pytest.approx(norms[name], rel=1e-6)
        assert weight == pytest.approx(weights[name], rel=1e-6)
        assert float(row["coefficient"]) == pytest.approx(coefficient, rel=1e-6)
        # A step of plain SGD moves the weights by lr x coefficient x gradient.
        assert float(row["update_ratio"]) == pytest.approx(0.1 * coefficient * norm / weight, rel=1e-4)


def test_arrow_has_what_the_file_has(trained, tmp_path):
    pytest.importorskip("pyarrow")
    with Reader(trained[0]) as run:
        export(run, tmp_path / "wide.csv")
        wide, long = run.to_arrow(), run.to_arrow(long=True)
        assert (
            run.to_arrow(parameters=False).column_names
            == wide.column_names[: wide.column_names.index("norm:0.weight")]
        )
    rows = read(tmp_path / "wide.csv")
    assert list(rows[0]) == wide.column_names
    assert wide["update_ratio:0.weight"].to_pylist() == [float(row["update_ratio:0.weight"]) for row in rows]
    assert long["update_ratio"].to_pylist()[::4] == wide["update_ratio:0.weight"].to_pylist()
    assert (wide.num_rows, long.num_rows) == (8, 32)


def test_pandas(trained):
    pytest.importorskip("pandas")
    with Reader(trained[0]) as run:
        frame, long = run.to_pandas(), run.to_pandas(long=True)
        norms = run.norms()
    assert frame["loss"].tolist() == pytest.approx([loss for loss, *_ in trained[1]], rel=1e-6)
    assert long.groupby("parameter").norm.max()["0.weight"] == norms[:, 0].max()
    assert frame.stepped.dtype == bool


def test_a_reader_says_what_it_holds(trained):
    with Reader(trained[0]) as run:
        assert repr(run).endswith("trained.keel': 8 steps (1 to 8), 4 parameters, norm:0.05)")
        assert "<th>logged</th><td>loss, lr</td>" in run._repr_html_()
