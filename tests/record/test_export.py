"""Records as tables for other programs."""

import csv
import math

import pytest
import torch

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
