"""What holds whichever way in is taken, and whatever computes."""

from __future__ import annotations

import itertools
import pickle
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import functions
import pytest
from faces import FACES, ON_FOREIGN, OWNING
from foreign import HEAVY, open_foreign
from helpers import importable, place_for

from ostap_parallel import Executor, SerializeError, WorkerLost
from ostap_parallel.runs.chunking import MAX_CHUNK

OURS = ["local", "hosts"]


PAIRS = [(ours, face) for ours in OURS for face in FACES]
PAIRS += [("processes", face) for face in ON_FOREIGN]
PAIRS += [
    pytest.param(name, face, marks=pytest.mark.heavy) for name in HEAVY for face in ON_FOREIGN
]


def pytest_generate_tests(metafunc):
    if "face" in metafunc.fixturenames:
        metafunc.parametrize(("executor", "face"), PAIRS, indirect=True, scope="module")


@contextmanager
def open_ours(name, request):
    if name == "local":
        with Executor(2) as executor:
            yield executor
        return
    hosts = request.getfixturevalue("one_host")
    where = {"ssh_config": hosts.ssh_config, "config": (), "environment": importable(hosts)}
    with Executor(0, "h1*2", **where) as executor:
        assert executor.wait_for_hosts(functions.PATIENCE)
        yield executor


@pytest.fixture(scope="module")
def executor(request):
    name = request.param
    with open_ours(name, request) if name in OURS else open_foreign(name) as executor:
        yield executor


@pytest.fixture(scope="module")
def face(request, executor):
    face = FACES[request.param](executor)
    yield face
    face.close()


@pytest.fixture
def place(request, executor, tmp_path):
    """A folder as it is called here, and as workers call it."""
    return place_for(request, getattr(executor, "hosts", ()), tmp_path)


@pytest.mark.parametrize("count", [0, 1, 100])
def test_results_are_in_the_order_of_the_items(face, count):
    wanted = [x * x for x in range(count)]
    assert face.map(functions.square, range(count)) == wanted
    assert face.map(functions.square, (x for x in range(count))) == wanted
    if face.stream is not None:
        assert list(face.stream(functions.square, iter(range(count)))) == wanted


def test_any_function_travels(face):
    offset = 5

    def shifted(x):
        return x + offset

    assert face.map(lambda x: x + offset, [1, 2]) == [6, 7]
    assert face.map(shifted, [1, 2]) == [6, 7]
    assert face.map(partial(functions.add, 7), [1, 2]) == [8, 9]
    assert face.map("a-b".split, "-a") == [["a", "b"], ["", "-b"]]


def test_keywords_arrive(face):
    assert face.call(functions.add, 1, b=2) == 3
    assert face.call(lambda x, *, function: (x, function), 1, function=2) == (1, 2)


def test_large_values_travel(face):
    size = 8 << 20
    assert face.call(len, bytes(size)) == size
    assert face.call(bytes, size) == bytes(size)


def test_an_exception_arrives_as_itself_with_its_traceback(face):
    for run in (
        lambda: face.map(functions.refuse, range(1, 6)),
        lambda: face.call(functions.refuse, 3),
        lambda: list((face.stream or face.map)(functions.refuse, range(1, 6))),
    ):
        with pytest.raises(functions.Refusal) as caught:
            run()
        assert (caught.value.item, caught.value.reason) == (3, "divisible")
        assert "raise Refusal(item" in "".join(traceback.format_exception(caught.value))
    assert face.map(functions.refuse, [1, 2]) == [1, 2]


def test_an_input_that_raises(face):
    def items():
        yield from range(5)
        raise LookupError("the input ends here")

    with pytest.raises(LookupError, match="the input"):
        face.map(functions.same, items())
    assert face.map(functions.same, [1]) == [1]


def test_what_cannot_be_sent_is_named(face):
    with pytest.raises(pickle.PicklingError, match=r"a Unsendable\)|the call of (same|run_batch)"):
        face.map(functions.same, [functions.Unsendable()])
    with pytest.raises(SerializeError, match=r"the result of item 0 \(a (Unsendable|list)\)"):
        face.map(lambda _: functions.Unsendable(), [1])


def test_endless_input_is_read_as_results_are_taken(face):
    if face.stream is None:
        return
    read = []

    def items():
        for number in itertools.count():
            read.append(number)
            yield number

    stream = face.stream(functions.same, items())
    assert list(itertools.islice(stream, 100)) == list(range(100))
    face.leave(stream)
    assert len(read) < 16 * MAX_CHUNK + 100  # eight for each worker, if the first is late
    assert face.map(functions.square, [3]) == [9]


def test_leaving_stops_what_runs(face, executor, place):
    if face.stream is None:
        return
    here, there = place
    stream = face.stream(partial(functions.late, f"{there}/go"), itertools.chain([1], [0] * 9))
    if not (face.interrupts and isinstance(executor, Executor)):  # others' cannot
        (here / "go").touch()
    assert next(iter(stream)) == 1
    face.leave(stream)
    assert face.map(functions.square, [3]) == [9]


def test_runs_at_the_same_time_do_not_mix(face):
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(
            lambda n: face.map(partial(functions.add, b=n), range(30)), range(0, 400, 100)
        )
        assert list(found) == [[i + n for i in range(30)] for n in range(0, 400, 100)]


def test_a_worker_that_dies_is_told(face, executor):
    if not isinstance(executor, Executor):  # nothing else's survives that
        return
    with pytest.raises(WorkerLost, match="SIGKILL"):
        face.call(functions.die, "kill")
    assert face.map(functions.square, [3]) == [9]


@pytest.mark.parametrize("name", OWNING)
def test_after_the_end(name):
    face = FACES[name]()
    assert face.map(functions.square, [3]) == [9]
    face.close()
    face.close()
    for run in face.map, face.call:
        with pytest.raises(face.closed, match=r"not running|shut ?down"):
            run(*(functions.same, [1]))


SCRIPT = """
import sys
from faces import FACES, ON_FOREIGN
from foreign import open_foreign
from ostap_parallel import Executor

class Value:
    def __init__(self, number):
        self.number = number

def work(number):
    return Value(helper(number))

def helper(number):
    return number + 1

if __name__ == "__main__":
    name = sys.argv[1]
    with Executor(2) if name == "local" else open_foreign(name) as executor:
        for face in FACES if name == "local" else ON_FOREIGN:
            values = FACES[face](executor).map(work, range(3))
            assert [value.number for value in values] == [1, 2, 3], face
            assert all(isinstance(value, Value) for value in values), face
    print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "processes"])
def test_what_a_script_defines_travels(tmp_path, name):
    (tmp_path / "script.py").write_text(SCRIPT)
    assert functions.run_python("script.py", name, cwd=tmp_path) == "done\n"
