"""Runs of batch jobs as they are shown: by `report`, `top` and `status`, and on a page."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from browser import numbers, opened
from functions import note, wait_for
from helpers import wait_until

from ostap_parallel.arrays.account import SILENT, Account, facts_of, look, picture_of
from ostap_parallel.arrays.layout import Header, Layout
from ostap_parallel.arrays.records import Record, Told, Writer, write_verdict
from ostap_parallel.arrays.run import Run
from ostap_parallel.arrays.settings import make
from ostap_parallel.batch import SlurmPool
from ostap_parallel.cli import main
from ostap_parallel.views.picture import Fate
from ostap_parallel.views.words import duration
from ostap_parallel.worker.chunk import Writer as Items
from ostap_parallel.worker.chunk import pack_error, pack_value

PATIENCE = 120.0


@pytest.fixture
def pool(slurm, tmp_path, monkeypatch):
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)
    with SlurmPool(tmp_path / "runs", chunks=4, polling=0.5, grace=3.0) as pool:
        yield pool
        (tmp_path / "go").touch()


def test_a_run_while_it_goes_on_and_afterwards(pool, tmp_path, browser, capsys):
    def toy(name):
        print(f"fitting {name}")
        note(tmp_path, name)
        if name == "toy-7":
            wait_for(tmp_path / "go", PATIENCE)
        time.sleep(0.01)
        if name == "toy-5":
            raise ValueError(f"no minimum in {name}")
        return name

    run = pool.submit(toy, [f"toy-{n}" for n in range(8)])
    where = str(run.directory)
    wait_until(lambda: look_at(where, capsys)["done"] == 7, PATIENCE, "all but one are done")
    told = look_at(where, capsys)
    assert (told["total"], told["failed"]) == (8, 1)
    assert told["title"] == f"toy in {where}"
    (one,) = told["running"]
    assert (one["index"], one["item"], one["count"]) == (7, "'toy-7'", 1)
    assert [(row["state"], row["busy"]) for row in told["hosts"]] == [("up", 1)]
    assert told["notes"][0] == "under way"
    assert any(note.startswith("jobs ") for note in told["notes"])
    assert main(["status", where]) == 0
    assert f"running: item 7 ('toy-7') on {one['host']} for " in capsys.readouterr().out
    assert main(["report", where]) == 1
    out = capsys.readouterr().out
    assert "8 submitted = 6 merged + 1 failed + 1 unfinished" in out
    assert "running: item 7 ('toy-7') on " in out
    (tmp_path / "go").touch()
    assert run.wait(PATIENCE)
    assert main(["report", where]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{where}: done\n8 submitted = 7 merged + 1 failed, ")
    assert f"1 x ValueError in {Path(__file__).name}:" in out
    assert main(["report", where, "--html"]) == 1
    seconds = {record.index: record.seconds for record in run.records()}
    for record in run.records():  # the file is of the time when the item ran, not its worker began
        written = (tmp_path / f"toy-{record.index}").stat().st_mtime
        assert record.start + record.seconds >= written
    with opened(browser, run.directory.with_name(f"{run.directory.name}.html")) as page:
        shown = numbers(page)
        assert (shown["submitted"], shown["merged"], shown["failed"]) == ("8", "7", "1")
        rows = page.locator("#hosts table tr").all()
        names, *cells = [row.locator("th, td").all_inner_texts() for row in rows]
        hosts = [dict(zip(names, row, strict=True)) for row in cells]
        assert sum(int(row["items"]) for row in hosts) == 8
        assert max(seconds.values()) == seconds[7]
        assert duration(seconds[7]) in [row["longest"] for row in hosts]
        assert all(row["memory"].endswith(" MB") for row in hosts)
        failed = page.locator("#failures details details").first
        assert "item 5 ('toy-5') on " in failed.locator("summary").inner_text()
        failed.locator("summary").click()
        assert "no minimum in toy-5" in failed.locator("pre.traceback").inner_text()
        assert "fitting toy-5" in failed.locator("pre.output").inner_text()
        assert "item 7 ('toy-7') on " in page.locator("main ul").inner_text()
    picture = picture_of(Account(run))
    bars = {bar.first: bar for bar in picture.bars if bar.items}
    assert {n for n, bar in bars.items() if bar.fate is Fate.FAILED} == {5}
    assert {n for n, bar in bars.items() if bar.fate is Fate.OK} == {*range(8)} - {5}
    assert bars[7].end - bars[7].begin == pytest.approx(seconds[7])
    run.remove()


def look_at(where, capsys):
    assert main(["status", where, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    return told


@pytest.fixture
def layout(tmp_path):
    """A run of six items in jobs of two, whose jobs nobody has submitted; with a method `tell`."""
    layout = Layout(tmp_path / "run")
    layout.create()
    items = Items(together=False)
    for number in range(3):
        some = [(n, items.add([n], "")) for n in (2 * number, 2 * number + 1)]
        layout.write_chunk(number, Header(0, [n for n, _ in some]), some)
    made = {**make("slurm").to_json(), "total": 6, "size": 2, "function": "toy"}
    layout.write_json("settings", made)
    layout.make_shards(range(3))
    return layout


def result(layout, number, end, records=(), began=(), host="node1", words=""):
    """Write what became of a chunk."""
    told = Told({one.index: one for one in records}, dict(began), None, end, words, "1_0", host)
    told.has_begun = True
    name = layout.name("results", number)
    write_verdict(told, lambda data: layout.write(name, data))


def record(index, start, **given):
    values = {"ok": True, "answer": pack_value(index, ""), "host": "node1", "pid": 7}
    return Record(index, **{**values, "start": start, "seconds": 10.0, **given})


def test_what_was_lost_and_run_again(layout, capsys):
    """A job is lost with its node after one item; the other one runs in another, and fails."""
    now = time.time()
    result(layout, 0, "done", [record(0, now - 100), record(1, now - 89.5, pid=7)])
    words = "job 1_1: NODE_FAIL"
    result(layout, 1, "node", [record(2, now - 100, pid=8)], {3: now - 90}, words=words)
    again = Header(0, [3], attempt=2, of=1)
    layout.write_chunk(3, again, [(3, Items(together=False).add([3], ""))])
    error = {"ok": False, "answer": pack_error(ValueError("three"))}
    late = record(3, now - 50, attempt=2, host="node2", pid=9, stdout="I was here\n", **error)
    result(layout, 3, "done", [late], host="node2")
    account = Account(Run(layout.root))
    picture = picture_of(account)
    seen = [
        (picture.lanes[bar.lane], bar.first, bar.fate, round(bar.begin, 1), bar.items)
        for bar in picture.bars
    ]
    assert sorted(seen, key=lambda bar: bar[3:]) == [
        (("node1", 7), 0, Fate.OK, 0.0, 1),
        (("node1", 8), 2, Fate.OK, 0.0, 1),
        (("node1", 7), 1, Fate.WAITING, 10.0, 0),
        (("node1", 0), 3, Fate.LOST, 10.0, 1),
        (("node1", 7), 1, Fate.OK, 10.5, 1),
        (("node2", 9), 3, Fate.FAILED, 50.0, 1),
    ]
    assert picture.end == pytest.approx(100, abs=30)  # the job's last sign is of just now
    facts = facts_of(account)
    assert facts.title == "toy in run (under way)"
    assert facts.numbers["unfinished"] == "2"
    assert facts.numbers["retried"] == "1"
    (failure,) = facts.failures
    assert (failure["item"], failure["attempts"], failure["output"]) == ("[3]", 2, "I was here\n")
    assert [row["host"] for row in facts.hosts] == ["node1", "node2"]


def test_jobs_that_tell_nothing_any_more(layout):
    """Of chunk 2 a job is under way; of another one nobody has heard for long."""
    part = layout.root / f"{layout.name('results', 2)}.1_2.0-0.part"
    writer = Writer(part, layout.root / layout.name("results", 2), "1_2", "node1")
    writer.add("began", {4: time.time() - 5})
    account = Account(Run(layout.root))
    told = look(account)
    assert [(row["host"], row["state"], row["busy"]) for row in told["hosts"]] == [
        ("node1", "up", 1)
    ]
    (one,) = told["running"]
    assert (one["index"], one["item"]) == (4, "[4]")
    assert 5 <= one["seconds"] < PATIENCE
    assert told["notes"][0] == "under way"
    long_ago = time.time() - SILENT - 100
    os.utime(part, (long_ago, long_ago))
    (row,) = look(account)["hosts"]
    assert (row["state"], row["for"] > SILENT) == ("silent", True)
    writer.add("records", [record(4, time.time() - 5), record(5, time.time())])
    writer.close("done")
    told = look(account)
    assert (told["hosts"], told["running"]) == ([], [])
    assert (told["done"], told["failed"]) == (2, 0)


def test_a_run_of_which_nothing_has_begun(layout, capsys):
    where = str(layout.root)
    assert main(["report", where]) == 1
    assert "6 submitted = 0 merged + 0 failed + 6 unfinished" in capsys.readouterr().out
    assert main(["report", where, "--html"]) == 1
    assert capsys.readouterr().out == f"{where}.html\n"
    assert look_at(where, capsys)["done"] == 0


def test_directories_without_a_run(tmp_path, capsys):
    for command in ["report"], ["status"], ["top"]:
        assert main([*command, str(tmp_path)]) == 2
        assert "there is no run in " in capsys.readouterr().err


@pytest.mark.parametrize("left", [True, False], ids=["partly", "wholly"])
def test_a_run_whose_directory_goes_while_somebody_looks(layout, left):
    now = time.time()
    result(layout, 0, "done", [record(0, now - 100), record(1, now - 90)])
    (layout.root / "cancelled").touch()  # no scheduler is asked
    account = Account(Run(layout.root))
    assert look(account)["notes"] == ["cancelled"]
    if left:
        shutil.rmtree(layout.root / "results")
    else:
        layout.remove()
    told = look(account)
    assert told["notes"] == ["its directory has been removed"]
    assert (told["done"], told["total"], told["running"]) == (2, 6, [])
