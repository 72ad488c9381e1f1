"""Input that comes slowly holds back no result that is there."""

from __future__ import annotations

import contextvars
import itertools
import threading

import pytest
from helpers import wait_until

from ostap_parallel import WorkManager
from ostap_parallel.runs.reading import Reader
from ostap_parallel.runs.run import PAUSE

PATIENCE = 60


@pytest.fixture(scope="module")
def wm():
    with WorkManager(1, silent=True) as manager:
        yield manager


@pytest.mark.parametrize("ordered", [False, True])
def test_results_come_while_the_input_blocks(wm, ordered):
    go = threading.Event()

    def slow():
        yield from (1, 2)
        assert go.wait(PATIENCE), "nobody has had the results"
        yield 3

    found = []
    for result in wm.iexecute(abs, slow(), ordered=ordered):
        found.append(result)
        if found == [1, 2]:
            go.set()
    assert found == [1, 2, 3]


def test_what_the_input_raises(wm):
    def bad():
        yield 1
        raise KeyError("input")

    with pytest.raises(KeyError, match="input"):
        list(wm.iexecute(abs, bad()))
    assert list(wm.iexecute(abs, {2})) == [2]
    assert list(wm.iexecute(abs, iter(()))) == []


def test_it_has_the_context_of_who_reads(wm):
    variable = contextvars.ContextVar("variable", default=0)

    def read():
        yield variable.get()

    variable.set(7)
    assert list(wm.iexecute(abs, read())) == [7]


def test_the_thread_ends_with_the_run(wm):
    before = threading.active_count()
    for result in wm.iexecute(abs, (n for n in itertools.count())):
        if result > 50:
            break
    wait_until(lambda: threading.active_count() <= before, PATIENCE, "the thread to end")


def test_nothing_is_read_ahead_of_what_was_asked_for():
    read = []
    reader = Reader((read.append(n) or n for n in itertools.count()), lambda: None)
    taken = []
    for count in 1, 3, 2:
        wanted = len(taken) + count

        def take(wanted=wanted):
            taken.extend(n for n in reader.take(wanted - len(taken)) if n is not PAUSE)
            return len(taken) == wanted

        wait_until(take, PATIENCE, "they are there")
        assert taken == read == list(range(wanted))
    reader.close()
    assert list(reader.take(9)) == []
