"""A function that carries something large is told of, by the name of that."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

from ostap_parallel import FuncTask, WorkManager
from ostap_parallel.engine import baggage

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


def test_on_an_executor_of_somebody_elses(caplog):
    with ThreadPoolExecutor(1) as one, WorkManager(executor=one, silent=True) as own:
        own.process(by_closure(), [1])
    assert "'held'" in caplog.text
