"""Damaged and crafted records: each command ends in one line and exit 2, or in what could still be read, said so."""

import contextlib
import resource
import shutil
import sqlite3
import time
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("plotly", reason="pages need plotly")

from typer.testing import CliRunner

import gradkeel as gk
from gradkeel.cli.app import app
from gradkeel.errors import RecordError, RecordWarning
from gradkeel.record import Reader, store

from tests.record.damage import KINDS, damage

# Of one command, and of all together: a few times what the test in full prints, so that only what grows without
# bound is caught.
SECONDS, BYTES = 30.0, 600 * 2**20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a record with every kind of row: skips, samples, scalars, weights, and steps recorded again."""
    path = tmp_path_factory.mktemp("whole") / "run.keel"
    torch.manual_seed(0)
    for first, last in ((0, 150), (90, 260)):
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        guard = gk.attach(optimizer, "agc:0.05", model=model, record=path)
        guard.load_state_dict({**guard.state_dict(), "step": first})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gk.SkippedStepWarning)
            for step in range(first, last):
                loss = model(torch.randn(4, 4)).square().sum() * (100 if step in (60, 120) else 1)
                if step in (30, 200):
                    loss = loss * float("nan")
                loss.backward()
                guard.log(loss=loss)
                optimizer.step()
                optimizer.zero_grad()
        guard.detach()
    return path.read_bytes()


def commands(path):
    yield "explain", path
    yield "replay", path, "--policy", "zclip"
    yield "export", path, "-o", path.with_suffix(".csv")
    yield "report", path, "-o", path.with_suffix(".html")


def check_command(arguments):
    """Whether it read something, and its seconds; it may do nothing else than that or end in one line."""
    begun = time.process_time()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    seconds = time.process_time() - begun
    assert seconds < SECONDS, arguments
    if result.exit_code == 0:
        assert result.stdout
        return True, seconds
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("gradkeel: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return False, seconds


def fuzz(whole, folder, numbers):
    """Damage so many files, and run all commands on each: what came of each command."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # plotly and torch, of numbers that make no sense
        for number in numbers:
            kind = KINDS[number % len(KINDS)]
            path = folder / f"{kind}-{number}.keel"
            damage(whole, path, kind, number)
            found += [check_command(arguments) for arguments in commands(path)]
            for file in folder.iterdir():
                file.unlink()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (most - before) * 1024 < BYTES
    read = sum(has_read for has_read, _ in found)
    print(
        f"{read} of {len(found)} commands read what they could, {len(found) - read} ended in one line; the slowest "
        f"took {max(seconds for _, seconds in found):.1f} s, and the process {most / 1024:.0f} MB"
    )
    assert len(found) / 4 < read < len(found)  # some are beyond help, and most are not


def test_damaged_files_under_every_command(whole, tmp_path):
    fuzz(whole, tmp_path, range(24))


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(8))
def test_2000_damaged_files_under_every_command(whole, tmp_path, part):
    fuzz(whole, tmp_path, range(250 * part, 250 * (part + 1)))


def test_what_can_still_be_read_is_read_and_said(whole, tmp_path):
    path = tmp_path / "run.keel"
    path.write_bytes(whole)
    with Reader(path) as run:
        norms, steps = run.norms(), run.steps()
        assert run.damage is None
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE series SET data = x'00' WHERE name = 'norms' AND block = 1")
        connection.execute("UPDATE series SET data = x'00' WHERE name = 'step' AND block = 1")
        connection.commit()
    with Reader(path) as run:
        assert torch.equal(run.steps(), steps)  # they follow from the block's first and last
        damaged = run.norms()
        assert damaged[:64].isnan().all()
        torch.testing.assert_close(damaged[64:], norms[64:], rtol=0, atol=0, equal_nan=True)
        assert "(1 of " in run.damage
    result = CliRunner().invoke(app, ["explain", str(path)])
    assert "Not all could be read" in result.stdout
    result = CliRunner().invoke(app, ["export", str(path), "-o", str(tmp_path / "run.csv")])
    assert result.exit_code == 0
    assert "cannot be read as a whole" in result.stderr


def test_a_crafted_number_of_rows_is_not_allocated(whole, tmp_path):
    path = tmp_path / "run.keel"
    path.write_bytes(whole)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "UPDATE blocks SET rows = 1 << 40, last_step = first_step + (1 << 40) - 1 WHERE block = 1"
        )
        connection.commit()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Reader(path) as run:
        assert 64 < len(run) < 260
        assert len(run.norms()) == len(run)
        assert run.damage
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100 * 2**20


def test_what_is_said_of_one_block_and_one_parameter_counts_them(tmp_path, monkeypatch):
    path = tmp_path / "run.keel"
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    guard = gk.attach(optimizer, None, record=path)
    weight.sum().backward()
    optimizer.step()
    guard.detach()
    with monkeypatch.context() as patch:
        patch.setattr(store, "_ALWAYS_ALLOWED", -(2**40))
        with pytest.raises(RecordError, match=r"a file can hold \(steps: 1, parameters: 1\)"):
            Reader(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE blocks SET rows = 0")
        connection.commit()
    with pytest.raises(RecordError, match="none of its blocks of steps can be read"):
        Reader(path)


def test_a_value_larger_than_its_file_is_not_made(whole, tmp_path):
    path = tmp_path / "run.keel"
    path.write_bytes(whole)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "DROP TABLE series; CREATE TABLE series (name TEXT, block INTEGER, "
            "data BLOB GENERATED ALWAYS AS (zeroblob(900000000)), PRIMARY KEY (name, block));"
            "INSERT INTO series (name, block) VALUES ('norms', 1), ('step', 1);"
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Reader(path) as run, contextlib.suppress(RecordError):
        run.norms()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100 * 2**20


@pytest.mark.parametrize("command", ["explain", "report", "replay", "export"])
@pytest.mark.parametrize("what", ["folder", "missing.keel", "empty.keel", "text.keel"])
def test_what_is_no_record_is_one_line(tmp_path, command, what):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.keel").touch()
    (tmp_path / "text.keel").write_text("not a database, but longer than a header " * 9)
    more = {"replay": ["--policy", "none"], "export": ["-o", str(tmp_path / "x.csv")]}.get(command, [])
    assert not check_command((command, tmp_path / what, *more))[0]


def test_a_damaged_record_that_cannot_be_continued_is_left_as_it_is(whole, tmp_path):
    """Nobody knows what could still be got out of it; training goes on without a record."""
    refused = 0
    for kind in ("zeroed", "tables", "flips", "truncated"):
        for seed in range(5):
            path = tmp_path / f"{kind}-{seed}.keel"
            damage(whole, path, kind, seed)
            before = path.read_bytes()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", RecordWarning)
                model = nn.Linear(2, 1)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                guard = gk.attach(optimizer, None, model=model, record=path)
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                guard.detach()
            assert guard.report.stepped
            if warned:
                refused += 1
                after = path.read_bytes()
                assert after[100:] == before[100:]  # before that, SQLite counts who has opened it
            else:
                with Reader(path) as run:
                    assert run.steps().tolist() == [1]
    assert refused >= 10


@pytest.mark.parametrize("name", ["run.keel", "link", "run.keel-wal"])
def test_a_page_onto_a_record_is_refused(whole, tmp_path, name):
    """F7: the record was overwritten."""
    path = tmp_path / "run.keel"
    path.write_bytes(whole)
    (tmp_path / "link").symlink_to(path)
    assert not check_command(("report", path, "-o", tmp_path / name))[0]
    assert path.read_bytes() == whole
    shutil.copy(path, tmp_path / "run.html")
    assert not check_command(("report", tmp_path / "run.html"))[0]
    assert (tmp_path / "run.html").read_bytes() == whole
