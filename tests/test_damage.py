"""Checkpoints whose bits have flipped: no wrong value, no raw error, and what is whole is kept."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ostap_parallel import Checkpoint, CheckpointError, WorkManager
from ostap_parallel.runs.checkpoint import read_summary
from ostap_parallel.runs.database import insert
from ostap_parallel.worker.execute import Call

ITEMS = 60
COPIES = 250


def text_of(item):
    """Return something that fills a few pages of the file."""
    if item % 10 == 7:
        raise ValueError(f"no {item}")
    return f"{item} " * (20 + 90 * (item % 9))


CALL = Call(text_of)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Return the bytes of a file with results and failures."""
    path = tmp_path_factory.mktemp("good") / "run.db"
    with ThreadPoolExecutor(1) as one, WorkManager(executor=one, silent=True) as wm:
        wm.process(text_of, range(ITEMS), checkpoint=path, on_error="collect")
    return path.read_bytes()


@pytest.fixture
def wm():
    with ThreadPoolExecutor(1) as one, WorkManager(executor=one, silent=True) as manager:
        yield manager


@pytest.fixture
def file(tmp_path, good):
    path = tmp_path / "run.db"
    path.write_bytes(good)
    return path


def flipped(good, seed):
    """Return a copy with a few bits flipped, or a piece overwritten."""
    chance, data = random.Random(seed), bytearray(good)
    if seed % 5 == 4:
        begin = chance.randrange(len(data))
        data[begin : begin + 300] = chance.randbytes(len(data[begin : begin + 300]))
    for _ in range(chance.choice([1, 3, 20])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def read_all(checkpoint):
    """Return the results that a checkpoint gives, each of which must be right."""
    found = {}
    with checkpoint.open(CALL, ITEMS) as journal:
        for item in range(ITEMS):
            if (known := journal.find(item, item)) is not None:
                assert known.value == text_of(item)
                found[item] = known.value
    return found


def clear(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.slow
def test_flipped_bits_give_no_wrong_value_and_no_raw_error(good, tmp_path):
    refused = salvaged = kept = 0
    for seed in range(COPIES):
        clear(tmp_path)
        file = tmp_path / "run.db"
        file.write_bytes(data := flipped(good, seed))
        with contextlib.suppress(CheckpointError):
            str(read_summary(file))
        refused += 1
        with contextlib.suppress(CheckpointError):
            read_all(Checkpoint(file))
            refused -= 1
        clear(tmp_path)
        file.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            found = read_all(Checkpoint(file, salvage=True))
            salvaged += 1
            kept += len(found)
            assert read_all(Checkpoint(file)) == found  # it is whole now
            str(read_summary(file))
    assert refused > COPIES / 2
    assert salvaged > 0.9 * COPIES
    assert kept > 0.8 * salvaged * 54


def change(file, statement):
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute(statement)


def test_a_changed_result_is_named_and_can_be_computed_again(wm, file, caplog):
    change(file, "UPDATE outcome SET value = CAST('wrong' AS BLOB) WHERE item = 3")
    with pytest.raises(CheckpointError, match=r"damaged: the result of item 3") as caught:
        wm.process(text_of, range(7), checkpoint=file)
    assert str(file) in str(caught.value)
    assert "salvage=True" in str(caught.value)
    whole = Checkpoint(file, salvage=True)
    assert wm.process(text_of, range(7), checkpoint=whole) == list(map(text_of, range(7)))
    assert (wm.report.resumed, wm.report.merged) == (6, 7)
    (record,) = caplog.records
    assert "59 results are kept, 1 or more are lost" in record.getMessage()
    assert Path(f"{file}.damaged").exists()
    caplog.clear()
    wm.process(text_of, range(7), checkpoint=whole)
    assert (wm.report.resumed, caplog.records) == (7, [])


def test_rows_that_were_exchanged_are_noticed(wm, file):
    change(file, "UPDATE outcome SET item = -1 WHERE item = 3")
    change(file, "UPDATE outcome SET item = 3 WHERE item = 4")
    with pytest.raises(CheckpointError, match=r"item 3"):
        wm.process(text_of, range(7), checkpoint=file)


@pytest.mark.parametrize("identity", ["{", "[]", "{}", None, 7])
def test_an_unreadable_identity(wm, file, identity):
    change(file, f"UPDATE run SET identity = {'NULL' if identity is None else repr(identity)}")
    with pytest.raises(CheckpointError, match="what function its results are of"):
        wm.process(text_of, range(7), checkpoint=file)
    wm.process(text_of, range(7), checkpoint=Checkpoint(file, salvage=True))
    assert wm.report.resumed == 7  # it is noted a second time


def test_results_of_nobody_knows_what_are_kept_only_if_that_is_wanted(wm, file):
    change(file, "UPDATE run SET identity = '{'")
    change(file, "UPDATE session SET identity = '{'")
    with pytest.raises(CheckpointError, match=r"on_change='keep'"):
        wm.process(text_of, range(7), checkpoint=Checkpoint(file, salvage=True))
    assert not Path(f"{file}.damaged").exists()
    wm.process(text_of, range(7), checkpoint=Checkpoint(file, "keep", salvage=True))
    assert wm.report.resumed == 7


def test_another_function_is_refused_after_a_salvage_too(wm, file):
    change(file, "UPDATE outcome SET digest = NULL WHERE item = 3")
    with pytest.raises(CheckpointError, match="function is not the one"):
        wm.process(abs, range(7), checkpoint=Checkpoint(file, salvage=True))


def test_of_a_foreign_file_nothing_is_touched(wm, tmp_path):
    foreign = tmp_path / "theirs"
    foreign.write_text("not mine " * 1000)
    with pytest.raises(CheckpointError, match=r"not a database|remove"):
        wm.process(abs, [1], checkpoint=Checkpoint(foreign, salvage=True))
    assert foreign.read_text() == "not mine " * 1000
    with contextlib.closing(sqlite3.connect(tmp_path / "base")) as database:
        database.execute("CREATE TABLE theirs (x)")
    with pytest.raises(CheckpointError):
        wm.process(abs, [1], checkpoint=Checkpoint(tmp_path / "base", salvage=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "theirs"]


def test_a_new_or_an_empty_file_needs_no_salvage(wm, tmp_path, caplog):
    (tmp_path / "empty").touch()
    for name in "new", "empty":
        file = Checkpoint(tmp_path / name, salvage=True)
        assert wm.process(abs, [-1], checkpoint=file) == [1]
    assert caplog.records == []


def test_large_results_are_sealed_too(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "x", isolation_level=None)) as database:
        columns = "item, digest, value, error, traceback, host, seconds, seal"
        database.execute(f"CREATE TABLE outcome ({columns})")
        insert(database, [(1, b"d", bytes(10**7), None, "", "h", 0.5)])
        (row,) = database.execute("SELECT * FROM outcome")
    assert len(row[-1]) == 16
