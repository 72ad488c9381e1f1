"""A function that carries something large is told of, by the name of that."""

from __future__ import annotations

import functools
import os
import site
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import open_manager

from ostap_parallel import FuncTask, Pool, WorkManager
from ostap_parallel.engine import baggage
from ostap_parallel.worker import shared

LARGE = 12 << 20


class Table:
    nbytes = LARGE

    def __init__(self):
        self.data = bytes(LARGE)


def by_global():
    space = {"TABLE": bytes(LARGE), "__name__": "__main__"}
    exec("def use(x): return len(TABLE) + x", space)
    return space["use"]


def by_function():
    space = {"TABLE": bytes(LARGE), "__name__": "__main__"}
    exec("def inner(x): return len(TABLE) + x\ndef use(x): return inner(x)", space)
    return space["use"]


def by_closure():
    held = {"a": [bytes(LARGE)]}
    return lambda x: len(held["a"][0]) + x


def by_default():
    return lambda x, table=bytes(LARGE): len(table) + x


def by_partial():
    return functools.partial(lambda table, x: len(table) + x, bytes(LARGE))


class Callable:
    def __init__(self):
        self.table = bytes(LARGE)

    def __call__(self, x):
        return len(self.table) + x


def by_method():
    return Callable().__call__


@pytest.fixture(autouse=True)
def _afresh():
    baggage._warn.cache_clear()


@pytest.fixture(scope="module")
def wm():
    with WorkManager(1, silent=True) as manager:
        yield manager


CASES = {
    by_global: "'TABLE' (a bytes, 13 MB)",
    by_function: "'TABLE' (a bytes, 13 MB)",
    by_closure: "'held' (a dict, 13 MB)",
    by_default: "'default 1' (a bytes, 13 MB)",
    by_partial: "'argument 1' (a bytes, 13 MB)",
    by_method: "'self.table' (a bytes, 13 MB)",
    Callable: "'self.table' (a bytes, 13 MB)",
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_it_is_told_of_once_by_its_name(wm, make, caplog):
    function = make()
    for _ in range(2):
        assert wm.process(function, [1, 2]) == [LARGE + 1, LARGE + 2]
    (record,) = caplog.records
    text = record.getMessage()
    assert CASES[make] in text
    assert "shared=" in text
    assert text.startswith("the function ")


def test_what_is_shared_is_no_baggage(wm, caplog):
    assert wm.process(lambda x, table: len(table) + x, [1], shared={"table": bytes(LARGE)})
    with ThreadPoolExecutor(1) as one, WorkManager(executor=one, silent=True) as own:
        own.process(lambda x, table: len(table) + x, [1], shared={"table": bytes(LARGE)})
    assert caplog.records == []


def test_small_functions_are_not_looked_at(wm, caplog):
    wm.process(abs, [1])
    wm.process(FuncTask(abs), [1])
    assert caplog.records == []


class TestLargeArrays:
    @pytest.mark.slow
    @pytest.mark.parametrize("given", [0, LARGE // 8], ids=["alone", "beside something shared"])
    def test_they_are_on_each_host_once(self, hosts, caplog, given):
        table = np.arange(2e6)
        how = {"shared": {"other": np.ones(given)}} if given else {}

        def use(item, other=(1.0,)):
            time.sleep(0.01)
            assert other[-1] == 1.0
            address = table.__array_interface__["data"][0]
            for line in Path("/proc/self/maps").read_text().splitlines():
                span, _, _, device, inode, *_ = line.split()
                start, stop = (int(bound, 16) for bound in span.split("-"))
                if start <= address < stop:
                    break
            return os.getpid(), (device, inode), float(table[item])

        environment = f"export PYTHONPATH={':'.join(site.getsitepackages())}"
        with open_manager(hosts, "h1*2", environment=environment) as wm:
            wm.wait_for_hosts(60)
            found = wm.process(use, range(40), chunk_size=1, **how)
        assert [value for _, _, value in found] == list(range(40))
        assert len({pid for pid, _, _ in found}) == 2
        assert len({mapping for _, mapping, _ in found}) == 1
        assert found[0][1][1] != "0"
        assert caplog.records == []

    def test_they_are_as_if_they_had_come_along(self, wm):
        table = np.zeros(LARGE // 8)
        fortran = np.asfortranarray(np.arange(4e5).reshape(2, -1))
        fixed = np.ones(LARGE // 8)
        fixed.flags.writeable = False
        both = {"one": table, "two": [table]}

        def use(item):
            seen = table[item]
            table[item] += 7
            same = both["one"] is table is both["two"][0]
            flags = table.flags.writeable, fixed.flags.writeable, fortran.flags.f_contiguous
            return seen, table[item], same, flags, fortran[1, 2]

        for value in 0.0, 5.0:
            table[:] = value  # each run has it as it is then
            for _ in range(2):
                found = wm.process(use, [3, 4, 5])
                flags = True, False, True
                assert found == [(value, value + 7, True, flags, 200_002.0)] * 3
            assert table[3] == value

    @pytest.mark.slow
    def test_what_holds_others_comes_along(self, wm):
        names = np.array(["x"] * (LARGE // 8), dtype=object)
        masked = np.ma.masked_equal(np.arange(LARGE // 8), 3)
        strided = np.arange(LARGE // 2)[::2]

        def use(item):
            return names[item], bool(masked.mask[item]), int(strided[item])

        assert wm.process(use, [2, 3]) == [("x", False, 4), ("x", True, 6)]

    @pytest.mark.slow
    def test_of_tasks_pools_and_partials(self, wm):
        table = np.arange(float(LARGE // 8))
        assert wm.process(FuncTask(lambda x: table[x], merger=max), range(9)) == 8
        part = functools.partial(lambda array, x: float(array[x]), table)
        assert wm.process(part, [1, 2]) == [1.0, 2.0]
        with Pool(1, initializer=keep, initargs=(table,)) as pool:
            assert pool.map(kept, [5, 6]) == [5.0, 6.0]

    def test_with_something_shared(self, wm, caplog):
        table = np.arange(float(LARGE // 8))
        other = np.arange(float(LARGE // 8))
        found = wm.process(lambda x, other: table[x] + other[x], [4], shared={"other": other})
        assert found == [8.0]
        table[4] = 7.0  # what is shared stays as it is there
        assert wm.process(lambda x, other: table[x] + other[x], [4], shared={"other": other}) == [
            11.0
        ]
        assert caplog.records == []

    def test_where_there_is_no_room(self, wm, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        table = np.arange(float(LARGE // 8))
        monkeypatch.setattr(shared.Store, "make_room", full)
        assert wm.process(lambda x: float(table[x]), [4]) == [4.0]


def keep(table):
    global TABLE
    TABLE = table


def kept(item):
    return float(TABLE[item])


def test_on_an_executor_of_somebody_elses(caplog):
    with ThreadPoolExecutor(1) as one, WorkManager(executor=one, silent=True) as own:
        own.process(by_closure(), [1])
    assert "'held'" in caplog.text
