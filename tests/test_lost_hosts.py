"""Hosts that die or fall silent in the middle of a run: nothing is lost, and they come back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import (
    core_of,
    kill,
    matching,
    open_manager,
    server_of,
    ssh_of,
    state_of,
    wait_clean,
    wait_until,
    workers_of,
)
from sshd import HostOptions, descendants, describe

from ostap_parallel import HostError, ServersUnavailable, WorkManager
from ostap_parallel.supply import supervisor

pytestmark = pytest.mark.slow

PATIENCE = 60  # seconds; only a hang takes that long
PACKAGE_PARENT = Path(sys.modules["ostap_parallel"].__file__).parents[1]
ITEMS = 120


def make_slowly():
    def slowly(n):
        time.sleep(0.02)
        return n

    return slowly


slowly = make_slowly()  # sent as it is, as it cannot be imported: hosts do not have this module


def run_and_break(manager, break_something):
    """Run items, break something after the tenth; every item must come exactly once."""
    assert manager.wait_for_hosts(PATIENCE)
    done = []
    for number in manager.iexecute(slowly, range(ITEMS), chunk_size=1):
        done.append(number)
        if len(done) == 10:
            break_something()
    assert sorted(done) == list(range(ITEMS))
    report = manager.report
    assert (report.submitted, report.merged, report.failed) == (ITEMS, ITEMS, 0)


def status_of(manager, name):
    (status,) = [one for one in manager.executor.hosts if one.name == name]
    return status


def check_regained(manager, name="h1", seconds=PATIENCE):
    """Wait until a lost host is up again, and see that it works; return why it was lost."""
    status = status_of(manager, name)
    wait_until(lambda: status.state == "up" and status.lost == 1, seconds, f"{name} is up again")
    used = {"h1": 1, "h2": 1} if "h2" in manager.workers else {name: 1}
    assert manager.workers == used
    pids = manager.process(lambda n: (time.sleep(0.05), os.getpid())[1], range(20), chunk_size=1)
    assert set(pids) & set(workers_of(manager, name))
    assert isinstance(status.error, HostError)
    assert (status.error.host, status.error.step) == (name, "run")
    return status.error.reason


def break_connection(manager, name):
    """Break what leads through the tunnel, while ssh itself lives on."""
    for link in core_of(manager).links():
        if link.label == name:
            link.channel.socket.shutdown(socket.SHUT_RDWR)


BREAK = {
    "server": lambda manager, host: kill([server_of(manager, "h1")]),
    "session-there": lambda manager, host: kill(matching(host, "sshd:")),
    "ssh-here": lambda manager, host: kill([ssh_of("h1")]),
    "connections": lambda manager, host: break_connection(manager, "h1"),
    "all-processes": lambda manager, host: kill(host.processes()),
}


@pytest.mark.parametrize("how", BREAK)
def test_its_items_run_elsewhere_and_it_comes_back(hosts, how, caplog):
    caplog.set_level("WARNING", "ostap_parallel.engine")
    with open_manager(hosts) as manager:
        run_and_break(manager, lambda: BREAK[how](manager, hosts["h1"]))
        assert "host h1 lost" in str(manager.report)
        assert [host.lost for host in manager.report.hosts] == [1, 0]
        assert check_regained(manager)
        assert [host.lost for host in manager.report.hosts] == [0, 0]
        assert "host h" not in str(manager.report)  # nothing happened in this run
        lost = [record for record in caplog.records if record.getMessage().startswith("lost h1:")]
        assert len(lost) == 1
        if how == "all-processes":  # nobody was left to remove it
            for path in hosts["h1"].tmp.iterdir():
                if not server_uses(manager, path):
                    shutil.rmtree(path)
    wait_clean(hosts)


def server_uses(manager, path):
    command = Path(f"/proc/{server_of(manager, 'h1')}/cmdline").read_bytes()
    return path.name.encode() in command


def test_the_only_host(hosts):
    with open_manager(hosts, "h1*1") as manager:
        run_and_break(manager, lambda: kill([server_of(manager, "h1")]))
        assert manager.report.hosts[0].lost == 1
        check_regained(manager)
    wait_clean(hosts)


def test_its_last_worker_cannot_be_replaced(make_hosts):
    hosts = make_hosts(2)
    python = hosts["h1"].bin / "python3"
    target = python.readlink()
    with open_manager(hosts, python=hosts["h1"].inside(python)) as manager:

        def break_python():
            python.unlink()
            kill(descendants(server_of(manager, "h1")))  # also what starts workers

        run_and_break(manager, break_python)
        status = status_of(manager, "h1")
        wait_until(lambda: "python3: not found" in status.error.reason, 20, "it is tried again")
        python.symlink_to(target)
        wait_until(lambda: status.state == "up", PATIENCE, "it is up again")
        assert manager.workers == {"h1": 1, "h2": 1}
    wait_clean(hosts)


def test_its_disk_is_full(make_hosts):
    full, _ = hosts = make_hosts(each=[HostOptions(tmp_size="12M"), HostOptions()])

    def fill(n):
        Path(f"/tmp/fill.{n}").write_bytes(bytes(64 << 20))

    with open_manager(hosts, "h1*1") as manager:
        with pytest.raises(OSError, match="No space left on device"):
            manager.process(fill, [0])
        assert manager.process(lambda n: n, range(3)) == [0, 1, 2]
        with open_manager(hosts) as other:
            assert not other.wait_for_hosts(PATIENCE)
            assert other.process(lambda n: n * n, range(9)) == [n * n for n in range(9)]
            status = status_of(other, "h1")
            assert (status.state, status.error.step) == ("lost", "copy")  # there may be room
            assert "No space left" in status.error.reason
    (full.tmp / "fill.0").unlink()
    wait_clean(hosts)


def test_while_nothing_runs(hosts):
    with open_manager(hosts, keepalive=1) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        break_connection(manager, "h1")
        status = status_of(manager, "h1")
        wait_until(lambda: status.lost == 1, 10, "it is noticed")
        assert status.error.reason == "the connection to h1 was lost: the connection was closed"
        check_regained(manager)
    wait_clean(hosts)


def test_again_and_again(hosts):
    with open_manager(hosts, "h1*1") as manager:
        status = status_of(manager, "h1")
        assert manager.wait_for_hosts(PATIENCE)
        for times in 1, 2, 3:
            kill([server_of(manager, "h1")])
            wait_until(lambda times=times: status.lost >= times, 10, "it is lost")
            assert status.lost == times
            assert manager.process(slowly, range(3)) == [0, 1, 2]
        assert (status.state, status.lost) == ("up", 3)
    wait_clean(hosts)


def test_a_stopped_sshd(make_hosts):
    hosts = make_hosts(2)
    with open_manager(hosts) as manager:

        def stop():
            hosts["h1"].stop()
            kill(matching(hosts["h1"], "sshd:"))

        run_and_break(manager, stop)
        status = status_of(manager, "h1")
        wait_until(lambda: "refused" in str(status.error), 10, "starting it again was tried")
        assert (status.state, status.workers, manager.workers) == ("lost", 0, {"h2": 1})
        hosts["h1"].start()
        hosts["h1"].wait_ready()
        wait_until(lambda: status.state == "up", PATIENCE, "it is up again")
        assert manager.workers == {"h1": 1, "h2": 1}
    wait_clean(hosts)


def test_all_hosts_for_longer_than_the_patience(make_hosts):
    hosts = make_hosts(2)
    with open_manager(hosts, patience=0.5) as manager:

        def break_all():
            for host in hosts:
                host.kill()

        with pytest.raises(ServersUnavailable) as caught:
            run_and_break(manager, break_all)
        assert sorted(error.host for error in caught.value.errors) == ["h1", "h2"]
        report = manager.report
        assert 10 <= report.merged < ITEMS
        assert [host.lost for host in report.hosts] == [1, 1]
        assert not report.complete
        with pytest.raises(ServersUnavailable):
            manager.process(slowly, range(3))
    for host in hosts:  # what a crash leaves, nobody can remove
        for path in host.tmp.iterdir():
            shutil.rmtree(path)


def test_calls_without_a_run_end_too(make_hosts):
    (host,) = hosts = make_hosts(1)
    with open_manager(hosts, "h1*1", patience=0.5) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        waiting = [manager.executor.submit(time.sleep, 1000) for _ in range(3)]
        wait_until(lambda: descendants(server_of(manager, "h1")), 10, "one of them runs")
        host.kill()
        for future in waiting:
            assert isinstance(future.exception(PATIENCE), Exception)
    for path in host.tmp.iterdir():
        shutil.rmtree(path)


def test_the_temporary_directory_vanishes(hosts):
    with open_manager(hosts, keepalive=5) as manager:

        def remove():
            (path,) = hosts["h1"].tmp.iterdir()
            shutil.rmtree(path)

        run_and_break(manager, remove)
        reason = check_regained(manager)
        assert "the temporary directory has vanished: /tmp/ostap-parallel." in reason
    wait_clean(hosts)


@contextmanager
def stopped(*pids):
    """Stop processes during the block, as Ctrl-Z does."""
    kill(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(pids, signal.SIGCONT)


def test_a_server_that_does_not_answer(hosts):
    with open_manager(hosts, keepalive=1) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        with stopped(server_of(manager, "h1")):
            run_and_break(manager, lambda: None)
            reason = check_regained(manager)
            assert reason == "the server has not answered for 1 s"
    wait_clean(hosts)


def test_a_client_that_is_not_heard(hosts):
    with open_manager(hosts, "h1*1", keepalive=2) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        beating = [pid for pid in descendants(os.getpid()) if "lifeline" in describe(pid)]
        with stopped(*beating):
            status = status_of(manager, "h1")
            wait_until(lambda: status.lost, PATIENCE, "the server has ended")
            assert status.error.reason == "nothing was heard from the client for 2 s"
    wait_clean(hosts)


class TestTheNetworkIsCut:
    def test_for_long(self, make_hosts):
        cut, *_ = hosts = make_hosts(2, network=True)
        with open_manager(hosts, keepalive=3) as manager:
            run_and_break(manager, cut.cut)
            status = status_of(manager, "h1")
            wait_until(lambda: status.lost, 15, "it is lost")
            # There the server notices by itself that its client cannot be heard.
            wait_until(lambda: not matching(cut, "python"), 15, "no server there")
            wait_until(lambda: not list(cut.tmp.iterdir()), 5, "no files there")
            cut.heal()
            assert check_regained(manager)
        wait_clean(hosts, 15)  # sshd has to find out too that its old client is gone

    def test_for_a_moment(self, make_hosts):
        cut, *_ = hosts = make_hosts(2, network=True)
        with open_manager(hosts, keepalive=30) as manager:

            def blink():
                cut.cut()
                cut.heal()

            run_and_break(manager, blink)
            assert [status.lost for status in manager.executor.hosts] == [0, 0]
        wait_clean(hosts)


class TestFarHosts:
    def test_the_next_short_chunk_waits_there(self, make_hosts):
        hosts = make_hosts(delay=0.01)
        with open_manager(hosts, "h1*1") as manager:
            assert manager.wait_for_hosts(PATIENCE)
            assert manager.workers == {"h1": 1}
            core = core_of(manager)
            under_way = lambda: list(core.queue.running())  # noqa: E731
            with ThreadPoolExecutor(1) as thread:
                running = thread.submit(manager.process, slowly, range(ITEMS), chunk_size=4)
                wait_until(lambda: len(under_way()) == 2, PATIENCE, "one waits behind another")
                kill(workers_of(manager, "h1"))
                assert running.result(PATIENCE) == list(range(ITEMS))
            # what may take long does not wait behind anything
            for future in as_completed([manager.executor.submit(slowly, n) for n in range(5)]):
                assert future.result() in range(5)
                assert len(under_way()) < 2
            # nor anything behind that, while others are idle
            long = manager.executor.submit(time.sleep, 3600)
            manager.executor.backend.set_ncpus(1)
            with ThreadPoolExecutor(1) as thread:
                running = thread.submit(manager.process, slowly, range(ITEMS), chunk_size=4)
                try:
                    assert running.result(PATIENCE) == list(range(ITEMS))
                finally:
                    assert long.cancel(interrupt=True)
        wait_clean(hosts)


CLIENT = """\
import ctypes, os, sys, time
from ostap_parallel import WorkManager

ssh_config, how = sys.argv[1:]

def work(n):
    time.sleep(0.02)
    return n

if __name__ == "__main__":
    with WorkManager(0, "h1*1", ssh_config=ssh_config, config=(), silent=True, keepalive=1) as wm:
        wm.wait_for_hosts()
        results = wm.iexecute(work, range(50), chunk_size=1)
        total = next(results)
        if how == "busy":  # C code that holds the interpreter
            ctypes.PyDLL(None).usleep(4_000_000)
        else:
            print("stop me", flush=True)
        total += sum(results)
        print(total, wm.executor.hosts[0].lost, flush=True)
"""


@contextmanager
def client(hosts, tmp_path, how):
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    with subprocess.Popen(
        [sys.executable, str(script), str(hosts.ssh_config), how],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class TestTheClientStandsStill:
    """Longer than a silent host would be taken for lost."""

    def test_in_c_code_that_holds_the_interpreter(self, hosts, tmp_path):
        with client(hosts, tmp_path, "busy") as process:
            assert process.communicate(timeout=PATIENCE)[0] == f"{sum(range(50))} 0\n"
        wait_clean(hosts)

    def test_stopped(self, hosts, tmp_path):
        with client(hosts, tmp_path, "stopped") as process:
            assert process.stdout.readline() == "stop me\n"
            (server,) = matching(hosts["h1"], "/ppserver ")[:1]
            with stopped(process.pid):
                time.sleep(4)  # a real delay, four times the keep-alive
            assert process.communicate(timeout=PATIENCE)[0] == f"{sum(range(50))} 0\n"
        wait_clean(hosts)
        assert server

    def test_as_a_laptop_does(self, hosts, tmp_path):
        with client(hosts, tmp_path, "stopped") as process:
            assert process.stdout.readline() == "stop me\n"
            with stopped(process.pid, *descendants(process.pid)):
                wait_until(lambda: not matching(hosts["h1"], "python"), 10, "the server ended")
                wait_until(lambda: not list(hosts["h1"].tmp.iterdir()), 5, "no files there")
            assert process.communicate(timeout=PATIENCE)[0] == f"{sum(range(50))} 1\n"
        wait_clean(hosts)


class TestResting:
    def test_servers_end_when_there_is_nothing_to_do(self, hosts):
        with open_manager(hosts, keepalive=1, timeout=0.5) as manager:
            assert manager.process(slowly, range(10)) == list(range(10))
            wait_until(lambda: not any(map(state_of, hosts)), 20, "nothing on the hosts")
            assert {status.state for status in manager.executor.hosts} == {"resting"}
            assert manager.workers == {}
            assert manager.process(slowly, range(10)) == list(range(10))
            assert [status.lost for status in manager.executor.hosts] == [0, 0]
        wait_clean(hosts)

    def test_work_that_comes_as_they_go(self, hosts, monkeypatch):
        gone, told = threading.Event(), supervisor.Supervisor._set_state

        def tell(self, status, state, of, **fields):
            changed = told(self, status, state, of, **fields)
            if changed and state == "resting":
                gone.set()
                time.sleep(0.3)  # they are told to go, and have not gone
            return changed

        monkeypatch.setattr(supervisor.Supervisor, "_set_state", tell)
        with open_manager(hosts, keepalive=1, timeout=0.5) as manager:
            for _ in range(3):
                gone.clear()
                assert gone.wait(PATIENCE)
                assert manager.executor.submit(abs, -1).result(PATIENCE) == 1
            assert "failed" not in {status.state for status in manager.executor.hosts}
        wait_clean(hosts)

    def test_work_that_comes_just_before_they_go(self, hosts, monkeypatch):
        with open_manager(hosts) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            engine, check = manager.executor.backend, manager.executor.backend.check

            def check_and_go():
                check()
                if engine.workers:
                    for status in engine.hosts:
                        server = engine._supervisor._servers[status.name]
                        engine._supervisor._set_state(status, "resting", of="up")
                        engine._supervisor._drop(status, server)

            monkeypatch.setattr(engine, "check", check_and_go)
            future = engine.call(abs, [-1])
            monkeypatch.undo()
            assert future.result(PATIENCE) == 1
        wait_clean(hosts)

    def test_not_while_there_is(self, hosts):
        with open_manager(hosts, "h1*1", keepalive=1, timeout=0.5) as manager:
            running = manager.executor.submit(time.sleep, 2)
            wait_until(lambda: manager.workers == {"h1": 1}, PATIENCE, "the host is up")
            server = server_of(manager, "h1")
            assert running.result(PATIENCE) is None
            assert server_of(manager, "h1") == server
        wait_clean(hosts)


@pytest.mark.parametrize("wrong", [0, -1, "soon", 1.5, True])
def test_a_keepalive_that_is_none(wrong):
    with pytest.raises(ValueError, match="keepalive"):
        WorkManager(0, "h1", keepalive=wrong, config=())


@pytest.mark.parametrize("wrong", [-1, "long", None])
def test_a_patience_that_is_none(wrong):
    with pytest.raises(ValueError, match="patience"):
        WorkManager(0, patience=wrong)


def test_a_directory_in_the_home(hosts):
    scratch = hosts["h1"].home / "my scratch"
    scratch.mkdir()
    try:
        with open_manager(hosts, "h1*1", tmpdir="~/my scratch", python="~/../bin/python3") as wm:
            assert wm.wait_for_hosts(PATIENCE), wm.executor.hosts
            assert [path.name.partition(".")[0] for path in scratch.iterdir()] == [
                "ostap-parallel"
            ]
            assert wm.process(slowly, range(3)) == [0, 1, 2]
        wait_clean(hosts)
        assert list(scratch.iterdir()) == []
    finally:
        scratch.rmdir()
