"""Runs that are looked at from outside while they go on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import functions
import pytest
from helpers import open_manager, wait_until
from rich.console import Console

from ostap_parallel import WorkManager
from ostap_parallel.cli import main
from ostap_parallel.runs.progress import open_progress
from ostap_parallel.runs.snapshot import Coming
from ostap_parallel.supply.source import HostStatus
from ostap_parallel.views import live
from ostap_parallel.views.screen import screen_of, text_of

PATIENCE = 60.0
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(live, "DELAY", 0.05)


@contextlib.contextmanager
def going_on(wm, function, items, **options):
    """Have a run go on in a thread during the block."""
    taking = threading.Thread(target=wm.process, args=[function, items], kwargs=options)
    taking.start()
    try:
        yield
    finally:
        taking.join(PATIENCE)
        assert not taking.is_alive()


def all_run(run):
    """Return whether three items run, and their processes are known."""
    return len(run["running"]) == 3 and all(one["pid"] for one in run["running"])


def here():
    """Return the runs of this process."""
    return [run for run in live.runs() if run["process"] == os.getpid()]


def names_of(pid):
    """Return the names of a process's sockets."""
    return [name for name in live._names() if f"-{pid}-" in name]


@pytest.mark.slow
def test_a_run_tells_what_it_does(hosts, capsys):
    go = "go-on"
    homes = [Path.home(), *(host.home for host in hosts)]

    def nap(item):
        deadline = time.monotonic() + PATIENCE
        while item >= 4 and not (Path.home() / go).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return item

    with open_manager(hosts, ncpus=1) as wm:
        assert wm.wait_for_hosts(PATIENCE)
        options = {"chunk_size": 1, "description": "naps"}
        with going_on(wm, nap, range(10), **options):
            try:
                (run,) = wait_until(
                    lambda: [
                        run
                        for run in here()
                        if run["done"] == 4
                        and len(run["running"]) == 3
                        and all(one["index"] >= 4 and one["pid"] for one in run["running"])
                    ],
                    PATIENCE,
                    "three items run",
                )
                assert main(["status"]) == 0
                text = capsys.readouterr().out
                wm.top()
                assert "naps: " in capsys.readouterr().out
                assert main(["status", "--json"]) == 0
                told = json.loads(capsys.readouterr().out)
            finally:
                for home in homes:
                    (home / go).touch()
    for home in homes:
        (home / go).unlink()
    assert (run["title"], run["total"], run["failed"]) == ("naps", 10, 0)
    assert {host["host"]: (host["state"], host["workers"]) for host in run["hosts"]} == {
        "local": ("up", 1),
        "h1": ("up", 1),
        "h2": ("up", 1),
    }
    assert all(one["index"] >= 4 and one["seconds"] >= 0 and one["pid"] for one in run["running"])
    assert all(one["memory"] > 1e6 for one in run["running"])
    for host in run["hosts"]:
        (one,) = [one for one in run["running"] if one["host"] == host["host"]]
        assert (host["memory"], host["load"]) == (one["memory"], one["load"])
        assert host["load"] >= 0
    assert "naps: 4/10 items in " in text
    assert re.search(r"h1: 1 of 1 workers busy, load \d+\.\d, \d+ MB", text)
    assert [one["title"] for one in told if one["process"] == os.getpid()] == ["naps"]
    wait_until(lambda: not here(), PATIENCE, "it is over")


def test_two_runs_of_one_process(tmp_path):
    go = tmp_path / "go"
    with (
        WorkManager(1, silent=True) as one,
        WorkManager(1, silent=True) as two,
        going_on(one, functions.wait_for, [go], description="one"),
        going_on(two, functions.wait_for, [go], description="two"),
    ):
        try:
            wait_until(lambda: len(here()) == 2, PATIENCE, "both tell")
            assert {run["title"] for run in here()} == {"one", "two"}
        finally:
            go.touch()
    assert here() == []


def test_who_is_not_the_user_is_told_nothing(tmp_path, monkeypatch):
    go = tmp_path / "go"
    with WorkManager(1, silent=True) as wm, going_on(wm, functions.wait_for, [go]):
        try:
            wait_until(here, PATIENCE, "it tells")
            (name,) = names_of(os.getpid())
            monkeypatch.setattr(live, "uid_of", lambda connection: os.getuid() + 1)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"\0{name}")
                assert client.recv(100) == b""
            assert live.runs() == []  # nor does who asks listen to him
        finally:
            go.touch()
    assert names_of(os.getpid()) == []


def test_short_runs_are_not_told_of(monkeypatch):
    monkeypatch.setattr(live, "DELAY", 60.0)
    with WorkManager(1, silent=True) as wm:
        for _ in range(10):
            wm.process(abs, range(10))
            assert here() == []


KILLED = """
import sys
from ostap_parallel import WorkManager
from ostap_parallel.views import live
import functions
live.DELAY = 0.0
with WorkManager(1, silent=True) as wm:
    wm.process(functions.wait_for, [sys.argv[1]], description="to be killed")
"""


def test_a_process_that_is_killed_leaves_nothing(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    argv = [sys.executable, "-c", KILLED, str(tmp_path / "go")]
    with subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            wait_until(
                lambda: [run for run in live.runs() if run["process"] == process.pid],
                PATIENCE,
                "it tells",
            )
        finally:
            process.kill()
    assert names_of(process.pid) == []


def test_a_run_keeps_no_process_alive(tmp_path):
    """An interpreter that ends in the middle of a run leaves no socket."""
    script = """
import os, sys, threading
from ostap_parallel import WorkManager
from ostap_parallel.views import live
import functions
live.DELAY = 0.0
wm = WorkManager(1, silent=True)
threading.Thread(target=wm.process, args=[functions.wait_for, [sys.argv[1]]], daemon=True).start()
while not any(run["process"] == os.getpid() for run in live.runs()):
    pass
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    argv = [sys.executable, "-c", script, str(tmp_path / "go")]
    with subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": path}) as process:
        assert process.wait(PATIENCE) == 0
    assert names_of(process.pid) == []


@pytest.mark.slow
def test_top_refreshes_in_a_terminal(tmp_path):
    go = tmp_path / "go"
    main_fd, terminal = pty.openpty()
    with (
        WorkManager(1, silent=True) as wm,
        going_on(wm, functions.wait_for, [go], description="f"),
    ):
        try:
            wait_until(here, PATIENCE, "it tells")
            argv = [sys.executable, "-m", "ostap_parallel", "top", "-s", "0.05"]
            environ = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "LINES": "200"}
            environ["TERM"] = "xterm"
            with subprocess.Popen(argv, stdout=terminal, stderr=terminal, env=environ) as shown:
                text = ""
                deadline = time.monotonic() + PATIENCE
                while len(re.findall("0/1 items in", text)) < 2:  # again and again
                    assert time.monotonic() < deadline, text
                    if select.select([main_fd], [], [], 0.5)[0]:
                        text += os.read(main_fd, 1 << 16).decode()
                shown.send_signal(signal.SIGINT)
                while shown.poll() is None:  # it does not end while nobody reads
                    assert time.monotonic() < deadline
                    if select.select([main_fd], [], [], 0.05)[0]:
                        os.read(main_fd, 1 << 16)
                assert shown.returncode == 0
        finally:
            go.touch()
            os.close(terminal)
            os.close(main_fd)
    assert re.search(r"local\s+\S*up", text)
    assert re.search(r"host\S*\s+\S*state", re.sub(r"\x1b\[[0-9;]*m", "", text))
    assert "item 0 (" in text


def test_status_of_files(tmp_path, capsys):
    file = tmp_path / "run.db"
    with WorkManager(1, silent=True) as wm:
        wm.process(abs, range(10), checkpoint=file)
    log = tmp_path / "jobs.log"
    log.write_text("Seq\tHost\n1\t:\t100.0\t2.0\t0\t0\t3\t0\tfalse\n")
    assert main(["status", "--json", str(file), str(log)]) == 0
    run, jobs = json.loads(capsys.readouterr().out)
    assert (run["title"], run["done"], run["total"], run["failed"]) == ("abs", 10, 10, 0)
    assert (jobs["title"], jobs["done"], jobs["failed"]) == ("jobs.log", 1, 1)
    assert main(["top", str(log)]) == 0
    assert capsys.readouterr().out.startswith("jobs.log: 1 items in 2 s")
    assert main(["status", str(tmp_path / "none")]) == 2
    assert main(["top", "-s", "0"]) == 2


def test_without_runs_status_is_1(capsys, monkeypatch):
    monkeypatch.setattr(live, "runs", list)
    assert main(["status"]) == 1
    assert "No run of yours is going on" in capsys.readouterr().out


def test_texts_do_not_steer_a_terminal():
    host = {"host": "\x1b[2J", "state": "queued", "for": 90.0, "lost": 1, "reason": "a\x07"}
    one = {"index": 1, "item": "\x1b]0;", "count": 1, "host": "h", "pid": 1, "seconds": 1.0}
    run = {"title": "f", "done": 1, "total": None, "seconds": 2.0, "rate": 0.01}
    text = text_of({**run, "hosts": [host], "running": [one] * 20})
    assert "\x1b" not in text
    assert "?[2J: queued for 90 s, lost 1 x: a?" in text
    assert "1 items in 2 s, 0:01:40/item" in text
    assert "... and 5 more" in text


class Hosts:
    """A backend whose hosts are what a test says."""

    def __init__(self, *hosts):
        self.hosts = list(hosts)


def test_what_is_waited_for_is_told(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    third = HostStatus(
        "h3",
        "queued",
        reason="a partition known in all of the house for the very long waits that it has",
    )
    backend = Hosts(HostStatus("h1", step="copy"), HostStatus("h2", "up", 2), third)
    coming = Coming(backend)
    why = "(a partition known in all of the house for the very long waits that it...)"
    assert str(coming) == f"h1 starting (copy) for 1 s, h3 queued {why} for 1 s"
    now += 90
    assert str(coming) == f"h1 starting (copy) for 90 s, h3 queued {why} for 90 s"
    backend.hosts[0].state = "up"
    backend.hosts[1].state = "lost"
    assert str(coming) == f"h2 lost for 1 s, h3 queued {why} for 90 s"
    backend.hosts += [HostStatus("h4"), HostStatus("h5", "failed")]
    now += 30
    assert str(coming) == "3 hosts are not up, for 0:02:00"
    with open_progress(False, 5, "f", dict, coming=coming) as progress:
        assert progress.status() == "0/5 items, 3 hosts are not up, for 0:02:00"
        backend.hosts = []
        assert progress.status() == "0/5 items"


@pytest.mark.slow
def test_why_a_host_is_not_up_has_a_line_of_its_own():
    words = "run: main: line 80: 18863 Killed, and much more that ssh\n has said of it, at length"
    known = {"workers": 0, "busy": 0, "lost": 1, "for": 3.0, "step": "copy"}
    hosts = [
        {**known, "host": "h1", "state": "lost", "reason": words},
        {**known, "host": "h2", "state": "up", "workers": 2, "reason": "", "load": 1.25},
    ]
    run = {"title": "f", "done": 1, "total": 5, "seconds": 2.0, "hosts": hosts}
    console = Console(width=80, file=io.StringIO())
    console.print(screen_of([run]))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    _, _, _, titles, first, second, why, *_ = lines
    assert titles.split() == ["host", "state", "workers", "busy", "load", "memory", "lost"]
    assert first.split() == ["h1", "lost", "(copy)", "for", "3", "s", "0", "0", "1"]
    assert second.split() == ["h2", "up", "2", "0", "1.2", "1"]
    assert (
        why == "h1: run: main: line 80: 18863 Killed, and much more that ssh has said of it, at…"
    )


def test_what_a_start_is_at_is_told(hosts, tmp_path):
    """A host waits for a file: the bar, `top`, a notebook and the status of the host say so."""
    go, gate = tmp_path / "go", hosts["h1"].home / "gate"
    gate.unlink(missing_ok=True)
    waiting = "until [ -e ~/gate ]; do sleep 0.05; done"
    with open_manager(hosts, "h1*1", 1, environment=waiting) as wm:
        with going_on(wm, functions.wait_for, [go], description="f"):
            try:
                (status,) = wm.executor.hosts
                wait_until(lambda: status.step == "environment", 60.0, "it is at the environment")
                wait_until(here, 60.0, "the run tells")
                (run,) = here()
                assert re.search(r"h1: starting \(environment\) for \d", text_of(run))
                (row,) = [row for row in run["hosts"] if row["host"] == "h1"]
                assert (row["state"], row["step"]) == ("starting", "environment")
                assert str(Coming(wm.backend)).startswith("h1 starting (environment) for ")
                assert "<td>starting (environment)</td>" in wm.executor.hosts._repr_html_()
                assert status._repr_html_() == "<p>h1: starting (environment), 0 workers</p>"
            finally:
                go.touch()
                gate.touch()
        assert wm.wait_for_hosts(60.0)
        assert (status.state, status.step) == ("up", "")
    gate.unlink()


def test_a_fork_that_ends_leaves_the_socket_of_its_parent(tmp_path):
    go = tmp_path / "go"
    with WorkManager(1, silent=True) as wm, going_on(wm, functions.wait_for, [go]):
        try:
            wait_until(here, PATIENCE, "it is told of")
            (name,), teller = names_of(os.getpid()), live.teller
            if not (pid := os.fork()):
                teller.close()  # as at its exit
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            assert live._ask(name)
        finally:
            go.touch()
