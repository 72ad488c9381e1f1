"""Where workers come from: sources that are queued, hang, come and go, and other ways than ssh."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import open_manager, wait_until
from servers import open_server

from ostap_parallel import ConfigError, HostError, WorkManager
from ostap_parallel.config import HostConfig
from ostap_parallel.machine.endpoint import Endpoint
from ostap_parallel.supply import host, supervisor
from ostap_parallel.supply.existing import ExistingSource
from ostap_parallel.supply.host import HostSource
from ostap_parallel.supply.processes import run_apart
from ostap_parallel.supply.source import Grant, Server, TryLater
from ostap_parallel.supply.supervisor import Slots, Supervisor
from ostap_parallel.supply.ways import pack, unpack

PATIENCE = 60  # seconds; only a hang takes that long

pytestmark = pytest.mark.slow


class Pilot(Server):
    """A source, and its only server, that waits in a queue until it is called."""

    keepalive, may_rest, is_spare = None, True, False

    def __init__(self, label="pilot"):
        self.label = label
        self.turn, self.over = threading.Event(), threading.Event()

    def server(self, watch):
        self.watch = watch
        return self

    def start(self):
        self.watch.queued("Priority")
        self.turn.wait()
        if self.over.is_set():
            raise HostError(self.label, "start", "it was withdrawn")
        self.watch.granted()
        return Grant(Endpoint(("127.0.0.1", 9), b"key"), limit=3)

    def hang_up(self):
        self.over.set()
        self.turn.set()


class Consumer:
    """Remembers what it uses."""

    def __init__(self):
        self.used = {}
        self.idle = 0.0

    def attach(self, label, endpoint, limit, is_shared):
        self.used[label] = endpoint
        return limit or 1

    def detach(self, label):
        self.used.pop(label, None)

    def seconds_idle(self):
        return self.idle


@pytest.fixture
def supervise():
    """A function that supervises sources; returns the supervisor and the consumer."""
    with contextlib.ExitStack() as stack:

        def begin(*sources, rest=3600):
            consumer = Consumer()
            made = Supervisor(consumer, sources, rest, lambda *event: None, lambda: None)
            stack.callback(made.close)
            made.start()
            return made, consumer

        yield begin


class TestQueued:
    def test_it_waits_for_its_turn_and_says_so(self, supervise, caplog):
        pilot = Pilot()
        made, consumer = supervise(pilot)
        (status,) = made.statuses
        wait_until(lambda: status.state == "queued", PATIENCE, "it is queued")
        assert (status.reason, status.workers, consumer.used) == ("Priority", 0, {})
        assert [r.getMessage() for r in caplog.records] == ["pilot is queued: Priority"]
        made.wait(0.01)
        assert made.has("queued")
        pilot.turn.set()
        made.wait(PATIENCE)
        assert (status.state, status.reason, status.workers) == ("up", "", 3)
        assert list(consumer.used) == ["pilot"]

    def test_they_take_no_slots(self, supervise, monkeypatch):
        monkeypatch.setattr(supervisor, "MAX_STARTS", 1)
        pilots = [Pilot(f"pilot{n}") for n in range(20)]
        made, _ = supervise(*pilots)
        wait_until(lambda: {s.state for s in made.statuses} == {"queued"}, PATIENCE, "all wait")
        made.add(ExistingSource("there", Endpoint(("127.0.0.1", 9), b"key")))
        wait_until(lambda: made.statuses[-1].state == "up", PATIENCE, "another one is up")

    def test_a_run_waits_for_what_is_queued(self, monkeypatch):
        """There is no other worker, and no patience for lost hosts."""
        pilot = Pilot()
        with WorkManager(0, silent=True, config=(), patience=0) as manager:
            made = manager.executor.backend._supervisor
            made.add(pilot)
            wait_until(lambda: made.has("queued"), PATIENCE, "it is queued")
            future = manager.executor.submit(abs, -1)
            with pytest.raises(TimeoutError):
                future.result(0.3)
            with open_server("secret") as port:
                made.add(ExistingSource.local(port, "secret"))
                assert future.result(PATIENCE) == 1
                made.remove("pilot")
                assert manager.workers == {f"localhost:{port}": 1}

    def test_it_is_withdrawn(self, supervise):
        pilot = Pilot()
        made, _ = supervise(pilot)
        wait_until(lambda: made.has("queued"), PATIENCE, "it is queued")
        made.close()
        assert pilot.over.is_set()
        assert made.statuses[0].state == "closed"


class Failing(Pilot):
    """One that fails so often before it is up."""

    def __init__(self, *errors):
        super().__init__("failing")
        self.errors = list(errors)

    def start(self):
        if self.errors:
            raise self.errors.pop(0)
        return Grant(Endpoint(("127.0.0.1", 9), b"key"))


class TestFirstStart:
    def test_what_may_pass_is_tried_again(self, supervise, caplog):
        caplog.set_level(logging.INFO)
        error = TryLater("failing", "connect", "Connection refused")
        made, _ = supervise(Failing(error, error))
        (status,) = made.statuses
        made.wait(PATIENCE)  # not for ever
        assert (status.state, status.lost, str(status.error)) == ("lost", 0, str(error))
        assert type(status.error) is HostError
        wait_until(lambda: status.state == "up", PATIENCE, "it is up")
        told = [r.levelname for r in caplog.records if "tried again" in r.getMessage()]
        assert told == ["WARNING", "INFO"]

    def test_what_does_not_pass_is_final(self, supervise):
        later, never = TryLater("failing", "connect", "no"), HostError("failing", "copy", "no")
        made, _ = supervise(Failing(later, never))
        (status,) = made.statuses
        wait_until(lambda: status.state == "failed", PATIENCE, "it has failed")
        assert str(status.error) == str(never)

    def test_a_host_that_comes_up_late(self, make_hosts):
        (host,) = hosts = make_hosts(1)
        host.stop()
        with open_manager(hosts, "h1*1") as manager:
            assert not manager.wait_for_hosts(PATIENCE)
            (status,) = manager.executor.hosts
            assert (status.state, status.lost) == ("lost", 0)
            host.start()
            host.wait_ready()
            assert manager.process(abs, [-1]) == [1]
            assert (status.state, status.lost) == ("up", 0)


class TestComingAndGoing:
    def test_sources_come_and_go(self, supervise):
        made, consumer = supervise()
        here = Endpoint(("127.0.0.1", 9), b"key")
        for name in "one", "two":
            made.add(ExistingSource(name, here))
        made.wait(PATIENCE)
        assert list(consumer.used) == ["one", "two"]
        with pytest.raises(ConfigError, match="two already"):
            made.add(ExistingSource("two", here))
        (status, _) = made.statuses
        made.remove("one")
        assert status.state == "closed"
        assert list(consumer.used) == ["two"]
        assert [one.name for one in made.statuses] == ["two"]
        with pytest.raises(KeyError):
            made.remove("one")
        made.add(ExistingSource("one", here))
        made.wait(PATIENCE)
        assert sorted(consumer.used) == ["one", "two"]

    def test_one_that_has_gone_is_not_started_again(self, supervise):
        failing = Failing(*[TryLater("failing", "connect", "no")] * 2)
        made, _ = supervise(failing)
        wait_until(lambda: made.has("lost"), PATIENCE, "it is tried again")
        made.remove("failing")
        with pytest.raises(AssertionError):
            wait_until(lambda: len(failing.errors) < 1, 1.5, "it is tried again")

    def test_hosts_while_a_run_goes_on(self, hosts):
        with open_manager(hosts, "h1*1") as manager:
            assert manager.wait_for_hosts(PATIENCE)
            made = manager.executor.backend._supervisor
            config = HostConfig(name="h2", ssh_config=hosts.ssh_config, ncpus=1)
            done = []
            for number in manager.iexecute(slowly(), range(200), chunk_size=1):
                done.append(number)
                if len(done) == 10:
                    made.add(HostSource(config, manager.executor.backend._secret))
                elif len(done) > 10 and len(manager.workers) == 2 and "h1" in manager.workers:
                    made.remove("h1")
            assert sorted(done) == list(range(200))
            assert manager.workers == {"h2": 1}


def slowly():
    def slowly(n):
        time.sleep(0.02)
        return n

    return slowly


class TestSlots:
    def test_who_hangs_does_not_keep_others_waiting(self):
        slots = Slots(2, lease=0.2)
        with slots.held(bool), slots.held(bool):
            begin = time.monotonic()
            with slots.held(bool):
                assert 0.1 < time.monotonic() - begin < PATIENCE

    def test_they_are_few(self):
        slots, most, now = Slots(2, lease=60), [0], [0]
        lock = threading.Lock()

        def hold():
            with slots.held(bool):
                with lock:
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                time.sleep(0.01)
                with lock:
                    now[0] -= 1

        threads = [threading.Thread(target=hold) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert most == [2]

    def test_hosts_that_hang_do_not_block_the_next(self, hosts, monkeypatch, tmp_path):
        """Their connections are taken, and nothing is said."""
        monkeypatch.setattr(supervisor, "MAX_STARTS", 2)
        monkeypatch.setattr(supervisor, "LEASE", 0.5)
        path = tmp_path / "ssh_config"
        names = [f"hangs{n}" for n in range(4)]
        path.write_text(
            f"Host hangs*\n  ProxyCommand sleep 60\nHost *\n  Include {hosts.ssh_config}\n"
        )
        servers = [*names, "h1*1"]
        with WorkManager(0, servers, ssh_config=path, config=(), silent=True) as manager:
            assert manager.process(abs, [-1]) == [1]
            states = [status.state for status in manager.executor.hosts]
            assert states == ["starting"] * 4 + ["up"]


class Here:
    """A way to this machine: bash, and nothing else."""

    def __init__(self, home):
        self.label = "here"
        self.directory = None
        self.home = home

    def argv(self):
        return ["bash", "-s"]

    def copy(self, files, directory, timeout):
        done = run_apart(["bash", "-s"], unpack(directory).encode() + pack(files), timeout)
        assert done.status == 0, done.errors

    def forward(self, port, wanted=0):
        return "127.0.0.1", port

    def judge(self, status, words):
        return "ended"

    def queued(self, line):
        return line if "waiting for resources" in line else ""

    def answers(self):
        return False


class Queue(Here):
    """One that has to be waited for."""

    def argv(self):
        wait = f'until [ -e "{self.home}/go" ]; do sleep 0.05; done'
        return ["bash", "-c", f"echo job 7 queued and waiting for resources >&2; {wait}; bash -s"]


@pytest.fixture
def manage_here(tmp_path):
    """A function that makes a manager with a host that is reached by another way."""
    with contextlib.ExitStack() as stack:
        yield lambda kind, **given: stack.enter_context(_manage_here(tmp_path, kind, **given))
    wait_until(lambda: not list(tmp_path.glob("ostap-parallel.*")), 5, "nothing is left")


@contextlib.contextmanager
def _manage_here(folder, kind, **given):
    settings = {"ncpus": 1, "tmpdir": str(folder), "python": sys.executable, **given}
    with WorkManager(0, silent=True, config=()) as manager:
        source = HostSource(
            HostConfig(name="here", **settings),
            "secret",
            open_way=lambda host: contextlib.nullcontext(kind(folder)),
        )
        yield manager, manager.executor.backend._supervisor.add(source)


class TestAnotherWay:
    def test_a_real_server_through_it(self, manage_here):
        manager, status = manage_here(Here, environment="export SEEN='a b'")
        assert manager.process(lambda n: (n, os.environ["SEEN"]), [1]) == [(1, "a b")]
        assert (manager.workers, status.state) == ({"here": 1}, "up")
        command = Path(f"/proc/{status.about['pid']}/cmdline").read_bytes()
        assert b"/ppserver\0" in command

    def test_what_it_is_sent_is_made_while_it_is_reached(self, manage_here, monkeypatch):
        made, make = threading.Event(), host.bundle

        def making(version):
            data = make(version)
            made.set()
            return data

        class Slow(Here):
            def argv(self):
                assert made.wait(60)
                return super().argv()

        monkeypatch.setattr(host, "bundle", making)
        manager, _ = manage_here(Slow)
        assert manager.wait_for_hosts(60)

    def test_tasks_can_be_interrupted_there(self, manage_here):
        manager, status = manage_here(Here)
        assert manager.wait_for_hosts(PATIENCE)
        running = manager.executor.submit(time.sleep, 1000)
        wait_until(running.running, PATIENCE, "it runs")
        begin = time.monotonic()
        assert running.cancel(interrupt=True)
        assert manager.executor.submit(abs, -1).result(PATIENCE) == 1
        assert time.monotonic() - begin < PATIENCE
        assert status.lost == 0

    def test_it_is_lost_and_comes_back(self, manage_here):
        manager, status = manage_here(Here)
        assert manager.wait_for_hosts(PATIENCE)
        os.kill(status.about["pid"], 9)
        wait_until(lambda: status.lost == 1, PATIENCE, "it is lost")
        assert manager.process(abs, [-1]) == [1]

    def test_queueing_does_not_count_as_starting(self, manage_here, tmp_path):
        manager, status = manage_here(Queue, start_timeout=4)
        wait_until(lambda: status.state == "queued", PATIENCE, "it is queued")
        assert status.reason == "job 7 queued and waiting for resources"
        time.sleep(4.5)  # a real delay, longer than a start may take
        assert status.state == "queued"
        (tmp_path / "go").touch()
        assert manager.process(abs, [-1]) == [1]
        (tmp_path / "go").unlink()

    def test_each_has_its_own_time(self, manage_here):
        manager, status = manage_here(Here, start_timeout=1, environment="sleep 60")
        assert not manager.wait_for_hosts(PATIENCE)
        assert (status.state, status.error.step) == ("lost", "environment")
        assert status.error.reason.startswith("not up after 1 s")
