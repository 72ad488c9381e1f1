"""`ostap_parallel.Executor` is a `concurrent.futures.Executor`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import os
import pickle
import time
import weakref
from concurrent.futures import ALL_COMPLETED, BrokenExecutor, CancelledError, as_completed, wait
from multiprocessing import get_context

import functions
import pytest
from functions import PATIENCE, note, run_python, wait_for
from helpers import wait_until

from ostap_parallel import Executor, InitializerError, SerializeError, ServersUnavailable
from ostap_parallel.machine.spawner import Spawner
from ostap_parallel.views import live

SETTING = """
import os
from ostap_parallel import Executor, WorkManager

chosen, table, untouched = None, {}, ["mine"]

def set_up(value):
    global chosen
    chosen = value
    table[value] = os.getpid()
    untouched

def look(item):
    return chosen, table == {chosen: os.getpid()}, untouched, helper()

def helper():
    return chosen

class Looking:
    def __call__(self, item):
        return look(item)

if __name__ == "__main__":
    with Executor(2, initializer=set_up, initargs=("it",)) as executor:
        untouched.append("too")
        wanted = "it", True, ["mine", "too"], "it"  # what is changed here counts
        assert executor.submit(look, 0).result() == wanted
        manager = WorkManager(executor=executor, silent=True)
        assert manager.process(look, range(9)) == [wanted] * 9
        assert manager.process(Looking(), range(9)) == [wanted] * 9
        assert chosen is None and not table
"""


def test_functions_of_a_script_see_what_the_initializer_has_set(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SETTING)
    run_python(script, cwd=tmp_path)


@pytest.mark.slow
def test_the_initializer_runs_once_per_process_and_what_it_has_set_up_stays(hosts, ssh_config):
    def set_up():
        os.environ["NUMBER"] = str(int(os.environ.get("NUMBER", 0)) + 1)

    with Executor(1, "h1*1", ssh_config=ssh_config, config=(), initializer=set_up) as executor:
        assert executor.wait_for_hosts(30)
        futures = [executor.submit(os.getenv, "NUMBER") for _ in range(20)]
        assert {future.result(30) for future in futures} == {"1"}


INITIALIZED = """\
import decimal, os, signal, sys, time
from ostap_parallel import Executor, Pool

class Late(Exception):
    pass

def late(number, frame):
    raise Late

def set_up():
    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    decimal.getcontext().prec = 7
    sys.setrecursionlimit(4321)
    os.environ["MARK"] = "set"

def look(x):
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(60)
    except Late:
        return decimal.getcontext().prec, sys.getrecursionlimit(), os.environ["MARK"]

def other(x):
    return decimal.getcontext().prec

with Executor(1, initializer=set_up) as executor, Pool(1, set_up) as pool:
    for _ in range(2):
        assert list(executor.map(look, [1])) == pool.map(look, [1]) == [(7, 4321, "set")]
        assert executor.submit(look, 1).result() == pool.apply(look, (1,)) == (7, 4321, "set")
        assert list(executor.map(other, [1])) == pool.map(other, [1]) == [7]
"""


@pytest.mark.slow
def test_what_an_initializer_has_set_holds_for_calls_and_maps(tmp_path):
    (tmp_path / "script.py").write_text(INITIALIZED)
    run_python("script.py", cwd=tmp_path)


@pytest.mark.slow
def test_what_an_initializer_is_given_travels_once_per_worker(hosts, ssh_config):
    class Large:
        def __init__(self):
            self.content = bytes(1_000_000)

        def __setstate__(self, state):
            self.__dict__.update(state)
            os.environ["READ"] = f"{os.environ.get('READ', '')}{len(self.content)} "

    settings = {"ssh_config": ssh_config, "config": (), "initializer": lambda large: None}
    with Executor(1, "h1*1", initargs=(Large(),), **settings) as executor:
        assert executor.wait_for_hosts(30)
        for _ in range(3):
            assert set(executor.map(lambda n: os.environ["READ"], range(100))) == {"1000000 "}
        futures = [executor.submit(os.getenv, "READ") for _ in range(20)]
        assert {future.result(30) for future in futures} == {"1000000 "}


def test_workers_stay_that_an_initializer_has_set_up(monkeypatch):
    monkeypatch.setattr(Spawner, "look", lambda self: True)  # a library was imported just now
    with Executor(2, initializer=abs, initargs=(1,)) as executor:
        for greeted in executor.backend.greetings.futures:
            greeted.result(PATIENCE)
        before = [*executor._processes]
        executor.backend._core._crew.look()
        assert [*executor._processes] == before


def test_an_initializer_that_fails_breaks_the_executor():
    def fail():
        raise LookupError("not here")

    with Executor(1, initializer=fail) as executor:
        for _ in range(2):
            with pytest.raises(InitializerError, match="LookupError: not here") as info:
                executor.submit(abs, 1).result(30)
            assert isinstance(info.value, BrokenExecutor)


@pytest.mark.parametrize(
    ("initializer", "initargs", "error"),
    [(1, (), TypeError), (print, [(x for x in ())], SerializeError)],
)
def test_an_initializer_that_cannot_be_sent(initializer, initargs, error):
    with pytest.raises(error, match="initializer"):
        Executor(1, initializer=initializer, initargs=initargs)


def test_without_any_worker_it_is_broken():
    with Executor(0) as executor, pytest.raises(ServersUnavailable) as info:
        executor.submit(abs, 1)
    assert isinstance(info.value, BrokenExecutor)


def test_it_stays_where_it_is_and_tasks_have_a_stand_in(executor):
    with pytest.raises(TypeError, match="an executor stays"):
        pickle.dumps(executor)
    assert executor.submit(lambda one: list(one.map(abs, [-1])), executor).result(30) == [1]
    assert executor.submit(functions.same, [executor]).result(30)[0] is executor


def test_what_cannot_be_sent_is_the_error_of_its_future(executor):
    future = executor.submit(len, (x for x in ()))
    with pytest.raises(SerializeError, match=r"the call of len .*generator"):
        future.result(30)
    assert isinstance(future.exception(), TypeError)  # as pickle itself raises


def test_the_arguments_that_the_standard_library_has():
    with Executor(max_workers=1, max_tasks_per_child=1) as executor:
        assert executor._max_workers == 1
        first, second = (executor.submit(os.getpid).result(PATIENCE) for _ in range(2))
        assert first != second
    with pytest.warns(UserWarning, match="mp_context= has no effect"):
        Executor(max_workers=1, mp_context=get_context("spawn")).shutdown()
    with pytest.raises(ValueError, match="must be greater than 0"):
        Executor(max_workers=0)
    for name in "max_workers", "max_tasks_per_child":
        for wrong in "1", 1.5:
            with pytest.raises(TypeError, match=name):
                Executor(**{name: wrong})
    with pytest.raises(TypeError, match="give one of them"):
        Executor(2, max_workers=1)


def test_the_number_of_workers_as_programs_ask_for_it():
    with Executor(2) as executor:
        assert executor._max_workers == executor.num_workers == 2
        assert executor.bootup() is executor.bootup(wait=False) is executor
    assert executor.num_workers == 0
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.bootup()


def test_workers_can_be_looked_at_and_ended_as_in_the_standard_library(tmp_path):
    executor = Executor(2)
    found = executor._processes
    assert executor.submit(functions.pid_of, 1).result() in found
    assert [process.pid for process in found.values()] == [*found]
    wait_until(lambda: not executor._pending_work_items, PATIENCE, "nothing that is pending")
    waiting = executor.submit(functions.late, tmp_path / "never", 0)
    assert len(executor._pending_work_items) == 1
    executor.terminate_workers()
    assert waiting.exception(functions.PATIENCE) is not None
    for process in found.values():
        process.join(functions.PATIENCE)
        assert not process.is_alive()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    executor.kill_workers()


def told():
    """Return what is told of runs here of which one call is done and another one runs."""
    runs = [run for run in live.runs() if run["process"] == os.getpid()]
    return [run for run in runs if run["done"] == 1 and run["running"]]


def test_a_map_is_told_of_to_who_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "DELAY", 0.05)
    there, go = tmp_path / "there", tmp_path / "go"
    there.touch()
    with Executor(1) as executor:
        results = executor.map(wait_for, [there, go])
        try:
            (run,) = wait_until(told, PATIENCE, "the first is done, the second runs")
        finally:
            go.touch()
        assert list(results) == [None, None]
    assert (run["title"], run["total"], run["failed"]) == ("wait_for", 2, 0)
    assert [one["index"] for one in run["running"]] == [1]
    assert told() == []


def test_calls_are_told_of_to_who_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "DELAY", 0.05)
    there, go = tmp_path / "there", tmp_path / "go"
    there.touch()
    with Executor(1) as executor:
        futures = [executor.submit(wait_for, there), executor.submit(wait_for, go)]
        try:
            (run,) = wait_until(told, PATIENCE, "the first is done, the second runs")
        finally:
            go.touch()
        assert [future.result() for future in futures] == [None, None]
        assert told() == []
    assert (run["title"], run["total"]) == ("calls of an Executor", 2)
    assert [(one["index"], one["item"]) for one in run["running"]] == [(1, "wait_for")]


def test_who_tells_of_calls_keeps_nothing():
    executor = Executor(1)
    assert executor.submit(abs, -1).result() == 1
    gc.collect()  # what other tests have left
    looks = len(live.teller._looks)
    told = weakref.ref(executor._told)
    executor.shutdown()
    del executor
    gc.collect()
    assert told() is None
    assert len(live.teller._looks) == looks - 1


def test_a_setting_that_there_is_not():
    with pytest.raises(TypeError, match="pyhton"):
        Executor(1, pyhton="python3")


@pytest.fixture(scope="module")
def executor():
    with Executor(2) as executor:
        yield executor


def slow_square(item):
    time.sleep(0.01)
    return item * item


class TestSubmit:
    def test_what_the_standard_library_does_with_futures(self, executor):
        futures = [executor.submit(pow, n, 2) for n in range(10)]
        assert [future.result() for future in futures] == [n * n for n in range(10)]
        assert set(as_completed(futures, PATIENCE)) == set(futures)
        assert wait(futures, PATIENCE, ALL_COMPLETED).not_done == set()

    def test_keywords_of_any_name(self, executor):
        future = executor.submit(dict, self=1, fn=2, timeout=3)
        assert future.result(PATIENCE) == {"self": 1, "fn": 2, "timeout": 3}

    def test_callbacks_get_the_future(self, executor):
        seen = []
        future = executor.submit(abs, -1)
        future.add_done_callback(seen.append)
        wait([future], PATIENCE)
        future.add_done_callback(seen.append)
        assert seen == [future, future]

    def test_asyncio(self, executor):
        async def main():
            loop = asyncio.get_running_loop()
            many = [loop.run_in_executor(executor, pow, n, 2) for n in range(5)]
            one = asyncio.wrap_future(executor.submit(len, "abc"))
            return await asyncio.gather(*many, one)

        assert asyncio.run(main()) == [0, 1, 4, 9, 16, 3]

    @pytest.mark.parametrize("where", ["local", "h1"])
    def test_it_is_running_once_it_has_begun_and_can_be_cancelled_then(
        self, hosts, ssh_config, where
    ):
        settings = {} if where == "local" else {"servers": "h1*1", "ssh_config": ssh_config}
        with Executor(int(where == "local"), config=(), **settings) as executor:
            first, second = (executor.submit(time.sleep, PATIENCE) for _ in range(2))
            third = executor.submit(os.getpid)
            wait_until(first.running, 30, "it runs")
            assert "state=running" in repr(first)
            assert not first.cancel()
            assert not second.running()
            assert second.cancel()
            assert first.cancel(interrupt=True)
            assert first.cancelled()
            assert isinstance(third.result(PATIENCE), int)
            assert not third.cancel(interrupt=True)
            with pytest.raises(CancelledError):
                first.result()


class TestMap:
    @pytest.mark.parametrize("options", [{}, {"chunksize": 3}, {"buffersize": 4}])
    @pytest.mark.parametrize("iterables", [(), ([],), (range(100),), (range(3), [5] * 9)])
    def test_in_order_to_the_shortest(self, executor, options, iterables):
        def together(*args):
            return args

        results = executor.map(together, *map(iter, iterables), **options)
        assert list(results) == list(zip(*iterables, strict=False))

    @pytest.mark.parametrize("options", [{}, {"chunksize": 3}, {"buffersize": 4}])
    def test_arguments_that_go_together_already(self, executor, options):
        pairs = [(n, 2) for n in range(20)]
        results = executor.starmap(pow, iter(pairs), **options)
        assert list(results) == [n * n for n in range(20)]

    @pytest.mark.parametrize("is_star", [False, True])
    def test_results_as_they_come(self, executor, tmp_path, is_star):
        def after(first, item):
            if first == 0:
                wait_for(tmp_path / "go")
            return item

        how = {"chunksize": 1, "unordered": True}
        items = [0, 1, 2], "abc"
        if is_star:
            results = executor.starmap(after, zip(*items, strict=True), **how)
        else:
            results = executor.map(after, *items, **how)
        assert {next(results), next(results)} == {"b", "c"}
        (tmp_path / "go").touch()
        assert list(results) == ["a"]

    @pytest.mark.parametrize("options", [{}, {"buffersize": 3}])
    def test_an_exception_is_raised_in_its_place(self, executor, options):
        results = executor.map(divmod, [5, 6, 7, 8], [2, 2, 0, 2], **options)
        assert [next(results), next(results)] == [(2, 1), (3, 0)]
        with pytest.raises(ZeroDivisionError):
            next(results)
        with pytest.raises(StopIteration):
            next(results)

    @pytest.mark.parametrize("options", [{}, {"buffersize": 2}])
    def test_time_that_is_over_cancels_what_has_not_begun(self, executor, options, tmp_path):
        def hang(item):
            note(tmp_path, item)
            wait_for(tmp_path / "go")

        with pytest.raises(concurrent.futures.TimeoutError):
            list(executor.map(hang, range(50), timeout=0.1, **options))
        (tmp_path / "go").touch()
        executor.submit(abs, 1).result(PATIENCE)
        assert len(list(tmp_path.iterdir())) < 10

    def test_it_begins_at_once_and_goes_on_by_itself(self, executor, tmp_path):
        results = executor.map(lambda item: note(tmp_path, item), range(100))
        last = executor.submit(wait_for, tmp_path / "99")
        last.result(PATIENCE)
        assert list(results) == [1] * 100

    def test_buffersize_bounds_what_is_read_and_run(self, executor):
        read = itertools.count()
        results = executor.map(abs, (next(read) for _ in itertools.count()), buffersize=5)
        assert next(read) == 5
        assert next(results) == 0
        assert next(results) == 1
        assert next(read) == 8

    @pytest.mark.parametrize("options", [{}, {"buffersize": 3}])
    def test_a_result_that_was_taken_is_not_kept(self, executor, options):
        for result in executor.map(set, ["abc"] * 5, **options):
            last = weakref.ref(result)
            del result
            wait_until(lambda last=last: last() is None, PATIENCE, "it is freed")

    def test_leaving_it_cancels_the_rest(self, executor):
        results = executor.map(slow_square, itertools.chain(range(10**5)))
        assert next(results) == 0
        results.close()
        assert executor.submit(abs, -1).result(PATIENCE) == 1

    @pytest.mark.parametrize("options", [{}, {"buffersize": 9}])
    def test_leaving_it_interrupts_what_runs(self, executor, options):
        results = executor.map(time.sleep, [0] + [3600] * 9, **options)
        assert next(results) is None
        results.close()
        assert executor.submit(abs, -1).result(PATIENCE) == 1

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"chunksize": 0}, ValueError, "chunksize must be >= 1"),
            ({"buffersize": 0}, ValueError, "buffersize must be None or > 0"),
            ({"buffersize": "1"}, TypeError, "buffersize must be an integer or None"),
            ({"buffersize": 1, "unordered": True}, ValueError, "not with unordered"),
        ],
    )
    def test_sizes_are_checked_before_anything_is_read(self, executor, options, error, text):
        with pytest.raises(error, match=text):
            executor.map(abs, iter(lambda: pytest.fail("read"), 0), **options)


EXIT = """
import atexit
def late(moment):
    for call in (lambda: executor.submit(abs, -1).result(), lambda: pool.map(abs, [-1])):
        try: print(moment, call())
        except RuntimeError as exc: print(moment, exc)
atexit.register(late, "last")
from ostap_parallel import Executor, Pool, WorkManager
executor, pool, wm = Executor(1), Pool(1), WorkManager(1, silent=True)
for call in executor.map, pool.map, wm.process:
    assert list(call(abs, [-1])) == [1]
class Holds:
    def __init__(self): self.pool, self.itself = Pool(1), self
kept = Holds(); kept.pool.map(abs, [-1])
atexit.register(late, "first")
"""


class TestShutdown:
    @pytest.mark.slow
    def test_at_the_exit_of_the_interpreter(self, tmp_path):
        (tmp_path / "script.py").write_text(EXIT)
        done = functions.run_to_its_end("-W", "ignore", "script.py", cwd=tmp_path)
        late = "cannot schedule new futures after interpreter shutdown"
        assert done.stdout == f"first 1\nfirst [1]\nlast {late}\nlast {late}\n"
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.slow
    def test_all_that_was_begun_is_done_and_no_more_is_taken(self, tmp_path):
        executor = Executor(2)
        results = executor.map(slow_square, range(20))
        futures = [executor.submit(slow_square, n) for n in range(5)]
        executor.shutdown(wait=False)
        for refused in (executor.submit, executor.map):
            with pytest.raises(RuntimeError, match="after shutdown"):
                refused(abs, [1])
        assert [future.result(PATIENCE) for future in futures] == [0, 1, 4, 9, 16]
        assert list(results) == [n * n for n in range(20)]
        executor.shutdown()
        executor.shutdown()
        assert executor.workers == {}

    def test_what_has_not_begun_is_cancelled_if_that_is_wanted(self, tmp_path):
        executor = Executor(1)
        first = executor.submit(wait_for, tmp_path / "go")
        others = [executor.submit(abs, n) for n in range(3)]
        wait_until(first.running, PATIENCE, "it runs")
        results = executor.map(abs, range(3))
        executor.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in others)
        with pytest.raises(CancelledError):
            next(results)
        (tmp_path / "go").touch()
        assert first.result(PATIENCE) is None

    def test_what_runs_at_the_end_is_told_of_it(self, tmp_path):
        with Executor(1) as executor:
            futures = [executor.submit(wait_for, tmp_path / "go") for _ in range(2)]
            wait_until(futures[0].running, PATIENCE, "it runs")
            executor.close()
            for future in futures:
                with pytest.raises(BrokenExecutor, match="the executor has been shut down"):
                    future.result(PATIENCE)

    def test_what_runs_at_the_end_of_a_program(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "import time\nfrom ostap_parallel import Executor\n"
            "executor = Executor(1)\nfuture = executor.submit(time.sleep, 100)\n"
            "while not future.running(): time.sleep(0.01)\n"
            "future.add_done_callback(lambda done: print(done.exception()))\n"
        )
        assert "the executor has been shut down" in run_python(script, cwd=tmp_path)

    @pytest.mark.slow
    def test_leaving_with_waits_but_not_after_an_interrupt(self):
        with Executor(1) as executor:
            future = executor.submit(slow_square, 3)
        assert future.result(0) == 9
        executor = Executor(1)
        future = executor.submit(time.sleep, PATIENCE)
        with pytest.raises(KeyboardInterrupt), executor:
            raise KeyboardInterrupt
        assert isinstance(future.exception(PATIENCE), BrokenExecutor)
