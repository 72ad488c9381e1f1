"""The queue, and machines that take from it: order, pins, limits; what is interrupted half-way."""

from __future__ import annotations

import signal
import socket
import time

import pytest
from functions import PATIENCE, run_python
from helpers import core_of, open_manager, wait_until

from ostap_parallel import WorkManager
from ostap_parallel.machine.channel import Channel
from ostap_parallel.machine.jobs import Job, Machine, Queue, deferring_interrupts
from ostap_parallel.machine.loop import Loop
from ostap_parallel.worker.chunk import Lost, pack_chunk, unpack_result
from ostap_parallel.worker.execute import Call
from ostap_parallel.worker.transport import Connection


class Fake(Machine):
    """A machine whose jobs end when the test says so."""

    def __init__(self, label, queue, workers):
        super().__init__(label)
        self._queue, self._workers = queue, workers
        self.begun = []
        queue.machines.append(self)

    def count(self):
        return self._workers

    def begin(self, job):
        self.begun.append(job.chunk)

    def end(self, chunk):
        (job,) = [job for job in self.running.values() if job.chunk == chunk]
        self._queue.end(self, job, b"result of " + chunk)

    def answer(self, job, message):
        raise AssertionError("nothing was asked")

    def signal(self, job, number):
        raise AssertionError("nobody signals")

    def interrupt(self, jobs, grace):
        for job in jobs:
            self.end(job.chunk)


@pytest.fixture
def loop():
    loop = Loop("test")
    yield loop
    loop.stop()


@pytest.fixture
def queue(loop):
    return Queue(loop)


class Results(dict):
    def job(self, name, **how):
        return Job(b"", name, lambda result: self.__setitem__(name, result), **how)


@pytest.fixture
def results():
    return Results()


class TestOrder:
    def test_first_come_first_served(self, queue, results):
        machine = Fake("a", queue, 1)
        for name in b"1", b"2", b"3":
            queue.add(results.job(name))
        assert (machine.begun, len(queue)) == ([b"1"], 2)
        machine.end(b"1")
        machine.end(b"2")
        assert machine.begun == [b"1", b"2", b"3"]
        assert results == {b"1": b"result of 1", b"2": b"result of 2"}

    def test_what_is_not_wanted_any_more_is_not_begun(self, queue, results):
        machine = Fake("a", queue, 1)
        queue.add(results.job(b"1"))
        queue.add(results.job(b"2", is_wanted=lambda: False))
        queue.add(results.job(b"3"))
        machine.end(b"1")
        assert machine.begun == [b"1", b"3"]
        assert unpack_result(results[b"2"]) == Lost("", 0, "it was cancelled")

    def test_one_that_is_taken_is_gone(self, queue, results):
        machine = Fake("a", queue, 1)
        first, second = results.job(b"1"), results.job(b"2")
        queue.add(first)
        queue.add(second)
        assert (queue.take(second), queue.take(second), queue.take(first)) == (True, False, False)
        machine.end(b"1")
        assert machine.begun == [b"1"]
        assert not queue

    def test_nothing_once_it_is_closed(self, queue, results):
        queue.is_closed = True
        with pytest.raises(RuntimeError):
            queue.add(results.job(b"1"))


class TestPins:
    def test_a_pinned_job_blocks_nobody(self, queue, results):
        a, b = Fake("a", queue, 1), Fake("b", queue, 1)
        queue.add(results.job(b"1"))  # on a
        queue.add(results.job(b"2", hosts=frozenset("a")))
        queue.add(results.job(b"3", hosts=frozenset("c")))  # not there yet
        queue.add(results.job(b"4"))
        assert (a.begun, b.begun) == ([b"1"], [b"4"])
        b.end(b"4")
        queue.add(results.job(b"5"))
        assert b.begun == [b"4", b"5"]
        a.end(b"1")
        assert a.begun == [b"1", b"2"]
        c = Fake("c", queue, 1)
        queue.dispatch()
        assert c.begun == [b"3"]

    def test_any_of_a_set(self, queue, results):
        a, b = Fake("a", queue, 1), Fake("b", queue, 1)
        for name in b"1", b"2", b"3":
            queue.add(results.job(name, hosts=frozenset("ab")))
        assert (a.begun, b.begun) == ([b"1"], [b"2"])
        b.end(b"2")
        assert b.begun == [b"2", b"3"]
        a.end(b"1")
        assert a.begun == [b"1"]
        assert not queue

    def test_older_ones_come_first(self, queue, results):
        a = Fake("a", queue, 1)
        queue.add(results.job(b"1"))
        queue.add(results.job(b"2"))
        queue.add(results.job(b"3", hosts=frozenset("a")))
        a.end(b"1")
        assert a.begun == [b"1", b"2"]

    def test_they_are_given_up_like_others(self, queue, results):
        Fake("a", queue, 0)
        jobs = [results.job(b"1", hosts=frozenset("ab")), results.job(b"2")]
        for job in jobs:
            queue.add(job)
        queue.interrupt(jobs)
        assert {unpack_result(result).reason for result in results.values()} == {
            "it was interrupted"
        }
        assert not queue

    def test_not_for_machines_that_will_not_come(self, queue, results):
        a = Fake("a", queue, 1)
        queue.add(results.job(b"1"))
        for name, hosts in ((b"2", "a"), (b"3", "bc"), (b"4", "ab")):
            queue.add(results.job(name, hosts=frozenset(hosts)))
        queue.give_up_pinned({"a", "d"})
        assert unpack_result(results[b"3"]).reason.startswith("it must run on b, c")
        a.end(b"1")
        a.end(b"2")
        assert a.begun == [b"1", b"2", b"4"]

    @pytest.mark.slow
    def test_a_host_that_cannot_be_had(self, hosts):
        """What must run there ends with that, at once; the rest goes on."""
        with open_manager(hosts, "h1*1 no-such-host.invalid") as manager:
            submit = manager.executor.backend.open(Call(abs))
            chunk = pack_chunk([0], [-1])
            lost = submit(chunk, hosts=frozenset(["no-such-host.invalid"]))
            unknown = submit(chunk, hosts=frozenset(["nobody"]))
            other = submit(chunk, hosts=frozenset(["h1"]))
            assert other.result(PATIENCE).host == "h1"
            for future, name in (lost, "no-such-host.invalid"), (unknown, "nobody"):
                reason = future.result(PATIENCE).reason
                assert reason == f"it must run on {name}, and that is not to be had"

    @pytest.mark.slow
    def test_on_real_hosts(self, hosts):
        """Twenty for each of two hosts, by turns, while one of them is slow."""
        with open_manager(hosts, "h1*1 h2*1") as manager:
            assert manager.wait_for_hosts(PATIENCE)
            engine = manager.executor.backend
            submit = engine.open(
                Call(lambda n: (time.sleep(0.05 * (n % 2)), socket.gethostname())[1])
            )
            futures = [
                submit(pack_chunk([n], [n]), hosts=frozenset([f"h{1 + n % 2}"])) for n in range(20)
            ]
            names = {n: future.result(PATIENCE).host for n, future in enumerate(futures)}
        assert names == {n: f"h{1 + n % 2}" for n in range(20)}


class TestLimits:
    def test_so_many_at_once(self, queue, results):
        a = Fake("a", queue, 4)
        a.limit = 2
        for name in b"1", b"2", b"3":
            queue.add(results.job(name))
        assert a.begun == [b"1", b"2"]
        a.end(b"1")
        assert a.begun == [b"1", b"2", b"3"]

    @pytest.mark.slow
    def test_of_local_workers(self, tmp_path):
        def work(item):
            (tmp_path / str(item)).touch()
            count = len(list(tmp_path.iterdir()))
            time.sleep(0.02)
            (tmp_path / str(item)).unlink()
            return count

        with WorkManager(3, silent=True) as manager:
            core_of(manager).queue.machines[0].limit = 1
            assert set(manager.process(work, range(10), chunk_size=1)) == {1}


class TestInterrupts:
    def test_one_is_raised_behind_the_body(self):
        done = []

        def body():
            with deferring_interrupts():
                signal.raise_signal(signal.SIGINT)
                done.append(1)

        with pytest.raises(KeyboardInterrupt):
            body()
        assert done == [1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.slow
    def test_a_storm_of_them_loses_no_worker(self, tmp_path):
        """While the main thread submits again and again, in a process that may ignore some."""
        text = run_python("-c", STORM, cwd=tmp_path)
        assert text == "200 [None, None, None, None] True {'local': 2}\n"


STORM = """
import os, signal, sys, threading, time
from ostap_parallel.engine.engine import Engine

came, armed = [], []

def take(number, frame):
    came.append(number)
    if armed:
        armed.clear()
        raise KeyboardInterrupt

def blow():
    while len(came) < 200:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)

sys.unraisablehook = lambda error: None  # one that comes in a callback of the garbage collector's
with Engine(2) as engine:
    signal.signal(signal.SIGINT, take)
    blowing = threading.Thread(target=blow)
    blowing.start()
    while blowing.is_alive():
        try:
            armed.append(True)
            while blowing.is_alive():
                engine.call(abs, [-1])
        except KeyboardInterrupt:
            pass
    armed.clear()
    futures = [engine.call(time.sleep, [0.1]) for _ in range(4)]
    results = [future.result(60) for future in futures]
    deadline = time.monotonic() + 60
    while not engine._core.is_idle() and time.monotonic() < deadline:
        time.sleep(0.01)
    print(min(len(came), 200), results, engine._core.is_idle(), engine.workers)
"""


class TestChannel:
    """Messages of any size arrive whole, in order, in pieces or together."""

    @pytest.fixture
    def pair(self, loop):
        ours, theirs = socket.socketpair()
        taken, ends = [], []
        with loop.lock:
            channel = Channel(loop, ours, taken.append, ends.append)
        yield channel, Connection(theirs), taken, ends
        with loop.lock:
            channel.close()
        theirs.close()

    def test_from_there(self, pair):
        _, there, taken, ends = pair
        sizes = [0, 1, 7, 8, 9, 65527, 65528, 65529, 131071, 131072, 131073, 3_000_000, 5]
        messages = [bytes([n % 256]) * size for n, size in enumerate(sizes)]
        for message in messages:
            there.send(message)
        wait_until(lambda: len(taken) == len(messages), PATIENCE, "all messages")
        assert taken == messages
        there.socket.close()
        wait_until(lambda: ends, PATIENCE, "the end")
        assert ends == ["the connection was closed"]

    def test_byte_by_byte(self, pair):
        _, there, taken, _ = pair
        data = (
            (3).to_bytes(8, "big")
            + b"abc"
            + (0).to_bytes(8, "big")
            + (2).to_bytes(8, "big")
            + b"de"
        )
        for n in range(len(data)):
            there.socket.send(data[n : n + 1])
        wait_until(lambda: len(taken) == 3, PATIENCE, "three messages")
        assert taken == [b"abc", b"", b"de"]

    def test_to_there_though_nobody_reads(self, pair, loop):
        channel, there, _, _ = pair
        messages = [bytes([n]) * 1_000_000 for n in range(5)]
        with loop.lock:
            for message in messages:
                channel.send(message)
            assert channel.is_congested
        assert [there.receive() for _ in messages] == messages

    def test_a_message_that_fails_harms_no_other(self, loop, caplog):
        ours, theirs = socket.socketpair()
        taken = []

        def take(message):
            if message == b"bad":
                raise ValueError(message)
            taken.append(message)

        with loop.lock:
            channel = Channel(loop, ours, take, lambda reason: None)
        there = Connection(theirs)
        for message in b"1", b"bad", b"2":
            there.send(message)
        wait_until(lambda: len(taken) == 2, PATIENCE, "two messages")
        assert "could not be dealt with" in caplog.text
        with loop.lock:
            channel.close()
        theirs.close()


class TestLoop:
    def test_times_come_in_order(self, loop):
        came = []
        with loop.lock:
            for seconds in 0.03, 0.01, 0.02:
                loop.call_later(seconds, lambda seconds=seconds: came.append(seconds))
            loop.call_later(0.015, lambda: came.append("cancelled")).cancel()
        wait_until(lambda: len(came) == 3, PATIENCE, "three times")
        assert came == [0.01, 0.02, 0.03]

    def test_what_fails_harms_no_other(self, loop, caplog):
        came = []
        loop.call_soon(lambda: 1 / 0)
        loop.call_soon(lambda: came.append(1))
        loop.deliver(lambda: came.append(2))
        wait_until(lambda: len(came) == 2, PATIENCE, "two calls")
        assert "ZeroDivisionError" in caplog.text

    def test_it_delivers_what_there_is_before_it_ends(self):
        loop, came = Loop("test"), []
        for n in range(100):
            loop.deliver(lambda n=n: came.append(n))
        loop.stop()
        assert came == list(range(100))
