"""Results in the order of the items, and how much of them is held back."""

from __future__ import annotations

import functools
import threading
import time

import functions
import pytest
from helpers import wait_until

from ostap_parallel import ConfigError, WorkManager
from ostap_parallel.runs.ordering import Ordering
from ostap_parallel.runs.outcome import Batch, Outcome

PATIENCE = 60.0
SIZE = 200_000  # bytes of a result


def batch(*indices):
    return Batch(indices, list(indices), list(indices), [0.0] * len(indices), "here", 1)


def test_what_comes_early_is_held_back():
    ordering = Ordering()
    arriving = [Outcome(3, 3), batch(1, 2), batch(4, 6), Outcome(0, 0), Outcome(5, 5)]
    found = list(ordering.in_order(iter(arriving)))
    assert [one.index for one in found] == [0, 1, 3, 4, 5, 6]
    assert ordering.first == 7


def test_room_is_what_is_left_of_the_bytes():
    ordering = Ordering(limit=1000)
    assert ordering.room(5) == float("inf")  # nothing is known yet
    ordering.weigh(1, [b"x" * 100])
    assert list(ordering.in_order(iter([Outcome(1, None)]))) == []
    assert ordering.room(4) == 5
    assert ordering.room(9) == 0
    ordering.weigh(2, ["x" * 100, b"y" * 100, 7, None], 4)
    assert list(ordering.in_order(iter([batch(2, 3, 4, 5)]))) == []
    assert ordering.room(0) == pytest.approx(700 / (0.7 * 100 + 0.3 * 50))
    assert len(list(ordering.in_order(iter([Outcome(0, None)])))) == 3
    assert ordering.room(0) == pytest.approx(1000 / (0.7 * 100 + 0.3 * 50))


def test_there_is_room_for_one_that_is_larger_than_all():
    ordering = Ordering(limit=10)
    ordering.weigh(0, [b"x" * 1000])
    assert (ordering.room(0), ordering.room(1)) == (1, 0)


def big(go, size, item):
    if item == 0:
        functions.wait_for(go, 60)
    return item.to_bytes(4, "big") * (size // 4)


@pytest.mark.slow
def test_no_more_is_read_than_may_be_held_back(tmp_path):
    """The first item is slow; those behind it have large results."""
    read = 0

    def items():
        nonlocal read
        for read in range(1, 1001):
            yield read - 1

    def has_settled():
        before = read
        time.sleep(0.5)
        return before == read > 10

    found = []
    function = functools.partial(big, tmp_path / "go", SIZE)
    with WorkManager(3, silent=True, held_bytes=50 * SIZE) as wm:
        results = wm.iexecute(function, items(), ordered=True)
        taking = threading.Thread(target=lambda: found.extend(one[:4] for one in results))
        taking.start()
        wait_until(has_settled, PATIENCE, "no more is read")
        assert read <= 60
        (tmp_path / "go").touch()
        taking.join(PATIENCE)
        assert found == [n.to_bytes(4, "big") for n in range(1000)]


@pytest.mark.parametrize("number", [0, -1, "many", True])
def test_the_number_is_checked(number):
    with pytest.raises(ConfigError, match="held_bytes"):
        WorkManager(1, held_bytes=number)
