"""What runs now, what is slow, and what a report keeps of it."""

from __future__ import annotations

import csv
import functools
import json
import os
import pickle
import signal
import subprocess
import threading
import time
from concurrent.futures import Future

import functions
import pytest
from helpers import kill, open_manager, wait_until, workers_of

from ostap_parallel import WorkManager
from ostap_parallel.engine.backend import Place
from ostap_parallel.errors import last_words
from ostap_parallel.runs import checkpoint, watching
from ostap_parallel.runs.chunking import Chunk
from ostap_parallel.runs.report import Running
from ostap_parallel.runs.timing import Slow, Slowest, Times

PATIENCE = 60.0


class TestTimes:
    def test_extremes_and_median(self):
        times = Times()
        times.add([3.0, 1.0])
        times.add([])
        times.add([2.0])
        assert (times.count, times.least, times.median, times.most) == (3, 1.0, 2.0, 3.0)

    def test_of_many_some_are_kept_evenly_spread(self):
        times = Times()
        for start in range(0, 100_000, 7):
            times.add([float(n) for n in range(start, min(start + 7, 100_000))])
        assert (times.count, times.least, times.most) == (100_000, 0.0, 99_999.0)
        assert abs(times.median - 50_000) < 200
        assert len(times._kept) <= 1 << 13

    def test_the_slowest(self):
        slowest = Slowest()
        for n in range(20):
            if slowest.wants(n % 10):
                slowest.add(Slow(n % 10, n, str(n), "h1", 1))
        assert [slow.seconds for slow in slowest] == [9, 9, 8, 8, 7]
        assert slowest[0].seconds == 9
        assert [slow.seconds for slow in slowest[3:]] == [8, 7]


def until(folder, item):
    """Note that an item has begun; the last ones wait for a file."""
    functions.note(folder, item)
    if item >= 10:
        functions.wait_for(folder / "go", PATIENCE)
    return item


@pytest.fixture
def go(tmp_path):
    yield tmp_path / "go"
    (tmp_path / "go").touch()


class InThread:
    """A run in another thread."""

    def __init__(self, manager, *args, **options):
        self.result = None
        self.thread = threading.Thread(target=self.run, args=[manager, *args], kwargs=options)
        self.thread.start()

    def run(self, manager, *args, **options):
        self.result = manager.process(*args, **options)


@pytest.mark.slow
def test_what_runs_now(tmp_path, go):
    with WorkManager(2, silent=True) as wm:
        run = InThread(wm, lambda item: until(tmp_path, item), range(12), chunk_size=1)
        for item in 10, 11:
            wait_until((tmp_path / str(item)).exists, PATIENCE, "it runs")
        running = wm.report.running
        assert {one.index for one in running} == {10, 11}
        assert {one.pid for one in running} == set(wm.executor.backend.pids())
        assert all(one.host == "local" and 0 <= one.seconds < PATIENCE for one in running)
        assert {one.item for one in running} == {"10", "11"}
        assert f"running: {running[0]}"[:20] in str(wm.report)
        go.touch()
        run.thread.join(PATIENCE)
        assert run.result == list(range(12))
        assert wm.report.running == []


@pytest.mark.slow
def test_what_runs_on_hosts(hosts):
    """Also the item of a chunk of several, and its process."""

    def slow(item):
        time.sleep(3 if item == 7 else 0)
        return item

    with open_manager(hosts) as wm:
        wm.wait_for_hosts(PATIENCE)
        results = wm.iexecute(slow, range(20), chunk_size=10)
        taking = threading.Thread(target=lambda: list(results), daemon=True)
        taking.start()
        (one,) = wait_until(
            lambda: [one for one in wm.report.running if (one.index, one.count) == (7, 1)],
            PATIENCE,
            "it runs",
        )
        assert (one.index, one.item) == (7, "7")
        assert one.host in ("h1", "h2")
        assert one.pid in {process_of(hosts, one.host, pid) for pid in workers_of(wm, one.host)}
        taking.join(PATIENCE)


def process_of(hosts, name, pid):
    """Return a process' id as the host itself sees it, which may have its own name space."""
    text = open(f"/proc/{pid}/status").read()  # noqa: PTH123, SIM115
    (line,) = [line for line in text.splitlines() if line.startswith("NSpid:")]
    return int(line.split()[-1])


def test_after_ctrl_c(tmp_path, go, capfd):
    with WorkManager(1, progress=False) as wm:
        interrupter = threading.Thread(
            target=lambda: (
                functions.wait_for(tmp_path / "10"),
                os.kill(os.getpid(), signal.SIGINT),
            )
        )
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            wm.process(lambda item: until(tmp_path, item), range(12), chunk_size=1)
        interrupter.join(PATIENCE)
        (one,) = wm.report.running
        assert (one.index, one.host) == (10, "local")
        assert "running: item 10 (10) on local (pid " in str(wm.report)
        assert "stopped; running: item 10 (10) on local (pid " in capfd.readouterr().err


@pytest.mark.slow
def test_a_warning_of_an_item_that_takes_far_longer_than_others(tmp_path, go, caplog, monkeypatch):
    monkeypatch.setattr(watching, "LEAST", 0.3)
    with WorkManager(2, silent=True) as wm:
        run = InThread(wm, lambda item: until(tmp_path, item), range(11), chunk_size=1)
        wait_until(lambda: caplog.records, PATIENCE, "a warning")
        go.touch()
        run.thread.join(PATIENCE)
    (record,) = caplog.records
    assert record.getMessage().startswith("still running: item 10 (10) on local (pid ")
    (straggler,) = wm.report.stragglers
    assert (straggler.index, straggler.host) == (10, "local")
    assert f"took far longer: {straggler}" in str(wm.report)
    assert wm.report.facts().stragglers == [str(straggler)]


def test_what_begins_while_it_is_looked_for_stragglers_is_none():
    """Of two chunks one waits for a worker, and gets it while the hosts tell of the other."""

    class Backend:
        def places(self, futures, wait=0.0):
            known = list(futures) if wait else list(futures)[:1]
            return {one: Place("h1", 100.0 if one is late else 0.0) for one in known}

    late, fresh = Future(), Future()
    chunks = {late: Chunk([0], ["slow"], None), fresh: Chunk([1], ["new"], None)}
    found = []
    watch = watching.Watch(Backend(), chunks, found)
    watch.times.add([1.0] * 10)
    watch.warn()
    assert [one.index for one in found] == [0]


@pytest.mark.slow
def test_the_report_tells_of_times_and_can_be_saved(tmp_path):
    with WorkManager(2, silent=True) as wm:
        wm.process(time.sleep, [0.0] * 20 + [0.1, 0.2, 0.15], chunk_size=1)
        wm.process(lambda item: time.sleep(item) or 1 / item, [0.5, 0, 1.5], on_error="collect")
        report = pickle.loads(pickle.dumps(wm.report.slowest._heap)) and wm.report
    times = report.times["local"]
    assert 0 <= times.least < 0.5 <= times.median < times.most >= 1.5
    assert [slow.index for slow in report.slowest] == [2, 0, 1]
    text = str(report)
    assert "shortest     median    longest  server" in text
    assert "slow: item 2 (1.5) on local (pid " in text
    report.save(tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text() == f"{text}\n"
    report.save(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["submitted"], found["merged"], found["failed"]) == (3, 2, 1)
    assert found["failures"][0]["error"] == "ZeroDivisionError: division by zero"
    assert found["hosts"][0]["longest"] == times.most
    report.save(str(tmp_path / "report.csv"))
    with (tmp_path / "report.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["host"], row["jobs"], row["failed"]) == ("local", "3", "1")


def test_running_in_words():
    one = Running(3, "'x'", 1, "h1", 42, 12.0)
    assert str(one) == "item 3 ('x') on h1 (pid 42) for 12 s"
    assert str(Running(3, "'x'", 5, "h1", 0, 0.5)) == ("one of 5 items from 3 on on h1 for 500 ms")


class TestWhatFailedCommandsWrote:
    def test_the_last_lines(self):
        error = subprocess.CalledProcessError(3, ["x"], "out\n", b"1\n2\xff\n\n")
        assert last_words(error) == ["1", "2\\xff"]
        assert last_words(error, 1) == ["2\\xff"]
        assert last_words(subprocess.CalledProcessError(3, "x", "a\nb\n", "  ")) == ["a", "b"]
        assert last_words(subprocess.TimeoutExpired("x", 1.0)) == []
        assert last_words(ValueError("x")) == []

    def test_they_stand_in_report_traceback_and_standard_error(self, capfd):
        def command(_):
            lines = "for n in 1 2 3; do echo line $n >&2; done; exit 3"
            subprocess.run(["sh", "-c", lines], check=True, capture_output=True)

        with WorkManager(1, silent=True) as wm:
            (failure,) = wm.process(command, [0], on_error="collect")
            with pytest.raises(subprocess.CalledProcessError) as caught:
                wm.process(command, [0])
        assert str(failure).endswith("returned non-zero exit status 3.: line 3")
        for text in failure.traceback, str(caught.value.__cause__):
            assert "the command wrote: line 1\nthe command wrote: line 2\n" in text
        assert "returned non-zero exit status 3.: line 3\n" in capfd.readouterr().err


@pytest.mark.slow
def test_standard_error_carries_host_and_item(hosts, capfd):
    def tell(item):
        print("out", item)
        os.system(f"echo err {item} >&2")

    with open_manager(hosts, "h1*1") as wm:
        wm.wait_for_hosts(PATIENCE)
        wm.process(tell, range(2), chunk_size=1)
        out, err = capfd.readouterr()
        assert sorted(out.splitlines()) == ["h1: out 0", "h1: out 1"]
        assert sorted(err.splitlines()) == ["h1, item 0: err 0", "h1, item 1: err 1"]
        wm.process(tell, range(2), chunk_size=2)  # which of them it is nobody can tell
        assert capfd.readouterr().err == "h1: err 0\nh1: err 1\n"
        wm.executor.submit(tell, 7).result()
        wait_until(lambda: capfd.readouterr().err == "h1: err 7\n", PATIENCE, "the line")
    with WorkManager(1, silent=True) as wm:
        wm.process(tell, range(2), chunk_size=1)
    assert sorted(capfd.readouterr().err.splitlines()) == ["item 0: err 0", "item 1: err 1"]


@pytest.mark.slow
def test_what_stalls_runs_a_second_time_elsewhere(hosts):
    """A worker of a host stops in the middle of an item: the run ends all the same."""

    def nap(item):
        time.sleep(0.02)
        return item

    with open_manager(hosts) as wm:
        assert wm.wait_for_hosts(PATIENCE)
        stopped = workers_of(wm, "h1")
        merged = []
        try:
            results = wm.iexecute(nap, range(60), chunk_size=1, speculate=True)
            for number, item in enumerate(results):
                merged.append(item)
                if number == 10:
                    kill(stopped, signal.SIGSTOP)
        finally:
            kill(stopped, signal.SIGCONT)
        assert sorted(merged) == list(range(60))
        report = wm.report
        assert 1 <= report.copies <= 2
        assert (report.submitted, report.merged, report.failed) == (60, 60, 0)
        assert f"{report.copies} begun a second time" in report.summary
        assert wm.process(abs, range(10)) == list(range(10))  # the host is of use again


@pytest.mark.slow
def test_an_item_that_ends_each_of_its_workers_late_is_given_up(hosts):
    """A copy of it always runs when another one is lost: these losses count all the same."""

    def end_late(item):
        if item == 25:
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return item

    with open_manager(hosts) as wm:
        assert wm.wait_for_hosts(PATIENCE)
        options = {"chunk_size": 1, "speculate": True, "on_error": "collect", "lost_retries": 0}
        run = InThread(wm, end_late, range(26), **options)
        run.thread.join(PATIENCE)
        assert run.result[:25] == list(range(25))
        (failure,) = wm.report.failures
        assert (failure.index, wm.report.merged) == (25, 25)


def test_without_stragglers_nothing_runs_twice(tmp_path):
    with WorkManager(2, silent=True) as wm:
        run = functools.partial(functions.note, tmp_path)
        assert wm.process(run, range(50), speculate=True) == [1] * 50
        assert wm.report.copies == 0


def test_a_copy_needs_items_that_may_run_anywhere():
    with WorkManager(1, silent=True) as wm, pytest.raises(TypeError, match="where="):
        wm.process(abs, [1], where=lambda item: None, speculate=True)


@pytest.mark.slow
def test_what_runs_is_in_a_checkpoint_while_it_does(tmp_path, go, monkeypatch):
    monkeypatch.setattr(checkpoint, "NOTE_SECONDS", 0.1)
    with WorkManager(2, silent=True) as wm:
        path = tmp_path / "run.db"
        options = {"chunk_size": 1, "checkpoint": path}
        run = InThread(wm, lambda item: until(tmp_path, item), range(12), **options)
        wait_until((tmp_path / "11").exists, PATIENCE, "it runs")

        def noted():
            lines = [line for _, line in checkpoint.read_summary(path).running]
            return {line.partition(" on local (pid ")[0] for line in lines}

        both = {"item 10 (10)", "item 11 (11)"}
        wait_until(lambda: noted() == both, PATIENCE, "a note of both")
        assert ": item 10 (10) on local (pid " in str(checkpoint.read_summary(path))
        go.touch()
        run.thread.join(PATIENCE)
        assert run.result == list(range(12))
    assert checkpoint.read_summary(path).running == []
