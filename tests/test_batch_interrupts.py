"""Ctrl-C at any moment of a call leaves no job in the queue, beside a scheduler of the test's."""

from __future__ import annotations

import functools
import gc
import itertools
import linecache
import os
import signal
import sys
import threading
import weakref
from pathlib import Path

import pytest
from functions import PATIENCE, run_to_its_end
from helpers import wait_until
from test_batch_submitting import Answers

from ostap_parallel import WorkManager
from ostap_parallel.arrays import backend, settings
from ostap_parallel.arrays.backend import ArrayBackend
from ostap_parallel.arrays.layout import Layout
from ostap_parallel.arrays.run import Run
from ostap_parallel.batch import SlurmPool, calls
from ostap_parallel.errors import ServersUnavailable, WorkerLost
from ostap_parallel.faces.pool import AsyncResult
from ostap_parallel.runs import run
from ostap_parallel.schedulers.scheduler import JobState, Phase
from ostap_parallel.worker.execute import Call

PACKAGE = Path(calls.__file__).parents[1]


class Queue(Answers):
    """Has jobs that never begin."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.answered = 0
        self.submitted = self.asked = lambda: None

    def submit(self, script, timeout=60.0):
        with self.lock:
            number = super().submit(script, timeout)
        self.submitted()
        self.answered += 1
        return number

    def cancel(self, ids):
        super().cancel([job.partition("_")[0] for job in ids])

    def states(self, ids, *, ended=True):
        self.asked()
        return {job: JobState(Phase.QUEUED) for job in ids}

    @property
    def left(self):
        return set(map(str, range(1, len(self.names) + 1))) - set(self.cancelled)


@pytest.fixture
def queue(monkeypatch):
    made = Queue()
    monkeypatch.setitem(settings.SCHEDULERS, "slurm", lambda run: made)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield made
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pool(queue, tmp_path):
    gc.collect()  # what other tests have left is not to be collected while this one runs
    with SlurmPool(tmp_path / "runs", polling=0.1, grace=0.1) as pool:
        yield pool


def interrupt():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


class Tracer:
    """Raises KeyboardInterrupt before a line of this thread's, the n-th that is run of files."""

    def __init__(self, n, *parts):
        self.left = n
        self.places = tuple(str(PACKAGE / part) for part in parts)

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename.startswith(self.places) and not is_finalizing(frame):
            return functools.partial(self.look, set())
        return None

    def look(self, entered, frame, event, arg):
        if event == "line":
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            # nothing comes between the end of a block and what leaves it
            if frame.f_lineno not in entered or not text.strip().startswith("with "):
                self.left -= 1
            entered.add(frame.f_lineno)
            if self.left == 0:
                raise KeyboardInterrupt
        return functools.partial(self.look, entered)


def is_finalizing(frame):
    """Return whether a frame is that of a finalizer, or called by one: what it raises is lost."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def interrupted(n, call, *parts):
    """Call, and interrupt that before its n-th line; return its value, and whether it was."""
    tracer = Tracer(n, *parts)
    gc.disable()  # the collector may come at any line, and take long
    sys.settrace(tracer)
    try:
        return call(), False
    except KeyboardInterrupt:
        return None, tracer.left <= 0
    finally:
        sys.settrace(None)
        gc.enable()


@pytest.fixture
def cancelled(monkeypatch):
    """Is set when a call is cancelled."""
    found, cancel = threading.Event(), calls.Doing.cancel

    def cancelling(doing):
        found.set()
        cancel(doing)

    monkeypatch.setattr(calls.Doing, "cancel", cancelling)
    return found


@pytest.fixture
def at_waiting(monkeypatch):
    """What is done when the main thread is about to wait, in a list."""
    found, wait = [], calls.wait

    def waiting(futures, timeout=None):
        if threading.current_thread() is threading.main_thread() and timeout == calls.LOOKING:
            found[0]()
        return wait(futures, timeout)

    monkeypatch.setattr(calls, "wait", waiting)
    return found


@pytest.fixture(params=["submitting", "submitted"])
def pace(request, queue, cancelled, monkeypatch):
    """How far threads are when the interrupt comes."""
    start, is_under_way = threading.Thread.start, request.param == "submitting"

    def count():
        return len(queue.names) if is_under_way else queue.answered

    def begin(thread):
        before = count()
        start(thread)
        if threading.current_thread() is threading.main_thread():
            is_over = lambda: count() > before or not thread.is_alive()  # noqa: E731
            wait_until(is_over, PATIENCE, request.param)

    if is_under_way:
        queue.submitted = lambda: cancelled.wait(PATIENCE)
    monkeypatch.setattr(threading.Thread, "start", begin)
    return request.param


# What is called, and what is done to what that returns.
WAITING = {
    "map": lambda pool: pool.map(abs, [1, 2]),
    "starmap": lambda pool: pool.starmap(pow, [(1, 2)]),
    "apply": lambda pool: pool.apply(abs, (1,)),
}
OTHERS = {
    "submit": (lambda pool: pool.submit(abs, [1, 2]), Run.remove),
    "map_async": (lambda pool: pool.map_async(abs, [1, 2]), AsyncResult._cancel),
    "apply_async": (lambda pool: pool.apply_async(abs, (1,)), AsyncResult._cancel),
    "imap": (lambda pool: pool.imap(abs, [1, 2]), lambda stream: stream.cancel()),
}


def left_of(pool, queue):
    files = list(pool.directory.iterdir()) if pool.directory.exists() else []
    return [*queue.left, *pool._calls.all(), *files]


class TestBeforeEachLineOfWhoCalls:
    @pytest.mark.parametrize("name", WAITING)
    def test_who_waits_leaves_nothing(self, name, queue, pool, pace, cancelled, at_waiting):
        def wait():
            sys.settrace(None)  # that is the last moment
            interrupt()

        at_waiting.append(wait)
        for n in itertools.count(1):
            _, was_traced = interrupted(n, lambda: WAITING[name](pool), "batch", "arrays", "faces")
            assert left_of(pool, queue) == [], f"line {n}"
            if not was_traced:
                break
            cancelled.clear()
        assert n > 20
        assert queue.names

    @pytest.mark.parametrize("name", OTHERS)
    def test_what_nobody_gets_is_cancelled(self, name, queue, pool, pace, cancelled):
        call, end = OTHERS[name]
        if pace == "submitting" and name == "submit":
            queue.submitted = lambda: None  # which returns when it is submitted
        for n in itertools.count(1):
            value, was_traced = interrupted(n, lambda: call(pool), "batch", "arrays", "faces")
            if not was_traced:
                break
            wait_until(lambda: left_of(pool, queue) == [], PATIENCE, f"line {n}")
            cancelled.clear()
        wait_until(lambda: queue.left, PATIENCE, "it is submitted")
        end(value)
        wait_until(lambda: left_of(pool, queue) == [], PATIENCE, "it is cancelled")
        assert n > 20


STEPS = {
    Layout: ["create", "write", "write_chunk", "job_id", "arrays"],
    Run: ["__init__", "_refresh", "_as_they_come", "_lead"],
    Queue: ["submit", "largest_array"],
}


class TestAtEachStepOfTheThreadThatSubmits:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("name", ["map", "submit"])
    def test_nothing_is_left(self, name, when, queue, pool, cancelled, at_waiting, monkeypatch):
        """The signal is sent at a step, which goes on when it has come."""
        call = {**WAITING, "submit": OTHERS["submit"][0]}[name]
        steps, waits = [], threading.Event()
        at_waiting.append(waits.set)

        def asked():  # there are no more steps
            if steps[0] > 0:
                steps[0] = -1
                interrupt()

        queue.asked = asked

        def at_step(step):
            if threading.current_thread() is threading.main_thread() or not steps:
                return
            if steps[0] > 0:
                steps[0] -= 1
                if steps[0] == 0:
                    hit()

        def hit():
            assert waits.wait(PATIENCE)
            interrupt()
            assert cancelled.wait(PATIENCE)

        for owner, names in STEPS.items():
            for one in names:
                monkeypatch.setattr(owner, one, stepping(getattr(owner, one), at_step, when))
        for n in itertools.count(1):
            waits.clear()
            cancelled.clear()
            steps[:] = [n]
            try:
                value = call(pool)
            except KeyboardInterrupt:
                assert left_of(pool, queue) == [], f"step {n}"
                if steps[0] < 0:
                    break
            else:
                steps[0] = 0
                value.remove()
                break
        assert n > 5
        assert len(queue.names) > 5
        assert left_of(pool, queue) == []


def stepping(method, at_step, when):
    @functools.wraps(method)
    def call(*args, **kwargs):
        if when == "before":
            at_step(method)
        try:
            return method(*args, **kwargs)
        finally:
            if when == "after":
                at_step(method)

    return call


def test_a_run_of_a_manager_leaves_nothing(queue, pool, monkeypatch):
    """The pool goes on."""
    tracer, add = Tracer(0), ArrayBackend._add

    def waits(one):
        tracer.left = -1
        interrupt()

    def until_submitted(*args):
        before = len(queue.names)
        add(*args)
        wait_until(lambda: len(queue.names) > before, PATIENCE, "it is submitted")

    def process():
        sys.settrace(tracer)
        try:
            wm.process(abs, [1])
        finally:
            sys.settrace(None)

    monkeypatch.setattr(ArrayBackend, "_add", until_submitted)
    monkeypatch.setattr(run.Run, "_patience", waits)  # which is asked before it waits
    with WorkManager(executor=pool, silent=True) as wm:
        for is_first in True, False:  # at first there is a directory to be made
            for n in itertools.count(1):
                tracer = Tracer(n, "arrays")
                with pytest.raises(KeyboardInterrupt):
                    process()
                is_over = lambda: not queue.left and not pool.backend._futures  # noqa: E731
                wait_until(is_over, PATIENCE, f"line {n}")
                if tracer.left < 0:
                    break
            assert n > (50 if is_first else 10)
    assert len(queue.names) > 2


def test_a_backend_that_ends_while_it_submits_leaves_nothing(queue, pool):
    ending = threading.Event()
    queue.submitted = lambda: ending.wait(PATIENCE)
    future = pool.backend.call(abs, (1,))
    wait_until(lambda: queue.names, PATIENCE, "it is submitted, without an answer so far")
    closing = threading.Thread(target=pool.terminate)
    closing.start()
    wait_until(lambda: pool.backend._is_closed, PATIENCE, "the backend is to end")
    ending.set()
    closing.join(PATIENCE)
    assert left_of(pool, queue) == []
    with pytest.raises(RuntimeError, match="closed"):
        future.result(PATIENCE)


def test_a_fork_leaves_alone_what_is_under_way(queue, pool):
    pool.apply_async(abs, (1,))
    pool.backend.call(abs, (1,))
    wait_until(lambda: queue.answered == 2, PATIENCE, "both are submitted")
    files = set(pool.directory.rglob("jobs/*.sh"))
    if not (pid := os.fork()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PATIENCE))
        status = 1
        try:
            pool.terminate()
            with pytest.raises(RuntimeError, match="not its forks"):
                pool.backend.open(Call(abs))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert set(pool.directory.rglob("jobs/*.sh")) == files
    assert len(files) == 2


def test_a_backend_whose_thread_cannot_begin_says_so(queue, pool, monkeypatch):
    def refuse(*args):
        raise OSError("too many open files")

    monkeypatch.setattr(backend, "Watcher", refuse)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    told = "too many open files"
    with pytest.raises((WorkerLost, ServersUnavailable), match=told):
        pool.backend.call(abs, (1,)).result(PATIENCE)
    pool.terminate()
    assert left_of(pool, queue) == []


def test_a_pool_that_is_left_open_says_nothing(tmp_path):
    (tmp_path / "script.py").write_text(
        "from ostap_parallel.batch import SlurmPool\npool = SlurmPool('runs')\n"
    )
    done = run_to_its_end("script.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
