"""`ostap_parallel.Pool` does what `multiprocessing.Pool` does: both pass the same tests."""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from multiprocessing.pool import Pool as Original
from pathlib import Path

import dill
import functions
import multiprocess
import pytest
from foreign import open_foreign
from helpers import importable, place_for, wait_until

from ostap_parallel import Pool, WorkerLost
from ostap_parallel.views import live

PATIENCE = functions.PATIENCE


class Refusing:
    """Raises as it is sent."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error("not me")


def failing(count):
    yield from range(count)
    raise LookupError("the input ends here")


def pids(pool):
    """Return the pids of local workers."""
    if isinstance(pool, Pool):
        return pool.backend.pids()
    return [process.pid for process in pool._pool]


def alive(workers):
    return [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists()]


@pytest.fixture(scope="module")
def open_pool(request, tmp_path_factory):
    """What makes a pool of two workers."""
    kind = request.param
    if kind == "multiprocessing":
        yield partial(get_context("spawn").Pool, 2)
    elif kind == "local":
        yield partial(Pool, 2)
    elif kind == "hosts":
        hosts = request.getfixturevalue("one_host")
        where = {"ssh_config": hosts.ssh_config, "config": (), "environment": importable(hosts)}
        yield partial(Pool, 0, servers="h1*2", **where)
    else:
        with open_foreign(kind) as executor:
            yield partial(Pool, executor=executor)


@pytest.fixture
def place(request, open_pool, tmp_path):
    """A folder as it is called here, and as workers call it."""
    return place_for(request, "servers" in open_pool.keywords, tmp_path)


ALL = pytest.mark.parametrize(
    "open_pool", ["multiprocessing", "local", "hosts", "processes"], indirect=True, scope="module"
)
HERE = pytest.mark.parametrize(
    "open_pool", ["multiprocessing", "local"], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def pool(open_pool):
    with open_pool() as pool:
        if pool._processes == 0:
            assert pool.backend.wait_for_hosts(PATIENCE)
        yield pool


@ALL
class TestInterface:
    @pytest.mark.parametrize("chunksize", [None, 1, 3, 100])
    def test_maps(self, pool, chunksize):
        wanted = [x * x for x in range(10)]
        sizes = {} if chunksize is None else {"chunksize": chunksize}
        for items in range(10), iter(range(10)):
            assert pool.map(functions.square, items, **sizes) == wanted
        pairs = [(x, x) for x in range(10)]
        assert pool.starmap(functions.add, pairs, **sizes) == [2 * x for x in range(10)]
        assert pool.map_async(functions.square, range(10), **sizes).get(PATIENCE) == wanted
        assert pool.starmap_async(functions.add, ([x] for x in range(3)), **sizes).get() == [
            10,
            11,
            12,
        ]
        assert list(pool.imap(functions.square, iter(range(10)), **sizes)) == wanted
        assert sorted(pool.imap_unordered(functions.square, range(10), **sizes)) == wanted

    def test_of_nothing(self, pool):
        assert pool.map(functions.square, []) == pool.starmap(functions.add, iter(())) == []
        assert pool.map_async(functions.square, ()).get(PATIENCE) == []
        for iterate in pool.imap, pool.imap_unordered:
            assert list(iterate(functions.square, [])) == []

    def test_apply(self, pool):
        assert pool.apply(functions.add, (1,), {"b": 2}) == 3
        assert pool.apply(functions.add, [1]) == 11
        assert pool.apply_async(functions.add, (1,), {"b": 2}).get(timeout=PATIENCE) == 3

    def test_results_that_are_not_there_yet(self, pool, place):
        here, there = place
        work = partial(functions.late, f"{there}/go")
        results = [pool.apply_async(work, (0,)), pool.map_async(work, [0, 1])]
        iterator = pool.imap(work, [0])
        for result in results:
            result.wait(0.01)
            assert not result.ready()
            with pytest.raises(ValueError, match="not ready"):
                result.successful()
            with pytest.raises(multiprocessing.TimeoutError):
                result.get(0.01)
        with pytest.raises(multiprocessing.TimeoutError):
            iterator.next(timeout=0.01)
        (here / "go").touch()
        assert [result.get(PATIENCE) for result in results] == [0, [0, 1]]
        assert all(result.ready() and result.successful() for result in results)
        assert iterator.next(PATIENCE) == 0
        for _ in range(2):
            with pytest.raises(StopIteration):
                iterator.next()

    def test_callbacks_are_called_before_a_result_is_ready(self, pool):
        seen = []
        both = {"callback": seen.append, "error_callback": seen.append}
        for begin, function, items in (
            (pool.apply_async, functions.add, (1, 2)),
            (pool.map_async, abs, [-1, -2]),
            (pool.starmap_async, functions.add, [(1, 2)]),
        ):
            result = begin(function, items, **both)
            result.wait(PATIENCE)
            assert seen.pop() == result.get()
        result = pool.map_async(int, ["x"], **both)
        result.wait(PATIENCE)
        assert isinstance(seen.pop(), ValueError)
        assert not result.successful()
        pool.apply_async(divmod, (1, 0), **both).wait(PATIENCE)
        assert isinstance(seen.pop(), ZeroDivisionError)
        assert not seen

    def test_an_exception_is_that_of_the_task(self, pool):
        for call in (
            lambda: pool.map(functions.refuse, [1, 2, 3]),
            lambda: pool.apply(functions.refuse, (3,)),
            lambda: pool.map_async(functions.refuse, [3]).get(PATIENCE),
            lambda: next(pool.imap(functions.refuse, [3])),
            lambda: next(pool.imap_unordered(functions.refuse, [3])),
        ):
            with pytest.raises(functions.Refusal) as caught:
                call()
            assert (caught.value.item, caught.value.reason) == (3, "divisible")
            assert type(caught.value.__cause__) is multiprocessing.pool.RemoteTraceback
            assert "raise Refusal(item" in str(caught.value.__cause__)
            assert "raise Refusal(item" in caught.value.__cause__.tb

    def test_each_worker_has_a_name_and_a_number(self, pool):
        found = dict(pool.map(functions.identity, range(20), 1))
        assert len(set(found.values())) == len(found)  # of each process
        assert all(name != "MainProcess" and number > 0 for name, number in found.values())

    def test_imap_goes_on_behind_an_exception(self, pool):
        iterator = pool.imap(functions.refuse, range(1, 5))
        assert [next(iterator), next(iterator)] == [1, 2]
        with pytest.raises(functions.Refusal):
            next(iterator)
        assert list(iterator) == [4]

    @pytest.mark.parametrize("count", [0, 5])
    def test_an_input_that_raises(self, pool, count):
        for call in pool.map, pool.map_async:
            with pytest.raises(LookupError, match="the input"):
                call(functions.same, failing(count), 1)
        for iterate in pool.imap, pool.imap_unordered:
            iterator, found = iterate(functions.same, failing(count), 1), []
            with pytest.raises(LookupError, match="the input"):
                found.extend(iterator)
            found.extend(iterator)  # the original's imap_unordered may be early with the error
            assert sorted(found) == list(range(count))

    @pytest.mark.parametrize(("count", "whole"), [(7, 6), (8, 8), (1, 0)])
    def test_a_chunk_whose_input_raises_is_dropped(self, pool, count, whole):
        iterator = pool.imap(functions.same, failing(count), 2)
        assert [next(iterator) for _ in range(whole)] == list(range(whole))
        with pytest.raises(LookupError, match="the input"):
            next(iterator)

    def test_results_come_before_the_next_item(self, pool):
        for iterate, wrap in (
            (pool.imap, iter),
            (pool.imap_unordered, iter),
            (pool.imap, functions.Bar),
        ):
            taken = threading.Semaphore()

            def items(taken=taken):
                for number in range(5):
                    assert taken.acquire(timeout=PATIENCE)
                    yield number

            for number, result in enumerate(iterate(functions.same, wrap(items()))):
                assert result == number
                taken.release()

    def test_map_runs_all_items_though_one_fails(self, pool, place):
        here, there = place
        with pytest.raises(LookupError, match="the first"):
            pool.map(partial(functions.refuse_noted, there), range(20), 1)
        assert {path.name for path in here.iterdir()} == set(map(str, range(20)))

    def test_it_takes_the_place_of_the_original(self, pool):
        assert isinstance(pool, Original)
        assert pool._processes == 2
        assert "state=RUN pool_size=2" in repr(pool)

    @pytest.mark.parametrize("pickler", [pickle, dill])
    def test_it_does_not_travel(self, pool, pickler):
        with pytest.raises(NotImplementedError, match="cannot be passed between processes"):
            pickler.dumps(pool)

    def test_wrong_arguments(self, pool):
        for iterate in pool.imap, pool.imap_unordered:
            with pytest.raises(ValueError, match="1"):
                iterate(functions.same, [1], chunksize=0)
        for name in "map", "starmap", "map_async", "imap", "imap_unordered":
            with pytest.raises(TypeError):
                getattr(pool, name)(functions.same, [1], chunksize="a")
        with pytest.raises(TypeError, match="iter"):
            pool.map(functions.same, 5)

    @pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, pickle.PicklingError])
    def test_what_an_item_raises_as_it_is_sent(self, pool, error):
        item = Refusing(error)
        with pytest.raises(error):
            pool.map(functions.same, [item] * 3)
        with pytest.raises(error):
            pool.apply_async(functions.same, [item]).get(PATIENCE)

    def test_how_much_is_left(self, pool, place):
        here, there = place
        before = len(pool._cache)
        result = pool.map_async(partial(functions.late, f"{there}/left"), [0] * 4, 1)
        assert isinstance(result, AsyncResult)
        assert (result._number_left, result._chunksize) == (4, 1)
        assert pool._cache
        (here / "left").touch()
        assert result.get(PATIENCE) == [0] * 4
        assert result._number_left == 0
        wait_until(lambda: len(pool._cache) <= before, PATIENCE, "an empty cache")
        wait_until(lambda: pool._taskqueue.qsize() == 0, PATIENCE, "an empty queue")


@ALL
class TestLife:
    @pytest.mark.parametrize("end", ["close", "terminate"])
    def test_after_the_end(self, open_pool, end):
        with open_pool() as pool:
            with pytest.raises(ValueError, match="Pool is still running"):
                pool.join()
            assert pool.map(functions.same, [1]) == [1]
            for _ in range(2):
                getattr(pool, end)()
            for name in "apply", "apply_async":
                with pytest.raises(ValueError, match="Pool not running"):
                    getattr(pool, name)(functions.add, (1,))
            for name in (
                *("map", "map_async", "starmap", "starmap_async"),
                *("imap", "imap_unordered"),
            ):
                with pytest.raises(ValueError, match="Pool not running"):
                    getattr(pool, name)(functions.same, [1])
            with pytest.raises(ValueError, match="Pool not running"):
                pool.__enter__()
            pool.join()
        pool.terminate()
        pool.close()
        pool.join()

    def test_what_is_under_way_ends_after_close(self, open_pool, place):
        (here, there), seen = place, []
        go = f"{there}/go"
        with open_pool() as pool:
            iterator = pool.imap(functions.same, range(2000))
            pool.imap_unordered(partial(functions.note, there), ["dropped"])
            results = [
                pool.apply_async(functions.late, (go, i), callback=seen.append) for i in range(4)
            ]
            results.append(pool.map_async(partial(functions.late, go), range(4), 1, seen.append))
            pool.close()
            (here / "go").touch()
            pool.join()
            assert [result.get(0) for result in results] == [0, 1, 2, 3, [0, 1, 2, 3]]
            assert sorted(map(str, seen)) == ["0", "1", "2", "3", "[0, 1, 2, 3]"]
            assert list(iterator) == list(range(2000))
        assert functions.attempts(here, "dropped") == 1


@HERE
class TestProcesses:
    def test_terminate_is_quick(self, open_pool, tmp_path):
        pool = open_pool()
        result = pool.map_async(partial(functions.late, tmp_path / "never"), [0] * 1000, 1)
        pool.imap(functions.same, itertools.repeat(1, 10_000))
        workers = pids(pool)
        pool.terminate()
        pool.join()
        assert not result.ready() or not result.successful()
        assert not alive(workers)

    def test_they_can_be_looked_at_and_waited_for(self, open_pool):
        with open_pool() as pool:
            workers = list(pool._pool)
            assert {os.getpid()}.isdisjoint(worker.pid for worker in workers)
            assert pool.apply(functions.pid_of, (1,)) in [worker.pid for worker in workers]
            assert len({worker.name for worker in workers}) == 2
            for worker in workers:
                assert (worker.is_alive(), worker.exitcode, worker.daemon) == (True, None, True)
                worker.join(0)
                assert worker.is_alive()
        pool.join()
        for worker in workers:
            worker.join(PATIENCE)
            assert not worker.is_alive()
            assert worker.exitcode is not None

    @pytest.mark.parametrize(("end", "number"), [("terminate", "TERM"), ("kill", "KILL")])
    def test_they_can_be_ended_and_others_come(self, open_pool, end, number):
        with open_pool() as pool:
            first = pool._pool[0]
            getattr(first, end)()
            first.join(PATIENCE)
            # the original's own thread may have been told before this one, and have it set later
            wanted = -getattr(signal, f"SIG{number}")
            wait_until(lambda: first.exitcode == wanted, PATIENCE, "the exit code")
            wait_until(
                lambda: first.pid not in (now := pids(pool)) and len(now) == 2,
                PATIENCE,
                "another worker",
            )
            pool._repopulate_pool()
            assert len(pool._pool) == 2
            assert sorted(pool.map(functions.same, range(4), 1)) == [0, 1, 2, 3]

    @pytest.mark.slow
    def test_an_initializer(self, open_pool):
        with open_pool(initializer=set_variable, initargs=("x",)) as pool:
            assert set(pool.map(get_variable, range(20), 1)) == {"x"}
        with pytest.raises(TypeError, match="initializer must be"):
            open_pool(initializer="x")

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, {"maxtasksperchild": 1}])
    def test_an_initializer_runs_in_each_worker_though_there_are_no_tasks(
        self, open_pool, options, tmp_path
    ):
        pool = open_pool(initializer=note_process, initargs=(tmp_path,), **options)
        workers = pids(pool)
        pool.close()
        pool.join()
        assert sorted(int(path.name) for path in tmp_path.iterdir()) == sorted(workers)

    @pytest.mark.slow
    def test_workers_meet_in_the_initializer_though_there_is_one_task(self, open_pool):
        with get_context("spawn").Manager() as manager:
            meeting = manager.Barrier(2)
            with open_pool(initializer=meet, initargs=(meeting,)) as pool:
                assert pool.apply(functions.same, (1,)) == 1

    @pytest.mark.slow
    def test_workers_are_replaced(self, open_pool):
        with open_pool(maxtasksperchild=2) as pool:
            pids = pool.map(functions.pid_of, range(12), 1)
            assert max(map(pids.count, pids)) <= 2
            pool.close()
            pool.join()
        for wrong in 0, -1, "12":
            with pytest.raises(ValueError, match=r"."):
                open_pool(maxtasksperchild=wrong)

    def test_wrong_numbers(self, open_pool):
        for wrong in 0, -1:
            with pytest.raises(ValueError, match=r"."):
                open_pool.func(wrong)
        for wrong in "2", 1.5, [1]:
            with pytest.raises(TypeError):
                open_pool.func(wrong)

    def test_items_and_results_are_released(self, open_pool):
        with open_pool() as pool:
            items = [functions.Refusal(1, 2) for _ in range(5)]
            references = [weakref.ref(item) for item in items]
            results = pool.map(functions.same, items)
            references += [weakref.ref(result) for result in results]
            del items, results
            wait_until(
                lambda: gc.collect() >= 0 and not any(ref() for ref in references), 5, "release"
            )

    def test_a_pool_that_is_not_closed_says_so(self, open_pool):
        forgotten = [open_pool()]
        workers = pids(forgotten[0])
        with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
            forgotten.clear()
        wait_until(lambda: not alive(workers), PATIENCE, "the workers to end")


def set_variable(value):
    os.environ["TEST_VARIABLE"] = value


def note_process(where):
    (where / str(os.getpid())).touch()


def meet(barrier):
    barrier.wait(PATIENCE)


def get_variable(item):
    return os.environ.get("TEST_VARIABLE")


@pytest.fixture(scope="module")
def ours():
    with Pool(2) as pool:
        yield pool


class TestOurs:
    def test_endless_input_is_read_as_results_are_taken(self, ours):
        pulled = []

        def endless():
            for number in itertools.count():
                pulled.append(number)
                yield number

        iterator = ours.imap(functions.same, endless(), chunksize=3)
        assert [next(iterator) for _ in range(1000)] == list(range(1000))
        assert len(pulled) < 1000 + 400
        iterator.cancel()

    def test_lambdas_and_prints(self, ours, capsys):
        offset = 5
        assert ours.map(lambda x: x + offset, [1, 2]) == [6, 7]
        assert ours.apply(lambda x: print("from", x), ("there",)) is None
        ours.map(print, ["mapped"])
        assert capsys.readouterr().out == "from there\nmapped\n"

    def test_how_much_waits(self, tmp_path):
        work = partial(functions.late, tmp_path / "go")
        with Pool(2) as pool:
            results = [pool.apply_async(work, (0,)) for _ in range(5)]
            assert pool._taskqueue.qsize() == 3
            assert not pool._taskqueue.empty()
            (tmp_path / "go").touch()
            assert [result.get(PATIENCE) for result in results] == [0] * 5

    @pytest.mark.parametrize("error", [multiprocess.TimeoutError, multiprocessing.TimeoutError])
    def test_both_errors_of_time_are_raised(self, ours, tmp_path, error):
        work = partial(functions.late, tmp_path / "go")
        result, iterator = ours.apply_async(work, (0,)), ours.imap(work, [0])
        with pytest.raises(error):
            result.get(0.01)
        with pytest.raises(error):
            iterator.next(0.01)
        (tmp_path / "go").touch()
        assert (result.get(PATIENCE), iterator.next(PATIENCE)) == (0, 0)
        iterator.cancel()  # which an error that is kept may keep

    def test_what_cannot_be_sent_is_named(self, ours):
        result = ours.apply_async(functions.same, (functions.Unsendable(),))
        with pytest.raises(pickle.PicklingError, match="the call of same"):
            result.get(PATIENCE)
        with pytest.raises(pickle.PicklingError, match=r"the result of item 0 \(a Unsendable\)"):
            ours.map(lambda _: functions.Unsendable(), [1])

    def test_a_worker_that_dies(self, ours):
        with pytest.raises(WorkerLost, match="SIGKILL"):
            ours.apply_async(functions.die, ("kill",)).get(PATIENCE)
        assert ours.map(functions.same, [1]) == [1]

    def test_an_input_that_exits(self, ours):
        iterator = ours.imap(functions.same, (exit("no more") for _ in "a"))
        with pytest.raises(SystemExit, match="no more"):
            iterator.next(PATIENCE)

    @pytest.mark.parametrize("error", [LookupError, SystemExit])
    def test_a_callback_that_fails_harms_no_other(self, ours, caplog, error):
        def fail(value):
            raise error("the callback's own")

        assert ours.apply_async(functions.add, (1,), callback=fail).get(PATIENCE) == 11
        assert "the callback's own" in caplog.text
        seen = []
        assert ours.apply_async(functions.add, (1,), callback=seen.append).get(PATIENCE) == 11
        assert seen == [11]

    def test_terminate_tells_who_waits(self, tmp_path):
        seen = []
        with Pool(1) as pool:
            work = partial(functions.late, tmp_path / "never")
            results = [
                pool.map_async(work, [0] * 9, 1, seen.append, seen.append),
                pool.apply_async(work, (0,), {}, seen.append, seen.append),
            ]
            iterator = pool.imap(work, [0] * 9)
        for get in results[0].get, results[1].get, iterator.next:
            with pytest.raises(CancelledError):
                get(PATIENCE)
        assert seen == []

    def test_ctrl_c_stops_what_is_waited_for(self, ours, tmp_path):
        def interrupt(iterator):
            wait_until(lambda: iterator._buffer.changed._waiters, PATIENCE, "somebody to wait")
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        iterator = ours.imap(partial(functions.late, tmp_path / "never"), [0])
        threading.Thread(target=interrupt, args=[iterator]).start()
        with pytest.raises(KeyboardInterrupt):
            iterator.next(PATIENCE)
        wait_until(lambda: not ours._under_way, PATIENCE, "it to end")

    def test_a_forgotten_pool_ends_when_its_work_is_done(self, tmp_path):
        result = Pool(1).map_async(partial(functions.late, tmp_path / "go"), [0])
        iterator = Pool(1).imap(functions.same, range(9))
        (tmp_path / "go").touch()
        assert result.get(PATIENCE) == [0]
        assert list(iterator) == list(range(9))
        del result, iterator
        pool = Pool(1)
        pool.imap(functions.same, itertools.count())
        workers = pids(pool)
        del pool
        wait_until(lambda: not alive(workers), PATIENCE, "the workers to end")

    def test_an_executor_of_the_user_s(self, tmp_path):
        work = partial(functions.late, tmp_path / "go")
        with ThreadPoolExecutor(2) as threads:
            with Pool(executor=threads) as pool:
                assert pool.apply(lambda x: x + 1, (1,)) == 2
                assert next(pool.imap(functions.same, itertools.count())) == 0
            with Pool(executor=threads) as pool:
                results = [pool.apply_async(work, (0,)) for _ in range(9)]
            (tmp_path / "go").touch()
            with pytest.raises(CancelledError):
                results[-1].get(PATIENCE)
            assert threads.submit(abs, -1).result(PATIENCE) == 1
            with pytest.raises(TypeError, match=r"leave out.*ncpus"):
                Pool(2, executor=threads)

    def test_a_script_that_just_ends(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "import itertools, time\n"
            "from ostap_parallel import Pool\n"
            "pool = Pool(2)\n"
            "endless = pool.imap(abs, itertools.count())\n"
            "print(next(endless))\n"
            "waiting = pool.map_async(time.sleep, [1000] * 9)\n"
            "pool.apply_async(time.sleep, (1000,), callback=print)\n"
        )
        assert functions.run_python("-W", "ignore", script, cwd=tmp_path) == "0\n"

    def test_a_fork_has_no_pool(self):
        with Pool(1) as pool:
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    pool.map(abs, [-1])
                except RuntimeError as exc:
                    os.write(writer, str(exc).encode())
                finally:
                    os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as file:
                assert "not its forks" in file.read()
            os.waitpid(pid, 0)
            assert pool.map(abs, [-1]) == [1]

    def test_a_fork_asks_nothing_of_an_engine(self):
        with Pool(1) as pool:
            engine = pool.backend
            reader, writer = os.pipe()
            pid = _fork_while_another_thread_has(engine._core.loop.lock)
            if pid == 0:
                _ask_in_a_fork(engine, writer)
            os.close(writer)
            with os.fdopen(reader) as told:
                assert told.read() == "RuntimeError RuntimeError RuntimeError None"
            os.waitpid(pid, 0)

    def test_one_that_has_ended_with_the_program_is_closed_without_a_thread(self, monkeypatch):
        pool = Pool(1)
        pool._terminate()  # as at the exit of the interpreter, after which some __del__ closes it

        def refuse(thread):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        pool.close()
        pool.join()

    def test_a_context_has_no_effect(self):
        with pytest.warns(UserWarning, match="context= has no effect"):
            pool = Pool(2, context=get_context("spawn"))
        with pool:
            assert len(pool._pool) == 2
            assert pool.map(abs, [-1]) == [1]

    def test_settings_are_checked_before_anything_starts(self):
        with pytest.raises(ValueError, match="at least 1"):
            Pool(-1)
        with pytest.raises(TypeError, match="no_such"):
            Pool(1, no_such=1)


def _fork_while_another_thread_has(lock):
    is_held, may_go = threading.Event(), threading.Event()

    def hold():
        with lock:
            is_held.set()
            may_go.wait(PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait(PATIENCE)
    pid = os.fork()
    if pid:
        may_go.set()
        holder.join()
    return pid


def _ask_in_a_fork(engine, writer):
    signal.alarm(10)
    told = []
    questions = [
        engine.pids,
        partial(engine.set_ncpus, 2),
        partial(engine.set_constant, "name", 1),
        engine.give_up,
    ]
    for question in questions:
        try:
            told.append(str(question()))
        except RuntimeError as exc:
            told.append(type(exc).__name__)
    os.write(writer, " ".join(told).encode())
    os._exit(0)


def _keep(shared):
    global _kept
    _kept = shared


def _add(value):
    _kept.append(value)
    return len(_kept)


def test_initializers_are_no_work_of_the_pool():
    event = multiprocessing.Event()
    with Pool(2, event.wait) as pool:
        assert pool._cache == {}
        event.set()
        assert pool.apply(abs, (-1,)) == 1


def test_what_a_manager_has_only_for_workers_lasts_as_long_as_they_may_start():
    manager = multiprocessing.Manager()
    with manager, Pool(1, _keep, (manager.list(),), maxtasksperchild=1) as pool:
        assert [pool.apply(_add, (n,)) for n in range(3)] == [1, 2, 3]


def test_maps_are_told_of_to_who_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "DELAY", 0.05)
    go = tmp_path / "go"

    def told():
        return [run for run in live.runs() if run["process"] == os.getpid()]

    with Pool(1) as pool:
        result = pool.starmap_async(functions.wait_for, [(go, 60.0)])
        try:
            (run,) = wait_until(
                lambda: [one for one in live.runs() if one["process"] == os.getpid()],
                60.0,
                "it tells",
            )
        finally:
            go.touch()
        assert result.get(60.0) == [None]
    assert (run["title"], run["total"], run["done"]) == ("wait_for", 1, 0)


class TestAsyncio:
    def test_results(self, ours):
        async def main():
            async with Pool(1) as pool:
                one = await pool.apply_async(functions.add, (1,))
                with pytest.raises(functions.Refusal):
                    await pool.map_async(functions.refuse, [1, 3])
            results = [result async for result in ours.imap(functions.square, range(5))]
            with pytest.raises(ValueError, match="not running"):
                pool.map(functions.add, [1])
            return one, results, await asyncio.gather(*(ours.map_async(abs, [-i]) for i in (1, 2)))

        assert asyncio.run(main()) == (11, [0, 1, 4, 9, 16], [[1], [2]])

    def test_several_share_the_results(self, ours):
        async def main():
            results = ours.imap_unordered(functions.same, range(200), 1)

            async def take():
                return [result async for result in results]

            return await asyncio.gather(*(take() for _ in range(3)))

        assert sorted(itertools.chain(*asyncio.run(main()))) == list(range(200))

    def test_cancelling_ends_the_work(self, ours, tmp_path):
        async def main():
            for awaitable in (
                ours.apply_async(functions.late, (tmp_path / "never", 0)),
                ours.map_async(partial(functions.late, tmp_path / "never"), [0] * 9, 1),
            ):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(awaitable, 0.05)
            async for _ in ours.imap(functions.same, itertools.count()):
                break
            return await ours.apply_async(functions.add, (1,))

        assert asyncio.run(main()) == 11
        wait_until(lambda: not ours._under_way, PATIENCE, "all to end")
