"""The interface of pathos' pool: that of a manager, and one by itself."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError
from functools import partial

import functions
import pytest
from helpers import wait_until
from multiprocess import TimeoutError as MultiprocessTimeoutError
from pathos.pools import ParallelPool as PathosParallelPool

from ostap_parallel import SerializeError, WorkerLost, WorkManager
from ostap_parallel.errors import RemoteTraceback
from ostap_parallel.pools import ParallelPool


@pytest.fixture(scope="module")
def manager():
    with WorkManager(2, silent=True) as manager:
        yield manager


@pytest.fixture
def pool(manager):
    return manager.pool


def described(*args, **kwargs):
    return args, kwargs


def late(go, item):
    if item == 0:
        functions.wait_for(go)
    return item


class TestMaps:
    def test_it_is_pathos_pool(self, manager, pool):
        assert isinstance(pool, PathosParallelPool)
        assert manager.pool is pool
        assert pool.ncpus == 2
        assert "ncpus=2" in repr(pool)

    def test_map(self, pool):
        assert pool.map(functions.square, range(20)) == [x * x for x in range(20)]
        assert pool.map(functions.square, []) == []

    def test_it_runs_on_the_manager_s_workers(self, manager, pool):
        pids = set(pool.map(functions.pid_of, range(20)))
        assert pids <= set(manager._owned.backend.pids())
        assert os.getpid() not in pids

    @pytest.mark.parametrize("verb", ["map", "imap", "uimap", "amap"])
    def test_a_chunk_size_of_nothing_is_none_as_with_pathos(self, pool, verb):
        found = getattr(pool, verb)(functions.square, range(3), chunksize=0)
        assert sorted(found.get() if verb == "amap" else found) == [0, 1, 4]

    def test_several_sequences(self, pool):
        assert pool.map(lambda x, y: x - y, [5, 6, 7], (1, 2, 3)) == [4, 4, 4]
        assert pool.map(pow, [2, 3], [3, 2, 1]) == [8, 9]  # ends with the shorter
        assert list(pool.imap(max, "abc", "bab", "aac")) == ["b", "b", "c"]

    def test_imap_is_in_order_and_comes_as_it_is_done(self, pool, tmp_path):
        found = pool.imap(partial(late, str(tmp_path / "go")), [1, 0, 2])
        assert next(found) == 1
        (tmp_path / "go").touch()
        assert list(found) == [0, 2]

    def test_uimap_comes_as_it_is_done(self, pool, tmp_path):
        found = pool.uimap(partial(late, str(tmp_path / "go")), [0, 1, 2])
        assert {next(found), next(found)} == {1, 2}
        (tmp_path / "go").touch()
        assert list(found) == [0]

    def test_amap(self, pool, tmp_path):
        result = pool.amap(partial(late, str(tmp_path / "go")), range(3))
        assert not result.ready()
        with pytest.raises(ValueError, match="not ready"):
            result.successful()
        (tmp_path / "go").touch()
        assert result.get(functions.PATIENCE) == [0, 1, 2]
        assert result.ready()
        assert result.successful()

    def test_get_keeps_to_its_time(self, pool, tmp_path):
        result = pool.amap(partial(late, str(tmp_path / "go")), [0])
        with pytest.raises(MultiprocessTimeoutError):
            result.get(timeout=0.01)
        result.wait(0.01)
        (tmp_path / "go").touch()
        assert result.get(timeout=functions.PATIENCE) == [0]


class TestPipes:
    def test_pipe(self, pool):
        assert pool.pipe(functions.square, 7) == 49
        assert pool.pipe(described) == ((), {})

    def test_keyword_arguments_arrive(self, pool):
        assert pool.pipe(described, 1, b=2) == ((1,), {"b": 2})
        assert pool.apipe(described, 1, 2, c=[3]).get() == ((1, 2), {"c": [3]})
        named = {"f": 1, "self": 2, "chunksize": 3}  # also those that are the pool's own
        assert pool.pipe(described, **named) == ((), named)

    def test_apipe(self, pool, tmp_path):
        result = pool.apipe(late, str(tmp_path / "go"), 0)
        assert not result.ready()
        with pytest.raises(MultiprocessTimeoutError):
            result.get(timeout=0.01)
        (tmp_path / "go").touch()
        assert result.get(timeout=functions.PATIENCE) == 0
        assert result() == 0


class TestErrors:
    def test_an_exception_arrives_as_itself(self, pool):
        with pytest.raises(ZeroDivisionError) as caught:
            pool.map(lambda x: 1 // x, [1, 0])
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "ZeroDivisionError" in str(caught.value.__cause__)
        result = pool.apipe(divmod, 1, 0)
        result.wait(functions.PATIENCE)
        assert not result.successful()
        with pytest.raises(ZeroDivisionError):
            result.get()
        assert pool.map(functions.square, [2]) == [4]

    def test_what_cannot_be_sent(self, pool):
        with pytest.raises(SerializeError, match=r"item 0 \(a Unsendable\)"):
            pool.map(functions.same, [functions.Unsendable()])
        with pytest.raises(SerializeError, match="Unsendable"):
            pool.pipe(lambda: functions.Unsendable())

    def test_a_result_that_cannot_be_read(self, pool):
        with pytest.raises(Exception, match="no number"):
            pool.apipe(lambda: functions.Unreadable()).get(functions.PATIENCE)

    def test_a_worker_that_dies(self, pool, tmp_path):
        def work(item):
            functions.note(tmp_path, item)
            functions.die("exit")

        with pytest.raises(WorkerLost, match="ended with exit status 3"):
            pool.apipe(work, "x").get(functions.PATIENCE)
        assert functions.attempts(tmp_path, "x") == 3
        assert pool.map(functions.square, range(4)) == [0, 1, 4, 9]

    def test_prints_arrive(self, pool, capsys):
        for word in "one", "two":
            pool.pipe(print, word)
            assert capsys.readouterr().out == f"{word}\n"


class TestLife:
    def test_a_closed_manager_takes_its_pool_along(self):
        with WorkManager(1, silent=True) as short:
            pool = short.pool
            assert pool.map(functions.square, [2]) == [4]
        with pytest.raises(ValueError, match="not running"):
            pool.map(functions.square, [2])

    @pytest.mark.slow
    def test_closing_ends_waiting(self, tmp_path):
        short = WorkManager(1, silent=True)
        result = short.pool.apipe(late, str(tmp_path / "never"), 0)
        queued = short.pool.apipe(functions.square, 2)
        closer = threading.Thread(target=short.close)
        closer.start()
        for one in result, queued:
            wait_until(one.ready, functions.PATIENCE, "the result to be there")
            with pytest.raises(CancelledError):
                one.get()
        closer.join(functions.PATIENCE)
        assert not closer.is_alive()

    def test_two_pools_do_not_mix(self, pool):
        with WorkManager(1, silent=True) as other:
            assert other.pool is not pool
            (here,), (there,) = (p.map(functions.pid_of, [0]) for p in (pool, other.pool))
            assert here != there
        assert pool.map(functions.square, [3]) == [9]


class TestState:
    """What pools of pathos have in common by their id."""

    @pytest.fixture(autouse=True)
    def _cleared(self):
        yield
        while ParallelPool.__state__:
            _, service = ParallelPool.__state__.popitem()
            service.pool.terminate()

    def test_pools_of_one_id_are_one(self):
        one, other = ParallelPool(1), ParallelPool(nodes=1)
        third = ParallelPool(ncpus=1, id="mine")
        (pid,) = set(one.map(functions.pid_of, range(4)))
        assert other.map(functions.pid_of, [0]) == [pid]
        assert third.map(functions.pid_of, [0]) != [pid]
        assert (one.ncpus, one.nodes, one.servers, third._id) == (1, 1, None, "mine")
        one.close()
        with pytest.raises(ValueError, match="not running"):
            other.map(functions.square, [2])
        assert third.map(functions.square, [2]) == [4]

    @pytest.mark.slow
    def test_close_join_and_restart(self, tmp_path):
        pool = ParallelPool(1)
        with pool:
            result = pool.apipe(late, str(tmp_path / "go"), 0)
        with pytest.raises(ValueError, match="still running"):
            pool.join()
        with pytest.raises(AssertionError):
            pool.restart()
        pool.close()
        (tmp_path / "go").touch()
        pool.join()
        assert result.get(timeout=0) == 0
        with pytest.raises(ValueError, match="not running"):
            pool.imap(functions.square, [2])
        pool.restart()
        assert pool.map(functions.square, [2]) == [4]
        pool.restart(force=True)
        assert pool.map(functions.square, [2]) == [4]

    def test_terminate_and_clear(self, tmp_path):
        pool = ParallelPool(1)
        result = pool.apipe(late, str(tmp_path / "never"), 0)
        pool.terminate()
        with pytest.raises(CancelledError):
            result.get(functions.PATIENCE)
        with pytest.raises(ValueError, match="not running"):
            pool.pipe(abs, -1)
        pool.clear()
        assert not ParallelPool.__state__
        assert pool.pipe(abs, -1) == 1

    def test_the_number_of_workers_can_be_set(self):
        pool = ParallelPool(1)
        pool.nodes = 2
        assert (pool.ncpus, repr(pool)) == (2, "<pool ParallelPool(ncpus=2, servers=None)>")
        assert sum(pool._serve().backend.workers.values()) == 2

    @pytest.mark.slow
    def test_hosts(self, hosts):
        settings = {"ssh_config": hosts.ssh_config, "config": ()}
        pool = ParallelPool(0, servers=("h1*1", "h2*1"), **settings)
        assert pool.map(lambda x, y: x * y, range(9), range(9)) == [n * n for n in range(9)]
        assert pool.servers == ("h1*1", "h2*1")
        pool.clear()

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (lambda: ParallelPool(1, ncpus=2), "multiple values"),
            (lambda: ParallelPool(1, sorvers=()), "sorvers"),
            (lambda: ParallelPool(1).map(abs), "at least one sequence"),
        ],
    )
    def test_wrong_arguments(self, arguments, error):
        with pytest.raises(TypeError, match=error):
            arguments()
