"""WorkManager.process and iexecute on local workers."""

from __future__ import annotations

import itertools
import logging
import operator
import os
import random
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import functions
import pytest
from helpers import wait_until

from ostap_parallel import (
    ConfigError,
    Failure,
    FuncTask,
    GenericTask,
    RemoteError,
    SerializeError,
    ServersUnavailable,
    Task,
    TaskMerger,
    WorkManager,
)
from ostap_parallel.errors import RemoteTraceback


@pytest.fixture(scope="module")
def wm():
    with WorkManager(2, silent=True) as manager:
        yield manager


class TestMerging:
    def test_no_merger_gives_a_list_in_order(self, wm):
        assert wm.process(lambda x: x**2, range(100)) == [x**2 for x in range(100)]
        assert (wm.report.submitted, wm.report.merged, wm.report.complete) == (100, 100, True)
        assert wm.report.stats.njobs == 100

    def test_squares_into_a_list(self, wm):
        merger = TaskMerger(lambda a, b: [*a, b], init=[])
        squares = wm.process(lambda x: x**2, range(100), merger=merger)
        assert sorted(squares) == [x**2 for x in range(100)]
        assert merger.result == []  # it is a recipe, not a store

    def test_a_merger_starts_anew_each_time(self, wm):
        merger = TaskMerger()
        assert wm.process(functions.square, [1, 2, 3], merger=merger) == 14
        assert wm.process(functions.square, [1, 2, 3], merger=merger) == 14

    def test_any_function_merges(self, wm):
        assert wm.process(functions.same, range(1, 11), merger=max) == 10
        assert wm.process(functions.same, range(1, 6), merger=operator.mul) == 120

    def test_init(self, wm):
        start = [-1]
        kept = wm.process(functions.same, [[1], [2]], merger=operator.add, init=start)
        assert (sorted(kept), start) == ([-1, 1, 2], [-1])
        assert wm.process(functions.same, [1, 2], init=10) == 13

    def test_collector(self, wm):
        def collect(merged, result, jobid):
            return {**(merged or {}), jobid: result}

        expected = {0: 25, 1: 36, 2: 49}
        assert wm.process(functions.square, [5, 6, 7], collector=collect) == expected
        found = wm.process(functions.square, [5], collector=collect, init={"a": 1})
        assert found == {"a": 1, 0: 25}

    def test_ordered_merging(self, wm):
        text = "".join(map(chr, range(33, 123)))
        assert wm.process(functions.same, text, merger=TaskMerger(), ordered=True) == text

    def test_results_that_are_none_count(self, wm):
        assert wm.process(print_nothing, range(5)) == [None] * 5
        assert wm.process(print_nothing, [1, 2], merger=lambda a, b: (a, b)) == (None, None)

    @pytest.mark.parametrize(
        ("how", "expected"),
        [
            ({}, []),
            ({"init": 7}, 7),
            ({"merger": TaskMerger(init=[1])}, [1]),
            ({"merger": TaskMerger()}, None),
            ({"merger": operator.add, "init": 5}, 5),
            ({"collector": lambda a, b, c: a, "init": "x"}, "x"),
        ],
    )
    @pytest.mark.parametrize("items", [[], iter(())], ids=["list", "iterator"])
    def test_no_items(self, wm, how, expected, items):
        assert wm.process(functions.square, items, **how) == expected
        assert (wm.report.submitted, wm.report.complete) == (0, True)

    def test_a_merger_that_raises_names_the_item(self, wm):
        def refuse(merged, result):
            if result == 49:
                raise ZeroDivisionError("in the merger")
            return [*merged, result]

        items = range(20)
        with pytest.raises(ZeroDivisionError, match="in the merger") as caught:
            wm.process(functions.square, items, merger=refuse, init=[], ordered=True)
        if sys.version_info >= (3, 11):
            assert "item 7" in "".join(caught.value.__notes__)
        assert wm.report.result == [x * x for x in range(7)]
        assert (wm.report.merged, wm.report.complete) == (7, False)


def print_nothing(item):
    return None


class TestInput:
    def test_job_ids(self, wm):
        assert wm.process(functions.with_index, "abc", jobid=True) == [*enumerate("abc")]

    def test_generators(self, wm):
        assert wm.process(functions.square, (x for x in range(50))) == [x * x for x in range(50)]

    def test_an_input_that_raises(self, wm):
        def items():
            yield from range(10)
            raise LookupError("no more items")

        with pytest.raises(LookupError, match="no more items"):
            wm.process(functions.square, items())
        assert wm.process(functions.square, [3]) == [9]

    def test_what_is_not_iterable(self, wm):
        with pytest.raises(TypeError, match="not iterable"):
            wm.process(functions.square, 5)

    def test_shared_data(self, wm):
        table = {n: 10 * n for n in range(1000)}
        assert wm.process(look_up, [1, 999], shared={"table": table}) == [10, 9990]

    @pytest.mark.slow
    def test_many_items_exactly_once(self, wm, tmp_path):
        count = 100_000
        found = wm.process(partial(noted, str(tmp_path)), range(count), merger=TaskMerger())
        assert found == count * (count - 1) // 2
        seen = sorted(int(n) for f in tmp_path.iterdir() for n in f.read_text().split())
        assert seen == list(range(count))
        assert (wm.report.merged, wm.report.retried) == (count, 0)


def look_up(item, table):
    return table[item]


def noted(folder, item):
    with (Path(folder) / str(os.getpid())).open("a") as file:
        file.write(f"{item}\n")
    return item


class TestIexecute:
    def test_as_they_come(self, wm):
        assert sorted(wm.iexecute(functions.square, range(50))) == [x * x for x in range(50)]
        assert (wm.report.merged, wm.report.complete) == (50, True)

    def test_in_order(self, wm):
        assert list(wm.iexecute(functions.square, iter(range(50)), ordered=True)) == [
            x * x for x in range(50)
        ]

    def test_the_late_one_does_not_hold_up_the_others(self, wm, tmp_path):
        go = tmp_path / "go"
        found = []
        for result in wm.iexecute(partial(late, str(go)), range(10), chunk_size=1):
            found.append(result)
            if len(found) == 9:
                go.touch()
        assert found[-1] == 0
        assert sorted(found) == list(range(10))

    @pytest.mark.parametrize("ordered", [False, True])
    def test_an_infinite_input_is_read_as_results_are_taken(self, wm, ordered):
        pulled = itertools.count()
        results = wm.iexecute(functions.same, pulled, chunk_size=1, ordered=ordered)
        for taken in range(1, 21):
            next(results)
            # two chunks per worker are under way; in order, some may be held back
            assert wm.report.submitted <= taken + 4 + (80 if ordered else 0)
        results.close()
        assert next(pulled) == wm.report.submitted
        assert not wm.report.complete
        assert wm.process(functions.square, [3]) == [9]

    def test_chunks_grow_step_by_step_in_an_infinite_input(self, wm):
        results = wm.iexecute(lambda item: item, itertools.count())
        assert [next(results) is not None for _ in range(5)] == [True] * 5
        assert wm.report.submitted <= 5 + 4 * 16
        results.close()

    def test_in_order_holds_back_a_bounded_number(self, wm, tmp_path):
        # item 0 ends when the other worker is about as far ahead as it may be
        work = partial(first_is_slow, str(tmp_path), 70)
        results = wm.iexecute(work, itertools.count(), ordered=True, chunk_size=1)
        assert next(results) == 0
        assert 70 < wm.report.submitted <= 100
        assert list(itertools.islice(results, 100)) == list(range(1, 101))
        results.close()

    def test_leaving_early_interrupts_what_runs(self, wm, tmp_path):
        never = tmp_path / "never"
        for result in wm.iexecute(partial(late, str(never)), range(100), chunk_size=1):
            assert result > 0
            break
        assert wm.process(functions.square, [3]) == [9]

    def test_a_failure_is_raised(self, wm):
        with pytest.raises(ZeroDivisionError):
            list(wm.iexecute(lambda x: 1 // x, [1, 0, 1], ordered=True))
        assert wm.report.merged == 1

    def test_arguments_are_looked_at_when_it_is_called(self, wm):
        with pytest.raises(ValueError, match="chunk_size"):
            wm.iexecute(functions.square, [1], chunk_size=0)


def late(go, item):
    if item == 0:
        functions.wait_for(go)
    return item


def first_is_slow(folder, ahead, item):
    if item == 0:
        functions.wait_for(Path(folder) / str(ahead))
        # nothing to wait for: what must not happen now is that the other goes on for ever
        threading.Event().wait(0.3)
    else:
        (Path(folder) / str(item)).touch()
    return item


class TestErrors:
    def test_an_exception_arrives_as_itself(self, wm):
        def refuse(item):
            if item == 3:
                raise functions.Refusal(item, "three is refused")
            return item

        with pytest.raises(functions.Refusal) as caught:
            wm.process(refuse, range(10))
        error = caught.value
        assert (error.item, error.reason) == (3, "three is refused")
        assert isinstance(error.__cause__, RemoteTraceback)
        text = str(error.__cause__)
        assert 'raise functions.Refusal(item, "three is refused")' in text
        assert "in refuse" in text
        assert "item 3 on local" in text
        assert "three is refused" in "".join(traceback.format_exception(error))
        if sys.version_info >= (3, 11):
            (said,) = error.__notes__
            assert said.startswith("item 3 (3) on local, process ")

    def test_the_run_stops_at_the_first_failure(self, wm):
        with pytest.raises(ZeroDivisionError):
            wm.process(lambda x: 1 // x, itertools.chain([0], itertools.count(1)), chunk_size=1)
        assert wm.report.submitted < 200
        assert wm.report.failures[0].index == 0
        assert wm.process(functions.square, [3]) == [9]

    def test_collecting(self, wm):
        found = wm.process(lambda x: 6 // x, [1, 0, 2, 0, 3], on_error="collect")
        report = wm.report
        assert [x for x in found if not isinstance(x, Failure)] == [6, 3, 2]
        assert [type(found[n].error) for n in (1, 3)] == [ZeroDivisionError] * 2
        assert [(f.index, f.item, f.host, f.attempts) for f in report.failures] == [
            (1, "0", "local", 1),
            (3, "0", "local", 1),
        ]
        assert "ZeroDivisionError" in report.failures[0].traceback
        assert report.failures[0].pid in wm._owned.backend.pids()
        assert (report.submitted, report.merged, report.failed) == (5, 3, 2)
        assert report.complete
        assert "5 submitted = 3 merged + 2 failed" in str(report)

    def test_collecting_with_a_merger_leaves_failures_out(self, wm):
        def halve(item):
            if item % 2:
                raise ValueError(f"{item} is odd")
            return item // 2

        total = wm.process(halve, range(1000), merger=TaskMerger(), on_error="collect")
        assert total == sum(range(500))
        assert (wm.report.merged, wm.report.failed) == (500, 500)
        assert sorted(f.index for f in wm.report.failures) == list(range(1, 1000, 2))

    def test_retries(self, wm, tmp_path):
        def fail_twice(item):
            if functions.note(tmp_path, item) <= 2:
                raise OSError("not yet")
            return item

        assert wm.process(fail_twice, range(6), retries=2) == list(range(6))
        assert (wm.report.retried, wm.report.merged, wm.report.failed) == (12, 6, 0)
        assert {functions.attempts(tmp_path, n) for n in range(6)} == {3}

    def test_retries_have_an_end(self, wm, tmp_path):
        def fail(item):
            functions.note(tmp_path, item)
            raise OSError("never")

        wm.process(fail, ["x"], retries=3, on_error="collect")
        assert functions.attempts(tmp_path, "x") == wm.report.failures[0].attempts == 4
        wm.process(fail, ["y"], on_error="collect")
        assert functions.attempts(tmp_path, "y") == 1

    @pytest.mark.parametrize(
        ("make", "name", "message"),
        [
            (lambda: functions.OddInit(1, 2), "functions.OddInit", "1 and 2"),
            (lambda: functions.OddReduce("odd"), "functions.OddReduce", "odd"),
            (lambda: SystemExit(3), "SystemExit", "3"),
            (KeyboardInterrupt, "KeyboardInterrupt", ""),
        ],
    )
    def test_what_cannot_come_back_as_itself(self, wm, make, name, message):
        def refuse(item):
            raise make()

        wm.process(refuse, [1], on_error="collect")
        (failure,) = wm.report.failures
        assert isinstance(failure.error, RemoteError)
        assert (failure.error.name, failure.error.message) == (name, message)
        assert "in refuse" in failure.traceback
        assert "in refuse" in str(failure.error.__cause__)

    def test_an_exception_whose_text_raises(self, wm):
        class Nasty(Exception):
            def __str__(self):
                raise ValueError("no text")

            def __reduce__(self):
                raise ValueError("no pickle")

        def refuse(item):
            raise Nasty

        wm.process(refuse, [1], on_error="collect")
        assert isinstance(wm.report.failures[0].error, RemoteError)
        assert wm.report.failures[0].error.name.endswith("Nasty")

    def test_the_cause_of_an_exception_is_in_the_traceback(self, wm):
        def refuse(item):
            try:
                raise KeyError("the cause")
            except KeyError as exc:
                raise RuntimeError("the effect") from exc

        with pytest.raises(RuntimeError, match="the effect") as caught:
            wm.process(refuse, [1])
        assert "the cause" in str(caught.value.__cause__)


class TestBadArguments:
    @pytest.mark.parametrize("ncpus", [-1, "many", True, 1.5])
    def test_ncpus(self, ncpus):
        with pytest.raises(ConfigError, match="ncpus"):
            WorkManager(ncpus)

    def test_timeout(self):
        for name in "timeout", "idle_timeout":
            with pytest.raises(ConfigError, match="idle_timeout"):
                WorkManager(0, **{name: 0})

    def test_the_old_name_of_a_timeout_is_accepted_with_a_note(self, caplog):
        with WorkManager(1, timeout=100):
            (record,) = caplog.records
        assert "idle_timeout" in record.getMessage()

    @pytest.mark.parametrize("name", ["servers", "silent", "chunk_size", "ncpus", "timeout"])
    def test_attributes_that_it_does_not_have(self, wm, name):
        with pytest.raises(AttributeError, match=f"{name}.*are given to WorkManager"):
            setattr(wm, name, 1)
        assert not hasattr(wm, name)

    def test_a_class_of_the_users_may_have_attributes(self):
        class Mine(WorkManager):
            pass

        with Mine(1) as own:
            own.servers = "mine"

    def test_servers_twice(self):
        with pytest.raises(ConfigError, match="ppservers"):
            WorkManager(0, ["a"], ppservers=["a"])

    @pytest.mark.parametrize("entry", ["-oProxyCommand=x", "host name;ls", "a@b@c"])
    def test_entries(self, entry):
        with pytest.raises(ConfigError):
            WorkManager(0, [entry])

    def test_an_executor_and_servers(self):
        with ThreadPoolExecutor(1) as executor, pytest.raises(ConfigError, match="executor"):
            WorkManager(servers=["somewhere"], executor=executor)

    @pytest.mark.parametrize(
        "arguments", [{"on_error": "x"}, {"chunk_size": 0}, {"retries": -1}, {"lost_retries": -1}]
    )
    def test_of_a_run(self, wm, arguments):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            wm.process(functions.square, [1], **arguments)

    def test_merger_and_collector(self, wm):
        with pytest.raises(ValueError, match="either merger or collector"):
            wm.process(functions.square, [1], merger=max, collector=lambda a, b, c: a)

    def test_two_initial_values(self, wm):
        with pytest.raises(TypeError, match="initial value"):
            wm.process(functions.square, [1], merger=TaskMerger(init=[]), init=[])

    @pytest.mark.parametrize("arguments", [{"merger": max}, {"init": 1}, {"collector": max}])
    def test_a_task_brings_its_own(self, wm, arguments):
        with pytest.raises(TypeError, match="Task"):
            wm.process(FuncTask(functions.square), [1], **arguments)

    def test_what_is_no_function(self, wm):
        with pytest.raises(TypeError, match="function or a Task, not int"):
            wm.process(3, [1])

    def test_no_workers_at_all(self):
        with (
            WorkManager(0, silent=True) as nobody,
            pytest.raises(ServersUnavailable, match="no local worker"),
        ):
            nobody.process(functions.square, [1])


class Recorded(Task):
    """Notes who called what, here and on the workers."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.here = []
        self.started = False

    def note(self, name):
        with (Path(self.folder) / str(os.getpid())).open("a") as file:
            file.write(f"{name}\n")

    def initialize_local(self):
        self.here.append("initialize_local")
        self.total = 0

    def worker_init(self):
        self.note("worker_init")
        self.started = True

    def initialize_remote(self, jobid=-1):
        self.note(f"initialize_remote {jobid}")
        self.current = jobid

    def process(self, jobid, item):
        assert self.started
        assert self.current == jobid
        self.note(f"process {jobid}")
        return jobid, item

    def merge_results(self, result, jobid=-1):
        assert result[0] == jobid
        self.here.append(f"merge {jobid}")
        self.total += result[1]

    def results(self):
        return self.total

    def finalize(self):
        self.here.append("finalize")


class Surrounded(FuncTask):
    """Returns what an item sees around it."""

    def __init__(self, **surroundings):
        super().__init__(see, collector=listed, initializer=list, **surroundings)


def listed(merged, result, jobid):
    return [*merged, result]


def see(item):
    names = "A", "HOME_COPY", "SEARCH", "UNSET_BEFORE"
    return str(Path.cwd()), {name: os.environ.get(name) for name in names}, "." in sys.path


class TestTasks:
    def test_the_protocol(self, wm, tmp_path):
        task = Recorded(tmp_path)
        assert wm.process(task, [10, 20, 30, 40, 50]) == 150
        assert task.here[0] == "initialize_local"
        assert task.here[-1] == "finalize"
        assert sorted(task.here[1:-1]) == [f"merge {n}" for n in range(5)]
        done = []
        for file in tmp_path.iterdir():
            assert int(file.name) != os.getpid()
            first, *calls = file.read_text().splitlines()
            assert first == "worker_init"
            for before, call in zip(calls[::2], calls[1::2], strict=True):
                number = int(call.removeprefix("process "))
                assert before == f"initialize_remote {number}"
                done.append(number)
        assert sorted(done) == list(range(5))

    def test_every_run_starts_workers_anew(self, wm, tmp_path):
        task = Recorded(tmp_path)
        assert [wm.process(task, [1, 2]) for _ in range(2)] == [3, 3]
        text = "".join(file.read_text() for file in tmp_path.iterdir())
        assert 2 <= text.count("worker_init") <= 4

    def test_nothing_is_finalised_after_a_failure(self, wm, tmp_path):
        task = Recorded(tmp_path)
        with pytest.raises(TypeError):
            wm.process(task, [1, "x"], ordered=True)
        assert task.here == ["initialize_local", "merge 0", "merge 1"]
        assert wm.report.result == 1

    def test_a_worker_that_cannot_be_prepared(self, wm, tmp_path):
        class Unlucky(Recorded):
            def worker_init(self):
                raise LookupError("no detector")

        wm.process(Unlucky(tmp_path), range(3), on_error="collect")
        assert [str(f.error) for f in wm.report.failures] == ["no detector"] * 3
        assert "in worker_init" in wm.report.failures[0].traceback

    def test_generic_and_function_tasks(self, wm):
        def collect(merged, result, jobid):
            return {**(merged or {}), jobid: result}

        def label(jobid, item):
            return f"{jobid}{item}"

        assert wm.process(FuncTask(functions.square), range(5)) == 30
        made = wm.process(GenericTask(label, collector=collect), "ab")
        assert made == {0: "0a", 1: "1b"}
        assert wm.process(FuncTask(functions.square, initializer=list), []) == []

    def test_surroundings(self, wm, tmp_path, monkeypatch):
        inside = tmp_path / "inside"
        inside.mkdir()
        monkeypatch.setenv("SEARCH", "only here")  # workers were started before
        before = wm.process(Surrounded(), [0])[0]
        task = Surrounded(
            directory=inside,
            environment={"A": "1", "HOME_COPY": "$HOME/sub", "SEARCH": "middle"},
            prepend_to={"SEARCH": "front", "UNSET_BEFORE": "p"},
            append_to={"SEARCH": "$A/end"},
            dot_in_path=True,
        )
        home = os.environ["HOME"]
        for where, variables, dot in wm.process(task, range(6)):
            assert Path(where) == inside
            assert variables == {
                "A": "1",
                "HOME_COPY": f"{home}/sub",
                "SEARCH": os.pathsep.join(["front", "middle", "1/end"]),
                "UNSET_BEFORE": "p",
            }
            assert dot
        assert wm.process(Surrounded(), range(6)) == [before] * 6

    def test_surroundings_come_back_after_an_error(self, wm, tmp_path):
        before = wm.process(Surrounded(), [0])
        task = FuncTask(lambda x: 1 // x, directory=tmp_path, environment={"A": "1"})
        wm.process(task, [0] * 4, on_error="collect")
        assert wm.report.failed == 4
        assert wm.process(Surrounded(), [0] * 4) == before * 4

    def test_a_directory_that_is_not_there(self, wm, tmp_path):
        with pytest.raises(FileNotFoundError, match="missing"):
            wm.process(Surrounded(directory=tmp_path / "missing"), [0])


def draw(item):
    import numpy as np

    return item, random.random(), float(np.random.random())


def draw_after_another(folder, item):
    """Draw once the other worker has begun, so that both take part."""
    functions.note(folder, os.getpid())
    wait_until(lambda: len(list(Path(folder).iterdir())) == 2, functions.PATIENCE, "two workers")
    return os.getpid(), draw(item)[1:]


class TestSeeds:
    @pytest.mark.slow
    def test_they_do_not_depend_on_workers_and_chunks(self, wm):
        numbers = wm.process(draw, range(12), seed=42)
        assert wm.process(draw, range(12), seed=42, chunk_size=5) == numbers
        with WorkManager(1, silent=True) as single:
            assert single.process(draw, range(12), seed=42, chunk_size=1) == numbers
        assert len({random for _, random, _ in numbers}) == 12
        assert len({numpy for _, _, numpy in numbers}) == 12
        assert wm.process(draw, range(12), seed="43") != numbers

    @pytest.mark.slow
    def test_workers_differ(self, tmp_path):
        with WorkManager(2, silent=True) as fresh:
            drawn = fresh.process(partial(draw_after_another, str(tmp_path)), [0, 0], chunk_size=1)
        (one, numbers), (other, others) = drawn
        assert one != other
        assert numbers[0] != others[0]
        assert numbers[1] != others[1]


class TestOutput:
    def test_prints_arrive_while_the_task_runs(self, wm, tmp_path, capsys):
        seen = []

        def read():
            seen.append(capsys.readouterr().out)
            return "half way\n" in "".join(seen)

        def work(item):
            print("half way")
            functions.wait_for(tmp_path / "go")
            return item

        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(wm.process, work, [5])
            wait_until(read, 20, "a line of a task that is still running")
            assert not result.done()
            (tmp_path / "go").touch()
            assert result.result(functions.PATIENCE) == [5]

    def test_log_records(self, wm, caplog):
        caplog.set_level(logging.INFO)

        def work(item):
            logger = logging.getLogger("user.analysis")
            logger.debug("too fine")
            logger.info("item %d", item)
            try:
                raise KeyError("lost")
            except KeyError:
                logger.exception("caught")

        wm.process(work, [7])
        wait_until(lambda: len(caplog.records) >= 2, 20, "two records")
        info, error = [r for r in caplog.records if r.name == "local.user.analysis"]
        assert (info.levelno, info.getMessage()) == (logging.INFO, "item 7")
        assert (error.levelno, error.getMessage()) == (logging.ERROR, "caught")
        assert "KeyError: 'lost'" in error.exc_text
        assert info.process in wm._owned.backend.pids()

    def test_the_statistics_are_printed_unless_silent(self, capsys):
        with WorkManager(1, progress=False) as loud:
            loud.process(functions.square, range(3))
        table = capsys.readouterr().out
        assert "#jobs" in table
        assert "local" in table
        with WorkManager(1, silent=True) as silent:
            silent.process(functions.square, range(3))
        out, err = capsys.readouterr()
        assert (out, err) == ("", "")


class TestSerialising:
    """What cannot be sent; see test_serialize.py for what can."""

    def test_a_function(self, wm):
        endless = (n for n in range(3))

        def work(item):
            return item, endless

        with pytest.raises(SerializeError, match=r"work cannot be sent.*generator") as caught:
            wm.process(work, [1])
        assert caught.value.what.startswith("the function ")
        assert wm.process(functions.square, [3]) == [9]

    def test_an_item(self, wm):
        items = [1, functions.Unsendable(), 3]
        found = wm.process(functions.same, items, on_error="collect")
        assert (found[0], found[2]) == (1, 3)
        (failure,) = wm.report.failures
        assert isinstance(failure.error, SerializeError)
        assert failure.error.what == "item 1 (a Unsendable)"
        assert "stays here" in failure.error.reason
        assert failure.index == 1

    def test_an_item_stops_the_run(self, wm):
        with pytest.raises(SerializeError, match=r"item 1 .a Unsendable. cannot be sent"):
            wm.process(functions.same, [1, functions.Unsendable(), 3])

    def test_an_item_that_cannot_be_read(self, wm):
        found = wm.process(functions.same, [1, functions.Unreadable(), 3], on_error="collect")
        assert (found[0], found[2]) == (1, 3)
        assert "no number" in str(wm.report.failures[0].error)

    def test_a_result(self, wm):
        def work(item):
            return functions.Unsendable() if item == 1 else item

        found = wm.process(work, range(3), on_error="collect", chunk_size=3)
        assert (found[0], found[2]) == (0, 2)
        error = wm.report.failures[0].error
        assert isinstance(error, SerializeError)
        assert error.what == "the result of item 1 (a Unsendable)"

    def test_a_result_that_cannot_be_read(self, wm):
        def work(item):
            return functions.Unreadable() if item == 1 else item

        found = wm.process(work, range(3), on_error="collect", chunk_size=3)
        assert (found[0], found[2]) == (0, 2)
        assert isinstance(wm.report.failures[0].error, SerializeError)
        assert "the result of item 1" in str(wm.report.failures[0].error)

    def test_a_generator_is_named(self, wm):
        with pytest.raises(SerializeError, match=r"the result of item 0 .a generator."):
            wm.process(lambda x: (y for y in range(x)), [1])


class TestTogether:
    def test_two_managers(self, wm):
        with WorkManager(1, silent=True) as other:
            here, there = wm.process(functions.pid_of, [0]), other.process(functions.pid_of, [0])
            assert here != there
            assert wm.process(functions.square, [2]) == [4]
        assert wm.process(functions.square, [3]) == [9]

    def test_runs_in_two_threads_do_not_mix(self, wm, tmp_path):
        # each is half way when the other begins
        def work(name, item):
            if item == 0:
                (tmp_path / name).touch()
                functions.wait_for(tmp_path / ("b" if name == "a" else "a"))
            return name, item

        with ThreadPoolExecutor(2) as threads:
            runs = [
                threads.submit(wm.process, partial(work, name), range(50), chunk_size=1)
                for name in "ab"
            ]
            results = [run.result(functions.PATIENCE) for run in runs]
        assert results == [[(name, n) for n in range(50)] for name in "ab"]

    def test_a_failure_in_one_thread_leaves_the_other_alone(self, wm, tmp_path):
        def work(item):
            functions.note(tmp_path, item)
            if item < 4:
                functions.wait_for(tmp_path / "failed")
            return item

        def fail(item):
            raise LookupError("on purpose")

        with ThreadPoolExecutor(2) as threads:
            good = threads.submit(wm.process, work, range(40), chunk_size=1)
            wait_until(lambda: (tmp_path / "0").exists(), 20, "the good run to begin")
            threads.submit(wait_until, lambda: (tmp_path / "1").exists(), 20, "both workers")
            bad = threads.submit(wm.process, fail, range(4), chunk_size=1)
            (tmp_path / "failed").touch()
            with pytest.raises(LookupError):
                bad.result(functions.PATIENCE)
            assert good.result(functions.PATIENCE) == list(range(40))

    def test_closing_ends_a_run_of_another_thread(self, tmp_path):
        manager = WorkManager(1, silent=True)
        with ThreadPoolExecutor(1) as thread:
            work = partial(begun_and_never_ended, str(tmp_path))
            run = thread.submit(manager.process, work, [1])
            wait_until(lambda: (tmp_path / "begun").exists(), 20, "the task to begin")
            manager.close()
            with pytest.raises((RuntimeError, ServersUnavailable), match=r"closed|shut down"):
                run.result(functions.PATIENCE)

    def test_a_closed_manager_says_so(self):
        manager = WorkManager(1, silent=True)
        manager.close()
        manager.close()
        with pytest.raises((RuntimeError, ServersUnavailable), match=r"closed|shut down"):
            manager.process(functions.square, [1])


def begun_and_never_ended(folder, item):
    (Path(folder) / "begun").touch()
    signal.pause()
