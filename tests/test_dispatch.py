"""Chunks, windows and retries, on our own executor and on anyone's."""

from __future__ import annotations

import itertools
import operator
import os
import signal
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import faults
import functions
import pytest
from foreign import FOREIGN, open_foreign, processes

from ostap_parallel import Executor as OurExecutor
from ostap_parallel import SerializeError, TaskMerger, WorkerLost, WorkManager
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.runs.chunking import ChunkSize
from ostap_parallel.runs.outcome import Batch
from ostap_parallel.runs.run import Run
from ostap_parallel.worker.execute import Call


@pytest.fixture(scope="module")
def ours():
    with OurExecutor(2) as executor:
        yield executor


@pytest.fixture(scope="module", params=["ours", *FOREIGN])
def executor(request):
    opened = OurExecutor(2) if request.param == "ours" else open_foreign(request.param)
    with opened as executor:
        yield executor


@pytest.fixture
def wm(executor):
    with WorkManager(executor=executor, silent=True) as manager:
        yield manager


class Unlucky(Exception):
    pass


def unlucky(item):
    if item == 13:
        raise Unlucky(item)
    return item


class TestAnyExecutor:
    """One contract for all of them."""

    def test_results(self, wm):
        assert wm.process(functions.square, range(200)) == [x * x for x in range(200)]
        assert wm.process(functions.square, range(200), merger=TaskMerger()) == 2646700
        assert sorted(wm.iexecute(functions.square, iter(range(50)))) == [x * x for x in range(50)]
        assert wm.report.complete

    def test_lambdas_and_closures(self, wm):
        offset = 5
        assert wm.process(lambda x: x + offset, range(10)) == list(range(5, 15))

    def test_job_ids_seeds_and_shared_data(self, wm):
        assert wm.process(functions.with_index, "ab", jobid=True) == [(0, "a"), (1, "b")]
        assert wm.process(pow, [1, 2], shared={"exp": 3, "mod": 5}) == [1, 3]

    def test_no_items(self, wm):
        assert wm.process(functions.square, []) == []

    def test_errors_arrive_as_themselves(self, wm):
        with pytest.raises(Unlucky) as caught:
            wm.process(unlucky, range(20))
        assert caught.value.args == (13,)
        assert "in unlucky" in str(caught.value.__cause__)

    def test_errors_are_collected(self, wm):
        wm.process(unlucky, range(20), on_error="collect")
        assert (wm.report.merged, wm.report.failed) == (19, 1)
        assert wm.report.failures[0].index == 13

    def test_what_cannot_be_sent(self, wm):
        items = [1, functions.Unsendable(), 3, functions.Unreadable(), 5]
        found = wm.process(functions.same, items, on_error="collect")
        assert [found[n] for n in (0, 2, 4)] == [1, 3, 5]
        assert isinstance(wm.report.failures[0].error, SerializeError)

    def test_an_infinite_input(self, wm):
        pulled = itertools.count()
        results = wm.iexecute(functions.same, pulled, chunk_size=3)
        taken = {next(results) for _ in range(20)}
        assert len(taken) == 20
        results.close()
        assert next(pulled) <= 20 + 3 * 4 + 3

    def test_it_outlives_the_manager(self, executor):
        with WorkManager(executor=executor, silent=True) as short:
            assert short.process(functions.square, [2]) == [4]
        assert executor.submit(functions.square, 3).result(functions.PATIENCE) == 9

    def test_workers_and_pool(self, executor, wm):
        assert wm.workers == {type(executor).__name__: 2}
        assert wm.wait_for_hosts(0)
        with pytest.raises(TypeError, match="ParallelPool"):
            _ = wm.pool


def run_items(executor, function, items, **settings):
    return outcomes(Run(backend_of(executor), Call(function), items, **settings))


def outcomes(run):
    """Yield what arrives one by one."""
    for arrival in run.arrivals():
        yield from arrival if isinstance(arrival, Batch) else [arrival]


class Deadly:
    """Kills the worker that gets it, but not the process that made it."""

    def __init__(self):
        self.home = os.getpid()

    def __call__(self, item):
        if item == 3 and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


class TestForeignExecutors:
    @pytest.mark.slow
    def test_a_worker_that_dies_ends_the_run(self):
        # the whole pool is broken then: there is nothing to try again with
        with processes() as pool, WorkManager(executor=pool, silent=True) as wm:
            with pytest.raises(WorkerLost, match="BrokenProcessPool"):
                wm.process(Deadly(), range(10), chunk_size=1)
            with pytest.raises(WorkerLost, match="BrokenProcessPool"):
                wm.process(functions.square, range(10))

    @pytest.mark.slow
    def test_a_worker_that_dies_is_collected(self):
        with processes() as pool, WorkManager(executor=pool, silent=True) as wm:
            wm.process(Deadly(), range(4), on_error="collect", chunk_size=1)
            report = wm.report
            assert report.submitted == report.merged + report.failed == 4
            assert {type(failure.error) for failure in report.failures} == {WorkerLost}

    def test_one_that_was_shut_down(self):
        pool = ThreadPoolExecutor(1)
        pool.shutdown()
        with pytest.raises(RuntimeError, match="shutdown"):
            list(run_items(pool, functions.square, [1]))

    def test_what_is_queued_is_cancelled_when_a_run_stops(self):
        begun, go = [], threading.Event()

        class Recording(ThreadPoolExecutor):
            def submit(self, *args, **kwargs):
                future = super().submit(*args, **kwargs)
                begun.append(future)
                return future

        with Recording(1) as pool:
            outcomes = run_items(pool, functions.same, itertools.count(), chunk_size=1)
            assert next(outcomes).value == 0
            go.set()
            outcomes.close()
            assert all(future.done() for future in begun)

    def test_threads_share_a_call_that_is_prepared_once(self, tmp_path):
        class Prepared(faults.Sum):
            def __init__(self, folder):
                self.folder = str(folder)

            def worker_init(self):
                functions.note(self.folder, "prepared")
                threading.Event().wait(0.2)  # long enough for another to come

        with ThreadPoolExecutor(4) as pool, WorkManager(executor=pool, silent=True) as wm:
            assert wm.process(Prepared(tmp_path), range(8), chunk_size=1) == 28
        assert functions.attempts(tmp_path, "prepared") == 1

    def test_threads_leave_the_classes_of_the_caller_alone(self):
        class Local:
            def method(self):
                return 1

        method = Local.method
        with ThreadPoolExecutor(1) as pool, WorkManager(executor=pool, silent=True) as wm:
            assert wm.process(lambda one: one.method(), [Local()]) == [1]
        assert Local.method is method


@pytest.mark.parametrize("seconds", [0.0002, 0.0005, 0.001])
def test_the_last_chunks_are_shared_evenly(seconds):
    """No worker has a whole chunk to do when the others have nothing any more."""
    size = ChunkSize()
    for _ in range(40):
        size.adapt(seconds * 8, 8, 1e-4)
    sent, loads = 0, [0, 0]
    while sent < 32:
        loads.sort()  # the one that is done first gets the next chunk
        left = 32 - sent + (0 if all(loads) else sum(loads))
        count = min(size.choose(2, 32, left, 1e-4), 32 - sent)
        loads[0] += count
        sent += count
    assert max(loads) <= 17


class Manual(Executor):
    """Runs chunks when it is told to, in the order that it is told."""

    _max_workers = 2

    def __init__(self):
        self.waiting = []
        self.sizes = []

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        self.waiting.append((future, partial(fn, *args, **kwargs)))
        return future

    def run(self, position):
        future, call = self.waiting.pop(position)
        result = call()
        self.sizes.append(len(result.answers))
        future.set_result(result)


@pytest.mark.parametrize("name", ["chunk_size", "retries", "lost_retries"])
@pytest.mark.parametrize("wrong", [-1, 1.5, "2"])
def test_numbers_that_are_none(name, wrong):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from"):
        Run(backend_of(Manual()), Call(functions.same), [], **{name: wrong})


class TestWindow:
    def test_two_chunks_per_worker(self):
        executor = Manual()
        pulled = itertools.count()
        outcomes = run_items(executor, functions.same, pulled, chunk_size=5)
        thread = threading.Thread(target=lambda: next(outcomes), daemon=True)
        thread.start()
        limit = threading.Event()
        while len(executor.waiting) < 4:
            assert not limit.wait(0.005)
        executor.run(0)
        thread.join(functions.PATIENCE)
        assert len(executor.waiting) == 3
        assert next(pulled) == 20
        for future, _ in executor.waiting:
            future.set_exception(BrokenExecutor("on purpose"))
        outcomes.close()

    @pytest.mark.parametrize("chunk_size", [1, 7, 100])
    def test_chunks_have_the_size_that_is_wanted(self, chunk_size):
        executor = Finishing()
        found = list(
            run_items(executor, functions.same, range(50), chunk_size=chunk_size, ordered=True)
        )
        assert [outcome.value for outcome in found] == list(range(50))
        whole, rest = divmod(50, chunk_size)
        assert sorted(executor.sizes) == sorted([chunk_size] * whole + [rest] * bool(rest))

    def test_sizes_grow_and_shrink(self):
        executor = Finishing()
        outcomes = run_items(executor, lambda item: item, range(100_000))
        assert sum(outcome.value for outcome in outcomes) == 4999950000
        assert executor.sizes[0] == 1
        assert max(executor.sizes) > 1000
        assert executor.sizes[-1] < max(executor.sizes)  # as short as is worth it
        assert len(executor.sizes) < 300

    def test_large_items_are_not_put_together(self):
        executor = Finishing()
        items = [bytes(3_000_000 + n) for n in range(4)]
        assert len(list(run_items(executor, len, items, chunk_size=4))) == 4
        assert max(executor.sizes) == 2

    def test_in_order_whatever_comes_first(self):
        executor = Reversing()
        outcomes = run_items(executor, functions.same, range(42), chunk_size=1, ordered=True)
        assert [outcome.index for outcome in outcomes] == list(range(42))
        executor = Reversing()
        outcomes = run_items(executor, functions.same, range(42), chunk_size=1)
        assert [outcome.index for outcome in outcomes] != list(range(42))


class Finishing(Manual):
    """Runs each chunk at once."""

    def submit(self, fn, /, *args, **kwargs):
        future = super().submit(fn, *args, **kwargs)
        self.run(0)
        return future


class Reversing(Manual):
    """Runs three chunks at a time, the second one first."""

    def submit(self, fn, /, *args, **kwargs):
        future = super().submit(fn, *args, **kwargs)
        if len(self.waiting) == 3:
            for position in 1, 0, 0:
                self.run(position)
        return future


# How the same items may be given; those of mixed kinds are packed one by one.
INPUTS = {
    "range": range,
    "list": lambda count: list(range(count)),
    "mixed": lambda count: tuple((n, f"{n}", {"n": n})[n % 3] for n in range(count)),
    "generator": lambda count: (n for n in range(count)),
    "late": lambda count: (n for n in range(count) if not time.sleep(1e-6)),
    "keys": lambda count: dict.fromkeys(range(count)),
}


@pytest.mark.slow
class TestEveryItemOnce:
    @pytest.mark.parametrize("kind", INPUTS)
    @pytest.mark.parametrize("count", [0, 1, 997])
    @pytest.mark.parametrize("chunk_size", [None, 1, 31, 10**12])
    @pytest.mark.parametrize("ordered", [True, False])
    def test_whatever_the_chunks(self, ours, kind, count, chunk_size, ordered):
        items = list(INPUTS[kind](count))
        given = INPUTS[kind](count)
        found = list(
            run_items(ours, functions.same, given, chunk_size=chunk_size, ordered=ordered)
        )
        indices = [outcome.index for outcome in found]
        assert (indices if ordered else sorted(indices)) == list(range(count))
        assert all(items[one.index] == one.item == one.value for one in found)

    @pytest.mark.parametrize("kind", ["range", "generator"])
    @pytest.mark.parametrize("ordered", [True, False])
    def test_of_a_million(self, ours, kind, ordered):
        count = 10**6
        found = bytearray(count)
        with WorkManager(executor=ours, silent=True) as wm:
            for value in wm.iexecute(functions.same, INPUTS[kind](count), ordered=ordered):
                found[value] += 1
        assert found.count(1) == count

    @pytest.mark.parametrize("combine", [False, True])
    def test_those_that_suddenly_take_long_are_shared_out(self, ours, tmp_path, combine):
        def work(seconds):
            if seconds:
                functions.note(tmp_path, os.getpid())
                time.sleep(seconds)
            return 1

        merger = TaskMerger(operator.add, combine=combine)
        with WorkManager(executor=ours, silent=True) as wm:
            assert wm.process(work, [0] * 2000, merger=merger) == 2000
            # by what is known these are best sent together
            assert wm.process(work, iter([0.4] * 8), merger=merger) == 8
        ran = {int(file.name): file.stat().st_size for file in tmp_path.iterdir()}
        assert sum(ran.values()) == 8
        assert set(ran) == set(ours.backend.pids())

    def test_each_worker_gets_some_whatever_is_known(self, ours, tmp_path):
        def work(name):
            return name and functions.meet(tmp_path, name, {"a", "b"} - {name})

        with WorkManager(executor=ours, silent=True) as wm:
            assert wm.process(work, [""] * 2000) == [""] * 2000
            # one worker would be thought enough
            assert set(wm.process(work, ["a", "b"])) == set(ours.backend.pids())

    def test_a_length_that_is_not_to_be_had(self, ours):
        with WorkManager(executor=ours, silent=True) as wm:
            assert wm.process(functions.same, functions.Bar(iter(range(5)))) == [*range(5)]

    def test_a_function_that_has_no_hash(self, ours):
        class Function:
            def __call__(self, item):
                return item

            def __hash__(self):
                raise RuntimeError("it has none")

        with WorkManager(executor=ours, silent=True) as wm:
            assert wm.process(Function(), [1, 2]) == [1, 2]

    def test_a_list_that_grows_while_it_is_read(self, ours):
        items = [0]
        found = []
        for outcome in run_items(ours, functions.same, items, chunk_size=1):
            found.append(outcome.value)
            items += [len(items)] * (len(items) < 10)
        assert sorted(found) == list(range(10))


class TestOutcomes:
    def test_of_success_and_failure(self, ours):
        found = sorted(run_items(ours, unlucky, range(12, 15)), key=lambda one: one.index)
        assert [one.item for one in found] == [12, 13, 14]
        assert [one.value for one in found] == [12, None, 14]
        assert [type(one.error) for one in found] == [type(None), Unlucky, type(None)]
        assert [one.attempts for one in found] == [1, 1, 1]
        assert {one.host for one in found} == {"local"}
        assert {one.pid for one in found} <= set(ours.backend.pids())
        assert all(one.seconds >= 0 for one in found)
        assert found[1].traceback.splitlines()[-1].endswith("Unlucky: 13")

    def test_retries_are_counted(self, ours, tmp_path):
        def work(item):
            if functions.note(tmp_path, item) < 3:
                raise OSError("not yet")
            return item

        run = Run(ours.backend, Call(work), range(4), retries=5)
        assert [one.attempts for one in outcomes(run)] == [3] * 4
        assert (run.retried, run.submitted) == (8, 4)

    def test_retries_keep_the_order(self, ours, tmp_path):
        def work(item):
            if item % 3 == 0 and functions.note(tmp_path, item) < 3:
                raise OSError("not yet")
            return item

        outcomes = run_items(ours, work, range(20), retries=2, ordered=True)
        assert [one.value for one in outcomes] == list(range(20))

    def test_a_function_travels_once_per_worker(self, ours, tmp_path):
        class Counted:
            def __init__(self):
                self.folder = str(tmp_path)

            def __setstate__(self, state):
                self.__dict__.update(state)
                functions.note(self.folder, os.getpid())

            def __call__(self, item):
                return item

        outcomes = run_items(ours, Counted(), range(100), chunk_size=1)
        assert sum(one.value for one in outcomes) == 4950
        read = {int(file.name): file.stat().st_size for file in Path(tmp_path).iterdir()}
        assert set(read) <= set(ours.backend.pids())
        assert set(read.values()) == {1}


class TestExecutor:
    """Ours, as concurrent.futures has it."""

    def test_submit(self, ours):
        assert ours.submit(pow, 2, 3).result(functions.PATIENCE) == 8
        assert ours.submit(int, "101", base=2).result(functions.PATIENCE) == 5

    def test_map(self, ours):
        assert list(ours.map(pow, [2, 3], [3, 2])) == [8, 9]

    def test_exception(self, ours):
        error = ours.submit(divmod, 1, 0).exception(functions.PATIENCE)
        assert isinstance(error, ZeroDivisionError)

    def test_shutdown_waits(self, tmp_path):
        executor = OurExecutor(1)
        first = executor.submit(functions.wait_for, str(tmp_path / "go"))
        second = executor.submit(functions.square, 2)
        threading.Timer(0.1, (tmp_path / "go").touch).start()
        executor.shutdown()
        assert (first.result(0), second.result(0)) == (None, 4)
        with pytest.raises(RuntimeError, match="shutdown"):
            executor.submit(functions.square, 2)

    def test_what_is_cancelled_is_not_waited_for_and_not_begun(self, tmp_path):
        executor = OurExecutor(1)
        first = executor.submit(functions.wait_for, str(tmp_path / "go"))
        second = executor.submit((tmp_path / "begun").touch)
        third = executor.submit(functions.square, 3)
        assert second.cancel()
        assert wait([second], functions.PATIENCE).done == {second}
        (tmp_path / "go").touch()
        assert (first.result(functions.PATIENCE), third.result(functions.PATIENCE)) == (None, 9)
        closing = threading.Thread(target=executor.shutdown, daemon=True)
        closing.start()
        closing.join(functions.PATIENCE)
        assert not closing.is_alive()
        assert not (tmp_path / "begun").exists()

    def test_map_that_raises_leaves_nothing_to_wait_for(self):
        def use():
            with OurExecutor(1) as executor, pytest.raises(ZeroDivisionError):
                list(executor.map(lambda x: 1 / x, range(10)))

        running = threading.Thread(target=use, daemon=True)
        running.start()
        running.join(functions.PATIENCE)
        assert not running.is_alive()

    def test_shutdown_need_not_wait(self, tmp_path):
        executor = OurExecutor(1)
        futures = [executor.submit(functions.wait_for, str(tmp_path / "never")) for _ in range(3)]
        executor.close()
        for future in futures:
            assert isinstance(future.exception(functions.PATIENCE), WorkerLost)
