"""``TaskMerger(..., combine=True)``: merged on the workers, the same result all the same."""

from __future__ import annotations

import operator
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import functions
import mergers
import pytest
from helpers import importable, kill, open_manager, ssh_of, wait_until

from ostap_parallel import (
    FuncTask,
    GenericTask,
    SerializeError,
    TaskMerger,
    TaskTimeout,
    WorkerLost,
    WorkManager,
)

PATIENCE = 60  # seconds; only a hang takes that long


@pytest.fixture(scope="module", params=["local", "h1", "threads"])
def wm(request):
    """A manager with two workers: here, on a host, or of somebody else."""
    if request.param == "local":
        with WorkManager(2, silent=True) as manager:
            yield manager
    elif request.param == "threads":
        with ThreadPoolExecutor(2) as threads, WorkManager(executor=threads, silent=True) as found:
            yield found
    else:
        hosts = request.getfixturevalue("one_host")
        with open_manager(hosts, "h1*2", environment=importable(hosts)) as manager:
            assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
            yield manager


@pytest.fixture(params=["local", "h1"])
def own(request):
    """A manager whose two workers are ours."""
    if request.param == "local":
        with WorkManager(2, silent=True) as manager:
            yield manager
    else:
        hosts = request.getfixturevalue("one_host")
        with open_manager(hosts, "h1*2", environment=importable(hosts)) as manager:
            yield manager


@pytest.fixture
def folder(request, own):
    """A directory that the workers of `own` can write to, by their name for it."""
    if own.executor.hosts:
        host = request.getfixturevalue("one_host")["h1"]
        here = Path(tempfile.mkdtemp(dir=host.tmp))
        yield host.inside(here)
    else:
        here = Path(tempfile.mkdtemp())
        yield str(here)
    shutil.rmtree(here)


def combining(merger=operator.add, init=None):
    return TaskMerger(merger, init, combine=True)


def check_report(manager, submitted, failed=0):
    report = manager.report
    assert (report.submitted, report.merged, report.failed) == (
        submitted,
        submitted - failed,
        failed,
    )
    assert report.stats.njobs == submitted
    assert report.complete


class TestTheSameResult:
    @pytest.mark.parametrize("chunk_size", [None, 1, 7, 1000])
    @pytest.mark.parametrize("count", [0, 1, 2, 500])
    def test_sums(self, wm, count, chunk_size):
        for init in None, 1000:
            found = wm.process(
                functions.square, range(count), merger=combining(init=init), chunk_size=chunk_size
            )
            plain = sum(n * n for n in range(count)) + (init or 0)
            assert found == (plain if count or init else None)
            check_report(wm, count)

    def test_in_the_order_of_the_items(self, wm):
        for task in mergers.name_of, mergers.reused:
            found = wm.process(task, range(300), merger=combining(), ordered=True, chunk_size=9)
            assert found == list(range(300))

    def test_in_place(self, wm):
        for merger in operator.iadd, mergers.join:
            found = wm.process(mergers.reused, range(300), merger=combining(merger, []))
            assert sorted(found) == list(range(300))

    @pytest.mark.parametrize("kind", [FuncTask, GenericTask])
    def test_tasks_made_of_functions(self, wm, kind):
        def double(*job_and_item):
            return [2 * job_and_item[-1]]

        task = kind(double, combining(), initializer=lambda: [1])
        assert sorted(wm.process(task, range(50))) == sorted([1, *range(0, 100, 2)])
        check_report(wm, 50)

    def test_objects_of_classes_that_are_sent(self, wm):
        class Count(dict):
            def __add__(self, other):
                return Count(
                    {key: self.get(key, 0) + other.get(key, 0) for key in {*self, *other}}
                )

        found = wm.process(lambda n: Count({n % 3: 1}), range(90), merger=combining())
        assert type(found) is Count
        assert found == {0: 30, 1: 30, 2: 30}


@pytest.mark.slow
class TestFailures:
    def test_of_single_items(self, wm):
        found = wm.process(
            mergers.unlucky,
            range(70),
            merger=combining(),
            on_error="collect",
            ordered=True,
            chunk_size=20,
        )
        assert found == [n for n in range(70) if n % 7 != 3]
        assert [failure.index for failure in wm.report.failures] == list(range(3, 70, 7))
        check_report(wm, 70, failed=10)
        with pytest.raises(ValueError, match="3"):
            wm.process(mergers.unlucky, range(7), merger=combining(), chunk_size=7)

    @pytest.mark.parametrize("ordered", [False, True])
    def test_retries(self, own, folder, ordered):
        found = own.process(
            mergers.lucky_later,
            range(70),
            shared={"folder": folder},
            merger=combining(),
            retries=1,
            ordered=ordered,
            chunk_size=20,
        )
        assert (found if ordered else sorted(found)) == list(range(70))
        assert own.report.retried == 10
        assert own.report.merged == 70

    @pytest.mark.parametrize("ordered", [False, True])
    def test_a_worker_that_dies_in_the_middle(self, own, folder, ordered):
        found = own.process(
            mergers.dies_once,
            range(100),
            shared={"folder": folder},
            merger=combining(),
            ordered=ordered,
            chunk_size=25,
        )
        assert (found if ordered else sorted(found)) == list(range(100))
        check_report(own, 100)
        assert own.report.retried >= 2

    def test_an_item_by_which_workers_die(self, own):
        found = own.process(
            mergers.dies, range(20), merger=combining(), on_error="collect", chunk_size=10
        )
        assert sorted(found) == [n for n in range(20) if n != 5]
        (failure,) = own.report.failures
        assert isinstance(failure.error, WorkerLost)
        assert failure.index == 5

    def test_a_host_that_dies(self, hosts):
        with open_manager(hosts, "h1*1 h2*1", environment=importable(hosts)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            task = FuncTask(mergers.slowly, combining())

            def items():
                for n in range(200):
                    if n == 50:
                        kill([ssh_of("h1")])
                    yield n

            assert sorted(manager.process(task, items(), chunk_size=5)) == list(range(200))
            assert manager.report.hosts[0].lost == 1

    def test_time_limits(self, own):
        found = own.process(
            mergers.hangs,
            range(10),
            merger=combining(),
            timeout=0.5,
            on_error="collect",
            chunk_size=10,
        )
        assert sorted(found) == [n for n in range(10) if n != 4]
        (failure,) = own.report.failures
        assert isinstance(failure.error, TaskTimeout)

    def test_merging_has_no_time_limit(self, own):
        options = {"timeout": 0.005, "chunk_size": 20, "lost_retries": 0}
        found = own.process(abs, range(40), merger=combining(mergers.slow_sum), **options)
        assert found == 780


@pytest.mark.slow
class TestMergersThatFail:
    def test_is_the_error_of_the_run(self, wm):
        with pytest.raises(ArithmeticError, match="five") as caught:
            wm.process(
                mergers.name_of,
                range(100),
                merger=combining(mergers.refuses),
                on_error="collect",
                chunk_size=10,
            )
        where = "while the results of items 0 to 5 were merged on"
        assert where in str(caught.value.__cause__)
        assert "refuses" in str(caught.value.__cause__)
        assert not wm.report.complete
        assert wm.process(mergers.name_of, [1, 2], merger=combining(), ordered=True) == [1, 2]

    def test_what_cannot_be_sent(self, wm):
        with pytest.raises(SerializeError, match="items 0 to 1 were merged to cannot be sent"):
            wm.process(lambda n: mergers.Unpackable(), range(2), merger=combining(), chunk_size=2)

    def test_an_interrupt_while_it_merges(self, own):
        """What it has merged counts; the other items of its chunk are run again, once."""
        assert own.wait_for_hosts(PATIENCE)
        pids = set(own.process(functions.pid_of, range(20), chunk_size=1))
        found = []

        def run():
            merger = combining(mergers.slow_sum)
            found.append(own.process(abs, range(200), merger=merger, chunk_size=50))

        running = threading.Thread(target=run)
        before = own.report
        running.start()
        wait_until(lambda: own.report is not before, PATIENCE, "it has begun")
        for _ in range(5):
            running.join(0.1)
            own.executor.interrupt()
        running.join(PATIENCE)
        assert found == [19900]
        assert own.report.retried > 0
        check_report(own, 200)
        assert set(own.process(functions.pid_of, range(20), chunk_size=1)) <= pids


class TestWhatIsRefused:
    def test_values_that_merge_themselves(self):
        with pytest.raises(ValueError, match="combine=True needs a merger"):
            TaskMerger(None, combine=True)

    def test_what_needs_single_results(self, tmp_path):
        class Own(GenericTask):
            def merge_results(self, result, jobid=-1):
                super().merge_results(result, jobid)

        with WorkManager(1, silent=True) as manager:
            for what, task, options in (
                ("checkpoint=", abs, {"checkpoint": tmp_path / "run.db", "merger": combining()}),
                ("merge_results", Own(pow, combining()), {}),
            ):
                with pytest.raises(TypeError, match=f"{what}.* needs each result"):
                    manager.process(task, [1], **options)
            with pytest.raises(ValueError, match="merger or collector"):
                manager.process(abs, [1], merger=combining(), collector=max)
        with WorkManager(1, silent=True, dump_dbase={}, dump_jobs=1) as manager:  # noqa: SIM117
            with pytest.raises(TypeError, match="dump_dbase="):
                manager.process(abs, [1], merger=combining())

    def test_fresh_ones_are_of_the_same_kind(self):
        assert combining().fresh().combiner is operator.add
        assert TaskMerger().fresh().combiner is None


@pytest.mark.slow
def test_a_chunk_travels_as_one_value(hosts):
    def read_by_ssh(**how):
        with open_manager(hosts, "h2*1", environment=importable(hosts)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            ssh = Path(f"/proc/{ssh_of('h2')}/io")
            before = int(ssh.read_text().split()[1])
            found = manager.process(mergers.block, range(100), chunk_size=20, **how)
            assert found == mergers.Vector([4950] * 10_000)
            return int(ssh.read_text().split()[1]) - before

    plain = read_by_ssh(merger=TaskMerger())
    combined = read_by_ssh(merger=combining())
    assert combined < plain / 5
