"""What ``multiprocessing`` shares by inheritance: workers here have it, too.

Each program runs with `multiprocessing.Pool` and with ours, and asserts the same by itself.
"""

from __future__ import annotations

import errno
import functools
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import textwrap
import threading
from multiprocessing import connection
from types import SimpleNamespace

import multiprocess
import pytest
from functions import run_python
from helpers import wait_until

from ostap_parallel import Executor, Pool, SerializeError
from ostap_parallel.engine import engine
from ostap_parallel.lending import borrower, lender

PREAMBLE = """
import ctypes, multiprocessing, sys, threading
from MODULE import Pool
CONTEXT
def init(*args):
    global had
    had = args
"""

LOCKS = """
def count(x):
    lock, value = had
    for _ in range(50):
        with lock: value.value += 1
def nested(x):
    (lock,) = had
    with lock:
        assert lock.acquire(False)
        lock.release()
    try: lock.release()
    except AssertionError as exc: return str(exc)
def semaphore(x):
    few, bounded = had
    few.acquire(); few.release()
    assert few.get_value() == 2 and "Bounded" in repr(bounded)
    try: bounded.release()
    except ValueError: return not few.acquire(False) if few.acquire() and few.acquire() else None
def held(x):
    (lock,) = had
    return lock.acquire(False), lock.acquire(timeout=0.01)
# run
lock, value = context.Lock(), context.RawValue("i")
with Pool(2, init, (lock, value)) as pool: pool.map(count, range(4), 1)
assert value.value == 200 and lock.acquire(False)
with Pool(1, init, (lock,)) as pool: assert pool.map(held, [1]) == [(False, False)]
lock.release()
with Pool(1, init, (lock,)) as pool: assert pool.map(held, [1]) == [(True, False)]
assert not lock.acquire(False)
with Pool(1, init, (context.RLock(),)) as pool: assert "not owned" in pool.map(nested, [1])[0]
few = context.Semaphore(2)
with Pool(1, init, (few, context.BoundedSemaphore(2))) as pool: pool.map(semaphore, [1])
assert few.get_value() == 0
"""

MEMORY = """
class Point(ctypes.Structure): _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double)]
def add(x):
    value, own, point = had
    with own.get_lock(): own.value += x
    value[x] = x * x
    with point: point.x += 1
def text(x):
    raw, array, plain = had
    raw.value, array[2], plain.value = 2.5, 7, 3
    return len(array), array[:2]
# run
value, own = context.RawArray("d", 4), context.Value("i", 5)
point = context.Value(Point, 1, 2.0)
with Pool(2, init, (value, own, point)) as pool: pool.map(add, range(4), 1)
assert list(value) == [0, 1, 4, 9] and own.value == 11 and (point.x, point.y) == (5, 2.0)
raw, array, plain = context.RawValue("d"), context.Array("i", [1, 2, 3]), ctypes.c_int(1)
with Pool(1, init, (raw, array, plain)) as pool: assert pool.map(text, [1]) == [(3, [1, 2])]
assert raw.value == 2.5 and list(array) == [1, 2, 7] and plain.value == 1
"""

QUEUES = """
def put(x):
    queue, size = had
    queue.put((x, "x" * size))
    return x
def double(x):
    todo, done = had
    done.put(2 * todo.get())
    todo.task_done()
def fill(x):
    (queue,) = had
    queue.put(x, block=False)
    try: queue.put(x, timeout=0.01)
    except Exception as exc: return type(exc).__name__, queue.full()
# run
for size, most in (10, None), (300_000, None), (10, 2):
    queue, got = context.Queue(), []
    queue.put("before")
    def listen():
        while (one := queue.get()) is not None: got.append(one[0])
    thread = threading.Thread(target=listen)
    thread.start()
    pool = Pool(2, init, (queue, size), maxtasksperchild=most)
    assert pool.map(put, range(20), 1) == list(range(20))
    pool.close(); pool.join()
    queue.put(None); thread.join()
    assert got[0] == "b" and sorted(got[1:]) == list(range(20)), got
simple = context.SimpleQueue()
with Pool(2, init, (simple, 3)) as pool:
    pool.map(put, range(3))
    assert sorted(simple.get() for _ in range(3)) == [(0, "xxx"), (1, "xxx"), (2, "xxx")]
todo, done = context.JoinableQueue(), context.Queue()
with Pool(2, init, (todo, done)) as pool:
    for n in range(4): todo.put(n)
    pool.map(double, range(4), 1)
    todo.join()
    assert sorted(done.get() for _ in range(4)) == [0, 2, 4, 6]
with Pool(1, init, (context.Queue(1),)) as pool: assert pool.map(fill, [1]) == [("Full", True)]
"""

SIGNS = """
def wait(x):
    event, begun = had
    begun.release()
    return event.wait(60)
def meet(x):
    (barrier,) = had
    return barrier.wait(60)
def gather(x):
    condition, value = had
    with condition:
        value.value += 1
        condition.notify_all()
        return condition.wait_for(lambda: value.value == 3, 60)
# run
event, begun = context.Event(), context.Semaphore(0)
with Pool(2, init, (event, begun)) as pool:
    waiting = pool.map_async(wait, range(2), 1)
    assert begun.acquire(timeout=60) and begun.acquire(timeout=60) and not event.is_set()
    event.set()
    assert waiting.get(60) == [True, True]
with Pool(2, init, (context.Barrier(2),)) as pool:
    assert sorted(pool.map(meet, range(2), 1)) == [0, 1]
condition, value = context.Condition(), context.RawValue("i")
with Pool(2, init, (condition, value)) as pool:
    waiting = pool.map_async(gather, range(2), 1)
    with condition:
        assert condition.wait_for(lambda: value.value == 2, 60)
        value.value += 1
        condition.notify_all()
    assert waiting.get(60) == [True, True]
"""

PIPES = """
def send(x):
    (writer,) = had
    writer.send(x)
def answer(x):
    (end,) = had
    end.send(end.recv() + x)
# run
reader, writer = context.Pipe(duplex=False)
pool = Pool(2, init, (writer,))
writer.close()
pool.map(send, range(4), 1)
pool.close(); pool.join()
got = []
try:
    while True: got.append(reader.recv())
except EOFError: assert sorted(got) == [0, 1, 2, 3]
here, there = context.Pipe()
with Pool(1, init, (there,)) as pool:
    here.send(5)
    pool.map(answer, [2])
    assert here.recv() == 7
"""

GLOBALS = """
lock, total, seen = context.Lock(), context.Value("i"), context.Array("i", 4)
class Counter:
    def __init__(self): self.lock, self.queue = context.Lock(), context.Queue()
    def count(self, x):
        with self.lock: self.queue.put(x)
counter = Counter()
def count(x):
    with lock: total.value += x
    seen[x] += 1
    counter.count(x)
# run
with Pool(2) as pool:
    pool.map(count, range(4), 1)
    assert total.value == 6 and list(seen) == [1] * 4
    assert sorted(counter.queue.get() for _ in range(4)) == [0, 1, 2, 3]
    pool.apply(count, (1,))
    assert total.value == 7 and list(seen) == [1, 2, 1, 1] and counter.queue.get() == 1
"""

PROGRAMS = {
    "locks": LOCKS,
    "memory": MEMORY,
    "queues": QUEUES,
    "signs": SIGNS,
    "pipes": PIPES,
    "globals": GLOBALS,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("module", ["multiprocessing", "ostap_parallel"])
def test_workers_inherit(tmp_path, module, name):
    write(tmp_path, PROGRAMS[name], module, "fork")
    assert run_python("script.py", cwd=tmp_path) == "ok\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "globals"])
def test_workers_have_what_is_of_a_context_that_spawns(tmp_path, name):
    write(tmp_path, PROGRAMS[name], "ostap_parallel", "spawn")
    assert run_python("script.py", cwd=tmp_path) == "ok\n"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "globals"])
def test_workers_have_what_is_of_the_fork_that_pathos_uses(tmp_path, name, method):
    write(tmp_path, PROGRAMS[name], "ostap_parallel", method, "multiprocess")
    assert run_python("script.py", cwd=tmp_path) == "ok\n"


def put_safely(queue, lock, item):
    with lock:
        queue.put(item)
    return [queue]


def count_in(outer):
    return len(outer["inner"])


@pytest.mark.parametrize("package", [multiprocessing, multiprocess])
def test_what_a_manager_has_travels_in_items_arguments_and_results(package):
    with package.Manager() as manager:
        queue, lock, counts = manager.Queue(), manager.Lock(), manager.dict()
        with Pool(1, counts.update, ({"begun": 1},)) as pool:
            pool.starmap(put_safely, [(queue, lock, item) for item in range(2)])
            ((again,),) = pool.map(functools.partial(put_safely, queue, lock), [2])
            pool.apply(counts.update, ({"done": 2},))
            assert pool.apply(put_safely, (queue, lock, 3))[0].qsize() == 4
            assert pool.apply(count_in, (manager.dict(inner=counts),)) == 2
        assert [again.get(timeout=60) for _ in range(4)] == [0, 1, 2, 3]
        assert counts.copy() == {"begun": 1, "done": 2}


def write(directory, text, module, method, package="multiprocessing"):
    head, _, rest = text.partition("# run\n")
    context = f"import {package}; context = {package}.get_context({method!r})"
    preamble = PREAMBLE.replace("MODULE", module).replace("CONTEXT", context)
    main = textwrap.indent(rest + "print('ok')\n", "    ")
    (directory / "script.py").write_text(f"{preamble}{head}if __name__ == '__main__':\n{main}")


def adopt(*args):
    multiprocessing.had = args


def hold(x):
    lock, begun = multiprocessing.had
    begun.release()
    with lock:
        return os.getpid()


def test_a_worker_that_dies_waiting_takes_nothing_with_it():
    lock, begun = multiprocessing.Lock(), multiprocessing.Semaphore(0)
    with lock, Pool(1, adopt, (lock, begun)) as pool:
        waiting = pool.apply_async(hold, (1,))
        assert begun.acquire(timeout=60)
        (pid,) = pool.backend.pids()
        os.kill(pid, signal.SIGKILL)
        assert begun.acquire(timeout=60)  # by the next try
        lock.release()
        assert waiting.get(60) != pid
        assert lock.acquire(timeout=60)  # it was given back


def test_a_pool_ends_though_its_workers_wait():
    lock, begun = multiprocessing.Lock(), multiprocessing.Semaphore(0)
    with lock:
        with Pool(1, adopt, (lock, begun)) as pool:
            pool.apply_async(hold, (1,))
            assert begun.acquire(timeout=60)
        ended = [thread for thread in threading.enumerate() if thread.name == "lends"]
        wait_until(lambda: not any(map(threading.Thread.is_alive, ended)), 60, "threads end")
    assert lock.acquire(timeout=60)


def test_nothing_is_served_where_initargs_cannot_be_sent():
    before = threading.active_count()
    with pytest.raises(SerializeError):
        Pool(1, adopt, (multiprocessing.Lock(), (n for n in ())))
    wait_until(lambda: threading.active_count() <= before, 60, "no thread is left")


def test_others_are_not_answered(monkeypatch):
    lends = lender.Lender()
    loan = lends.lend("key", multiprocessing.Lock)
    try:
        monkeypatch.setattr(lender, "uid_of", lambda connection: os.getuid() + 1)
        with pytest.raises(RuntimeError, match="has ended"):
            loan.ask("acquire", False, None)
    finally:
        lends.close()


def test_a_borrower_trusts_nobody_who_has_taken_the_name(monkeypatch, lends):
    loan = lends.lend("key", multiprocessing.Lock)
    monkeypatch.setattr(borrower, "uid_of", lambda connection: os.getuid() + 1)
    with pytest.raises(ConnectionRefusedError, match="another user"):
        loan.detach()
    with pytest.raises(RuntimeError, match="has ended"):
        loan.ask("value")


@pytest.fixture
def lends():
    made = lender.Lender()
    yield made
    made.close()


def interrupted(n, call):
    """Call, and interrupt that before the n-th line that asks; return whether it was."""
    left = [n]

    def look(frame, event, arg):
        left[0] -= event == "line"
        if event == "line" and left[0] == 0:
            raise KeyboardInterrupt
        return look

    def trace(frame, event, arg):
        code = frame.f_code
        asks = code.co_filename == borrower.__file__ and code.co_name in ("ask", "_link")
        return look if asks or code.co_filename == connection.__file__ else None

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("make", [multiprocessing.Lock, multiprocessing.RLock])
@pytest.mark.parametrize("verb", ["acquire", "release"])
def test_who_is_interrupted_holds_no_lock(lends, make, verb):
    lock = make()
    inner = borrower.Borrowed(lends.lend("key", lambda: lock), make is multiprocessing.RLock)

    def is_free():
        return lock.acquire(False) and lock.release() is None

    # before the first lines of `ask` a release has not begun
    for n in itertools.count(1 if verb == "acquire" else 4):
        if verb == "release":
            assert inner.acquire()
        was_interrupted = interrupted(n, getattr(inner, verb))
        if verb == "acquire" and not was_interrupted:
            inner.release()
        wait_until(is_free, 60, f"the lock is free, line {n}")
        assert inner._count() == 0
        if not was_interrupted:
            break
    assert n > 20


def test_of_a_semaphore_no_more_is_given_back_than_was_taken(lends):
    few = multiprocessing.Semaphore(3)
    inner = borrower.Borrowed(lends.lend("key", lambda: few), False)
    for n in itertools.count(1):
        assert inner.acquire()
        if not interrupted(n, inner.acquire):
            break
        wait_until(lambda: few.get_value() == 2, 60, f"one is taken, line {n}")
        inner.release()
    assert few.get_value() == 1


def test_where_there_are_no_more_files_workers_wait(lends, monkeypatch, caplog):
    accept, errors = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def fails_first(server):
        if errors:
            raise errors.pop()
        return accept(server)

    monkeypatch.setattr(socket.socket, "accept", fails_first)
    loan, told = lends.lend("key", multiprocessing.Lock), []
    asking = threading.Thread(target=lambda: told.append(loan.ask("value")), daemon=True)
    asking.start()
    wait_until(lambda: told == [1], 60, "there is room again")
    assert "Too many open files" in caplog.text


def test_what_is_lent_is_taken_back_without_any_more_files(lends):
    loan = lends.lend("key", multiprocessing.Lock)
    assert loan.ask("value") == 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        lends.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with pytest.raises(RuntimeError, match="has ended"):
        loan.ask("value")
    with pytest.raises(RuntimeError, match="has ended"):
        loan.ask("value")


def test_workers_end_whatever_becomes_of_what_they_have_borrowed():
    ended = []

    def fail():
        raise OSError("too many open files")

    core = SimpleNamespace(close=lambda: ended.append("core"))
    loans = SimpleNamespace(close=fail)
    supervisor = SimpleNamespace(hang_up=fail, close=lambda: ended.append("hosts"))
    with pytest.raises(OSError, match="too many"):
        engine._close(os.getpid(), core, supervisor, loans)
    assert ended == ["core", "hosts"]


@pytest.mark.parametrize("make", [multiprocessing.Lock, lambda: multiprocessing.RawArray("i", 3)])
def test_items_are_not_inherited(make):
    with Pool(1) as pool, pytest.raises(SerializeError, match=r"multiprocessing\.Manager\(\)"):
        pool.map(str, [make()])


@pytest.mark.parametrize(
    "make", [multiprocessing.Lock, multiprocessing.Queue, lambda: multiprocessing.Value("i")]
)
def test_a_host_says_that_it_inherits_nothing(hosts, make):
    given = {"initializer": repr, "initargs": (make(),), "ssh_config": hosts.ssh_config}
    told = r"not on this host.*multiprocessing\.Manager\(\)"
    with Executor(0, "h1*1", config=(), **given) as executor, pytest.raises(Exception, match=told):
        executor.submit(abs, 1).result(60)


def test_process_map_of_tqdm(monkeypatch):
    concurrent = pytest.importorskip("tqdm.contrib.concurrent")
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Executor)
    monkeypatch.setattr("concurrent.futures.process.ProcessPoolExecutor", Executor)
    assert concurrent.process_map(abs, [-1, 2, -3], max_workers=2, disable=True) == [1, 2, 3]


def take_in_child(lock):
    with lock:
        child = multiprocessing.Process(target=lambda: os._exit(lock.acquire(False)))
        child.start()
        child.join()
        return child.exitcode


def test_a_child_of_a_task_does_not_hold_what_its_parent_holds():
    lock = multiprocessing.RLock()
    with Pool(1) as pool:
        assert pool.map(lambda x: take_in_child(lock), [1]) == [0]
