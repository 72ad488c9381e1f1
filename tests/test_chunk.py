"""The bytes of chunks: what items share travels once, and a bad one harms no other."""

from __future__ import annotations

import os
import random
import signal
import tracemalloc
from concurrent.futures import Executor, Future

import functions
import pytest

from ostap_parallel import SerializeError, WorkManager
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.runs.run import Run
from ostap_parallel.worker.chunk import NEXT, Received, Writer, pack_call, pack_chunk
from ostap_parallel.worker.execute import Call


def message_of(values):
    writer = Writer()
    sent = [writer.add(value, "it") for value in values]
    return sent, pack_chunk(range(len(sent)), sent, writer.stream())


def read_all(message):
    chunk = Received(message)
    return [chunk.read(item) for item in chunk.items]


class Reader:
    """Is read by code of its own."""

    def __init__(self, action, value=None):
        self.action, self.value = action, value

    def __reduce__(self):
        return read, (self.action, self.value)


def read(action, value):
    if action == "raise":
        raise ValueError("unreadable")
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        signal.pause()
    return value


class TestMessages:
    def test_what_is_shared_travels_once(self):
        shared = random.randbytes(100_000)
        values = [(shared, n) for n in range(50)]
        _, message = message_of(values)
        assert len(message) < 110_000
        assert read_all(message) == values

    def test_plain_items_take_no_part(self):
        values = [1, "two", (3,), None, (3,), 5.0]
        sent, message = message_of(values)
        assert sent == [1, "two", NEXT, None, NEXT, 5.0]
        assert read_all(message) == values

    @pytest.mark.parametrize("place", [0, 1, 3])
    def test_what_cannot_be_written_harms_no_other(self, place):
        shared = [random.randbytes(1000)]
        values = [(shared, n) for n in range(4)]
        writer = Writer()
        sent = []
        for n, value in enumerate(values):
            if n == place:
                with pytest.raises(SerializeError):
                    writer.add((shared, functions.Unsendable()), "it")
            sent.append(writer.add(value, "it"))
        assert read_all(pack_chunk(range(4), sent, writer.stream())) == values

    def test_a_large_call_is_copied_once_at_each_end(self):
        large = random.randbytes(1 << 24)
        most = 1.5 * len(large)  # the copy, and the room that grows with it
        tracemalloc.start()
        try:
            message = pack_call(len, [large], {})
            assert tracemalloc.get_traced_memory()[1] < most
            tracemalloc.clear_traces()
            tracemalloc.reset_peak()
            assert read_all(message) == [(len, (large,), {})]
            assert tracemalloc.get_traced_memory()[1] < most
        finally:
            tracemalloc.stop()

    def test_one_that_is_read_by_itself_among_others(self):
        local = type("Local", (), {})()
        values = [(1, 2), (lambda: 3), (4, 5)]
        _, message = message_of([*values, local])
        first, second, third, _ = read_all(message)
        assert (first, second(), third) == ((1, 2), 3, (4, 5))


@pytest.fixture(scope="module")
def wm():
    with WorkManager(2, silent=True) as manager:
        yield manager


class TestReading:
    @pytest.mark.parametrize("retries", [0, 2])
    def test_what_cannot_be_read_harms_no_other(self, wm, retries):
        shared = [1] * 1000
        items = [(n, shared, Reader("raise") if n % 3 == 1 else n) for n in range(20)]
        found = wm.process(
            lambda item: item[0], items, chunk_size=10, on_error="collect", retries=retries
        )
        bad = [n for n in range(20) if n % 3 == 1]
        assert [value for n, value in enumerate(found) if n not in bad] == [
            n for n in range(20) if n not in bad
        ]
        assert [failure.index for failure in wm.report.failures] == bad
        assert {type(failure.error) for failure in wm.report.failures} == {ValueError}
        assert {failure.attempts for failure in wm.report.failures} == {1 + retries}

    def test_what_kills_in_being_read_harms_no_other(self, wm):
        items = [(n, Reader("die") if n == 4 else n) for n in range(10)]
        found = wm.process(
            lambda item: item[0], items, chunk_size=10, on_error="collect", lost_retries=0
        )
        assert [found[n] for n in range(10) if n != 4] == [n for n in range(10) if n != 4]
        (failure,) = wm.report.failures
        assert (failure.index, failure.attempts) == (4, 1)

    def test_what_takes_too_long_in_being_read_harms_no_other(self, wm):
        items = [(n, Reader("hang") if n == 4 else n) for n in range(10)]
        found = wm.process(
            lambda item: item[0], items, chunk_size=10, on_error="collect", timeout=0.5
        )
        assert [found[n] for n in range(10) if n != 4] == [n for n in range(10) if n != 4]
        assert type(wm.report.failures[0].error).__name__ == "TaskTimeout"

    @pytest.mark.parametrize("retries", [0, 1])
    def test_what_a_generator_changes_is_sent_as_it_was(self, wm, tmp_path, retries):
        def values():
            value = [0]
            for n in range(50):
                value[0] = n
                yield value

        def work(item):
            if retries and functions.note(tmp_path, item[0]) < 2:
                raise OSError("not yet")
            return item[0]

        found = wm.process(work, values(), chunk_size=8, retries=retries)
        assert found == list(range(50))

    def test_what_is_run_again_is_whole(self, wm, tmp_path):
        shared = {"key": [1, 2, 3]}

        def work(item):
            if functions.note(tmp_path, item[0]) < 2:
                raise OSError("not yet")
            return item

        items = [(n, shared, [n]) for n in range(20)]
        assert wm.process(work, items, chunk_size=7, retries=1) == items


class TestSizes:
    @pytest.mark.slow
    def test_large_items_that_share_go_together(self):
        shared = bytes(5_000_000)
        assert sizes_of([(shared, n) for n in range(40)], 20) == [20, 20]

    def test_others_do_not(self):
        shared = bytes(5_000_000)
        items = [(shared, bytes(5_000_000 + n)) for n in range(6)]
        assert max(sizes_of(items, 20)) <= 2
        assert sizes_of([bytes(5_000_000 + n) for n in range(3)], 20) == [1, 1, 1]


def sizes_of(items, chunk_size):
    """Return the sizes of the chunks that are made of items."""
    executor = Counting()
    run = Run(backend_of(executor), Call(functions.same), items, chunk_size, ordered=True)
    assert sum(len(arrival) for arrival in run.arrivals()) == len(items)
    return executor.sizes


class Counting(Executor):
    """Runs each chunk at once."""

    _max_workers = 2

    def __init__(self):
        self.sizes = []

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        result = fn(*args, **kwargs)
        self.sizes.append(len(result.answers))
        future.set_result(result)
        return future
