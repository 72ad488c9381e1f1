"""Items of maps find the object that is called, or whose method is, as with the originals."""

from __future__ import annotations

import functools
import multiprocessing
import operator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from ostap_parallel import CheckpointError, Executor, Pool, WorkManager
from ostap_parallel.pools import ParallelPool
from ostap_parallel.worker.tasks import EachAnew, each_anew


class Histogram:
    """Adds to its own bins, and returns them."""

    seen = 0

    def __init__(self):
        self.bins = np.zeros(4)
        self.names, self.deep = [], {"a": [0]}

    def fill(self, item, weight=1):
        self.bins[item % 4] += weight
        self.names.append(item)
        self.deep["a"][0] += 1
        return self.bins.tolist(), list(self.names), self.deep["a"][0]

    def __call__(self, item):
        return self.fill(item)


class Keeps(Histogram):
    keeps_state = True


class Broken(Histogram):
    """Has a member that cannot be copied on workers, where it is made."""

    def fill(self, item, weight=1):
        self.steps = (one for one in ())
        return super().fill(item, weight)


def by(function):
    return functools.partial(function, weight=2)


FUNCTIONS = [lambda h: h.fill, lambda h: h, lambda h: by(h.fill), lambda h: by(by(h.fill))]


@pytest.mark.parametrize("make", FUNCTIONS)
class TestAsTheOriginals:
    def test_pools(self, make):
        found = []
        for kind in multiprocessing.Pool, Pool:
            with kind(2) as pool:
                function = make(Histogram())
                pairs = [(item,) for item in range(8)]
                ways = [
                    pool.map(function, range(8)),
                    pool.map(function, range(8), chunksize=1),
                    pool.map_async(function, range(6)).get(60),
                    pool.starmap(function, pairs),
                    list(pool.imap(function, range(20))),
                    sorted(pool.imap_unordered(function, iter(range(20))), key=str),
                ]
                found.append(ways)
        assert found[0] == found[1]
        assert all(calls == 1 for way in found[1] for *_, calls in way)

    def test_executors(self, make):
        found = []
        for kind in ProcessPoolExecutor, Executor:
            with kind(2) as executor:
                function = make(Histogram())
                found.append(list(executor.map(function, range(50))))
        assert found[0] == found[1]
        with Executor(1) as executor:
            assert list(executor.map(function, range(50), buffersize=3)) == found[0]

    def test_pathos(self, make):
        pool = ParallelPool(2, id="anew")
        try:
            function = make(Histogram())
            assert [calls for *_, calls in pool.map(function, range(8))] == [1] * 8
        finally:
            pool.clear()


def test_one_that_keeps_its_state_does():
    with Pool(1) as pool:
        assert [calls for *_, calls in pool.map(Keeps().fill, range(3))] == [1, 2, 3]


def test_what_cannot_be_copied_there():
    with Pool(1) as pool:
        assert [calls for *_, calls in pool.map(Broken().fill, range(3))] == [1, 1, 1]


def test_only_what_holds_something_is_wrapped():
    histogram = Histogram()
    for function in len, Histogram, test_one_that_keeps_its_state_does, lambda x: x, [1].append:
        assert each_anew(function) is function
    assert each_anew(Keeps().fill).__self__.keeps_state
    wrapped = each_anew(histogram.fill)
    assert isinstance(wrapped, EachAnew)
    assert each_anew(wrapped) is wrapped
    assert wrapped.__qualname__ == "Histogram.fill"
    large = Histogram()
    large.bins = np.zeros(1 << 24)
    assert each_anew(large.fill)(1)[2] == 1


class TestManagers:
    @pytest.mark.parametrize("make", FUNCTIONS)
    def test_each_item_has_its_own(self, make):
        function = make(Histogram())
        with WorkManager(1, silent=True) as wm:
            for found in (
                wm.process(function, range(30)),
                list(wm.iexecute(function, range(5), ordered=True)),
                wm.process(Keeps, range(0)) or wm.process(function, range(5), chunk_size=5),
            ):
                assert {calls for *_, calls in found} == {1}
            assert [calls for *_, calls in wm.process(Keeps().fill, range(3))] == [1, 2, 3]

    def test_an_error_and_a_checkpoint_tell_of_the_function(self, tmp_path):
        file = tmp_path / "run.db"
        with WorkManager(1, silent=True) as wm:
            first = wm.process(Histogram().fill, range(3), checkpoint=file)
            assert wm.process(Histogram().fill, range(3), checkpoint=file) == first
            assert wm.report.resumed == 3
            other = Histogram()
            other.names.append("changed")
            with pytest.raises(CheckpointError):
                wm.process(other.fill, range(3), checkpoint=file)
            failed = wm.process(Histogram().fill, ["a"], on_error="collect")
        assert isinstance(failed[0].error, TypeError)
        assert "in fill" in failed[0].traceback


class Columns:
    """Finds members in what it holds, and complains as that does."""

    def __init__(self, **data):
        self.__dict__["data"] = data

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["data"][name]


class OfColumns:
    def __init__(self):
        self.columns, self.sum = Columns(weight=2), 0

    def add(self, item):
        self.sum += item * self.columns.weight
        return self.sum


class Called(Columns):
    def __call__(self, item):
        return item * self.weight


class AnyName:
    total = 0

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return 1

    def twice(self, item):
        self.total += 2 * item
        return self.total


class Counted(functools.partial):
    """Makes more of what it is derived from, and counts."""

    calls = 0

    def __call__(self, item):
        self.calls += 1
        return 2 * super().__call__(item) * self.calls


@pytest.mark.parametrize(
    "function",
    [OfColumns().add, Called(weight=2), AnyName().twice, Counted(operator.mul, 1)],
    ids=["member", "called", "any name", "partial"],
)
def test_objects_may_have_ways_of_their_own(function):
    with multiprocessing.Pool(1) as original, Pool(1) as pool, Executor(1) as executor:
        wanted = original.map(function, range(4), 1)
        assert wanted == [0, 2, 4, 6]
        assert pool.map(function, range(4)) == list(executor.map(function, range(4))) == wanted
