"""`ostap_parallel.futures`: SCOOP's functions, and ports of its own examples."""

from __future__ import annotations

import itertools
import operator
import pickle
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import functions
import pytest
import scooping
from functions import PATIENCE, run_python, square
from scooping import add, hits, offset

from ostap_parallel import Executor, futures, shared
from ostap_parallel.machine.cpus import usable_cpus

OURS = "local", "hosts"
FOREIGN = "threads", "processes"


@pytest.fixture(scope="module", params=[*OURS, *FOREIGN])
def where(request):
    """Have the functions use an executor of some kind; return which."""
    with ExitStack() as stack:
        if request.param == "hosts":
            hosts = request.getfixturevalue("one_host")
            modules = [Path(module.__file__) for module in (functions, scooping)]
            settings = {"ssh_config": hosts.ssh_config, "config": (), "sync": modules}
            executor = stack.enter_context(Executor(1, "h1*1", **settings))
            assert executor.wait_for_hosts(30)
        else:
            make = {"local": Executor, "threads": ThreadPoolExecutor}
            make["processes"] = ProcessPoolExecutor
            executor = stack.enter_context(make[request.param](2))
        futures.use(executor)
        stack.callback(futures.use, None)
        yield request.param


class TestMap:
    def test_pi_by_monte_carlo(self, where):
        tries = [2000] * 20
        assert abs(4 * sum(futures.map(hits, tries)) / sum(tries) - 3.14) < 0.1

    def test_several_iterables_in_order_and_as_they_come(self, where):
        args = range(100), range(1, 200)
        wanted = [n * (n + 1) for n in range(100)]
        assert list(futures.map(operator.mul, *args)) == wanted
        assert sorted(futures.map_as_completed(operator.mul, *args)) == wanted
        assert list(futures.map(square, [])) == []

    def test_keywords_are_the_function_s(self, where):
        args = [1, 2], [10, 20]
        assert list(futures.map(offset, *args, by=3)) == [14, 25]
        assert sorted(futures.map_as_completed(offset, *args, by=3)) == [14, 25]
        assert futures.mapReduce(offset, operator.add, *args, by=3) == 39
        assert futures.mapScan(offset, operator.add, *args, by=3) == [14, 39]
        assert futures.submit(offset, 1, 2, by=3).result() == 6

    def test_an_exception_is_raised_in_its_place(self, where):
        results = futures.map(divmod, [7, 8], [2, 0])
        assert next(results) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_time_that_is_over(self, where):
        with pytest.raises(futures.TimeoutError):
            next(futures.map(time.sleep, [0.5, 0.5], timeout=0.05))
        for collect in (futures.map_reduce, futures.map_scan):
            with pytest.raises(futures.TimeoutError):
                collect(time.sleep, add, [0.5], timeout=0.05)


class TestReduce:
    @pytest.mark.parametrize("count", [1, 2, 3, 300, 1001])
    def test_operands_keep_their_order(self, where, count):
        words = [f"{n} " for n in range(count)]
        assert futures.map_reduce(str.upper, add, words) == "".join(words)
        assert futures.mapReduce(operator.mul, max, range(count), range(count)) == (count - 1) ** 2

    def test_nothing_to_reduce(self, where):
        with pytest.raises(TypeError, match="empty"):
            futures.map_reduce(square, add, [])

    @pytest.mark.parametrize("count", [0, 1, 2, 8, 1001])
    def test_scan(self, where, count):
        wanted = list(itertools.accumulate(map(square, range(count))))
        assert futures.map_scan(square, add, range(count)) == wanted
        words = [str(n) for n in range(count)]
        assert futures.mapScan(str, add, words[:20]) == list(itertools.accumulate(words[:20]))


class TestFutures:
    def test_submit_wait_and_as_completed(self, where):
        many = [futures.submit(pow, n, exp=2) for n in range(10)]
        done, not_done = futures.wait(many, timeout=-1)
        assert (done, not_done) == (set(many), set())
        assert sorted(future.result() for future in futures.as_completed(many)) == [
            n * n for n in range(10)
        ]
        assert isinstance(futures.submit(divmod, 1, 0).exception(PATIENCE), ZeroDivisionError)

    def test_waiting_is_limited_and_ends_at_the_first_exception(self, where):
        slow, wrong = futures.submit(time.sleep, 0.5), futures.submit(divmod, 1, 0)
        done, not_done = futures.wait([slow, wrong], PATIENCE, futures.FIRST_EXCEPTION)
        assert (done, not_done) == ({wrong}, {slow})
        assert futures.wait([slow], timeout=0).not_done == {slow}
        with pytest.raises(futures.TimeoutError):
            slow.result(timeout=0.05)
        with pytest.raises(futures.TimeoutError):
            list(futures.as_completed([slow], timeout=0.05))
        assert slow.result(PATIENCE) is None


class TestInTasks:
    def test_a_tree(self, where):
        assert futures.submit(scooping.tree, 6).result(PATIENCE) == 64

    def test_queens(self, where):
        assert futures.submit(scooping.queens, 6).result(PATIENCE) == 4
        assert list(futures.map(scooping.queens, [4, 5])) == [2, 10]

    def test_every_function(self, where):
        assert futures.submit(scooping.all_in_a_task, 5).result(PATIENCE) == {
            "origin": False,
            "size": 2 if where in OURS else 1,
            "map": [2, 2, 2, 3, 4],
            "as completed": [0, 1, 2, 3, 4],
            "reduce": "01234",
            "scan": [0, 1, 3, 6, 10],
            "error": "ZeroDivisionError",
            "wait": True,
        }

    def test_time_that_is_over(self, where):
        if where in OURS:  # what is done at once is done
            assert futures.submit(scooping.times_out, 0.2).result(PATIENCE) is True


class TestConstants:
    def test_they_are_written_once_and_read_everywhere(self, where):
        if where in FOREIGN:
            with pytest.raises(RuntimeError, match="own workers"):
                shared.setConst(factor=3)
            return
        assert shared.getConst("factor", timeout=0.01, default="none") == "none"
        shared.setConst(factor=3, nothing=None)
        assert list(futures.map(scooping.scaled, range(4))) == [0, 3, 6, 9]
        assert shared.getConst("nothing", default=0) is None
        with pytest.raises(TypeError, match="factor"):
            shared.setConst(factor=4)
        futures.submit(scooping.set_greeting, "hello").result(PATIENCE)
        assert shared.get_const("greet", timeout=None)("you") == "hello you"

    def test_shared_is_still_what_a_run_shares(self):
        assert isinstance(pickle.loads(pickle.dumps(shared)), type(shared))
        with pytest.raises(LookupError):
            shared()


PROGRAM = """
import sys
import ostap_parallel as scoop
from ostap_parallel import futures

if __name__ == "__main__":
    assert scoop.IS_ORIGIN and scoop.IS_RUNNING
    assert scoop.SIZE == int(sys.argv[1]), scoop.SIZE
    assert scoop.MAIN_MODULE.endswith("program.py")
    scoop.logger.info("running")
    futures.shutdown()
    assert list(futures.map(abs, [-5])) == [5]
"""


@pytest.mark.slow
@pytest.mark.parametrize("servers", ["", "h1*1"])
def test_the_default_executor_comes_from_the_settings(hosts, tmp_path, servers):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / ".ostaprc").write_text(f"[Parallel]\nssh_options = -F {hosts.ssh_config}\n")
    size = usable_cpus() + bool(servers)
    environ = {"HOME": str(tmp_path), "OSTAP_PPSERVERS": servers}
    run_python("program.py", size, cwd=tmp_path, **environ)
