"""Waiting for calls: with times, in many threads, interrupted at any line."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from functions import PATIENCE, run_python
from helpers import wait_until

from ostap_parallel import Executor


@pytest.fixture(scope="module")
def executor():
    with Executor(2) as executor:
        yield executor


def square_after(seconds, x):
    time.sleep(seconds)
    return x * x


def printing(x):
    print("line", x)
    return x


def kill_once(path):
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "again"


class TestWaiting:
    def test_callbacks_may_want_what_the_one_that_waits_has(self, executor):
        lock, told = threading.Lock(), []

        def tell(future):
            with lock:
                told.append(future.result())

        future = executor.submit(square_after, 0.2, 3)
        future.add_done_callback(tell)
        with lock:  # which the callback wants, too
            assert future.result() == 9
            assert not told
        wait_until(lambda: told, PATIENCE, "the callback")
        assert told == [9]

    def test_many_threads(self, executor):
        shared = executor.submit(square_after, 0.2, 5)

        def call(number):
            found = [executor.submit(square_after, 0, x).result(PATIENCE) for x in range(100)]
            return shared.result(PATIENCE), found

        with ThreadPoolExecutor(8) as threads:
            for each in threads.map(call, range(8)):
                assert each == (25, [x * x for x in range(100)])

    def test_times(self, executor):
        future = executor.submit(square_after, 0.5, 3)
        for seconds in (0, 0.05, -1):
            with pytest.raises(TimeoutError):
                future.result(seconds)
        with pytest.raises(TimeoutError):
            future.exception(0.05)
        assert future.exception(threading.TIMEOUT_MAX) is None
        assert future.result() == 9
        assert executor.submit(square_after, 0, 4).result() == 16

    def test_cancelled_meanwhile(self, executor):
        future = executor.submit(square_after, 600, 3)
        wait_until(future.running, PATIENCE, "it runs")
        cancelling = threading.Timer(0.2, future.cancel, [True])
        cancelling.start()
        with pytest.raises(CancelledError):
            future.result(PATIENCE)
        assert executor.submit(square_after, 0, 4).result(PATIENCE) == 16

    def test_closed_meanwhile(self):
        with Executor(1) as executor:
            future = executor.submit(square_after, 600, 3)
            wait_until(future.running, PATIENCE, "it runs")
            threading.Timer(0.2, executor.close).start()
            assert future.exception(PATIENCE) is not None

    def test_its_worker_dies(self, executor, tmp_path):
        assert executor.submit(kill_once, tmp_path / "once").result(PATIENCE) == "again"

    def test_one_behind_others(self, executor):
        futures = [executor.submit(square_after, 0.05, x) for x in range(10)]
        assert [future.result(PATIENCE) for future in reversed(futures)] == [
            x * x for x in reversed(range(10))
        ]

    def test_what_is_printed_comes_first(self):
        lines = []
        with Executor(1, on_event=lambda host, event: lines.append(event["text"])) as executor:
            for x in range(50):
                assert executor.submit(printing, x).result() == x
                assert lines[-1:] == [f"line {x}"]


INTERRUPTED = """
import os, random, signal, threading, time
from ostap_parallel import Executor

def work(x):
    time.sleep(x % 7 * 0.0003)
    return x

def blow():
    while not done:
        time.sleep(random.random() * 0.004)
        if is_armed:
            os.kill(os.getpid(), signal.NUMBER)

class Blown(BaseException): pass

def take(number, frame):
    if is_armed:
        raise Blown

done, is_armed, blown, futures = [], False, 0, []
signal.signal(signal.NUMBER, take)
with Executor(2) as executor:
    pids = executor.backend.pids()
    threading.Thread(target=blow).start()
    try:
        while blown < 60 or len(futures) < 300:
            try:
                is_armed = signal.NUMBER == signal.SIGINT  # to submit bears no other one
                futures.append(executor.submit(work, len(futures)))
                is_armed = True
                future = futures[-1]
                assert future.result(60) == len(futures) - 1 == future.result()
            except Blown:
                blown += 1
            finally:
                is_armed = False
    finally:
        is_armed, _ = False, done.append(1)
    # none is lost, nor any worker
    assert [one.result(60) for one in futures] == list(range(len(futures)))
    assert [executor.submit(work, x).result(60) for x in range(20)] == list(range(20))
    assert sorted(executor.backend.pids()) == sorted(pids)
    print("ok")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGINT", "SIGALRM"])
def test_a_handler_that_raises_at_any_line_loses_nothing(tmp_path, number):
    assert run_python("-c", INTERRUPTED.replace("NUMBER", number), cwd=tmp_path) == "ok\n"
