"""Intermediate results in a data base: Ostap's dump_dbase, dump_jobs and dump_freq."""

from __future__ import annotations

import shelve
from concurrent.futures import ThreadPoolExecutor

import functions
import pytest

from ostap_parallel import ConfigError, GenericTask, TaskMerger, WorkManager


@pytest.fixture
def manager():
    """A function that makes a manager on threads, with a data base."""
    with ThreadPoolExecutor(1) as threads:
        yield lambda **options: WorkManager(executor=threads, silent=True, **options)


def contents(path):
    with shelve.open(str(path), "r") as dbase:
        return dict(dbase)


def test_the_first_results_and_what_is_merged(manager, tmp_path):
    path = tmp_path / "results.db"
    with manager(dump_dbase=path, dump_jobs=2, dump_freq=3) as wm:
        seen = []

        def merger(merged, result):
            seen.append(contents(path).get("merged"))
            return merged + result

        assert wm.process(functions.square, range(7), merger=merger, ordered=True) == 91
    assert seen == [None, None, (3, 5), (3, 5), (3, 5), (6, 55)]
    assert contents(path) == {
        "results_0": (0, 0),
        "results_1": (1, 1),
        "merged": (7, 91),
        "TOTAL_jobs": 7,
        "FINAL_results": 91,
    }


def test_all_results(manager, tmp_path):
    with manager(dump_dbase=str(tmp_path / "results"), dump_jobs=-1) as wm:
        wm.process(functions.square, "abc"[:0])
        wm.process(functions.with_index, "abc", jobid=True)
    found = contents(tmp_path / "results")
    assert found == {f"results_{i}": (i, (i, "abc"[i])) for i in range(3)}


def test_results_are_as_they_came(manager):
    """Merging may change the first one, which it starts from."""
    dbase = {}
    with manager(dump_dbase=dbase, dump_jobs=1, dump_freq=5) as wm:
        task = GenericTask(lambda jobid, item: [item], merger=lambda a, b: a + b)
        assert wm.process(task, [1, 2, 3], chunk_size=1) == [1, 2, 3]
    assert dbase["results_0"] == (0, [1])
    assert dbase["FINAL_results"] == [1, 2, 3]


def test_failures_are_not_counted(manager):
    dbase = {}
    with manager(dump_dbase=dbase, dump_jobs=-1, dump_freq=1) as wm:
        wm.process(
            lambda x: 1 // x, [1, 0, -1], merger=TaskMerger(), on_error="collect", ordered=True
        )
    assert dbase == {
        "results_0": (0, 1),
        "results_1": (2, -1),
        "merged": (2, 0),
        "TOTAL_jobs": 2,
        "FINAL_results": 0,
    }


def test_an_open_data_base_stays_open(manager, tmp_path):
    with shelve.open(str(tmp_path / "results")) as dbase:
        with manager(dump_dbase=dbase, dump_freq=2) as wm:
            assert wm.process(functions.square, range(3), merger=TaskMerger()) == 5
        assert dbase["FINAL_results"] == 5


def test_functions_as_results(manager, tmp_path):
    with manager(dump_dbase=tmp_path / "results", dump_jobs=1) as wm:
        wm.process(lambda x: lambda y: x + y, [1, 2])
    jobid, add = contents(tmp_path / "results")["results_0"]
    assert (jobid, add(2)) == (0, 3)


def test_results_of_a_run_that_fails_stay(manager, tmp_path):
    path = tmp_path / "results"
    with (
        manager(dump_dbase=path, dump_jobs=-1, dump_freq=1) as wm,
        pytest.raises(ZeroDivisionError),
    ):
        wm.process(lambda x: 1 // x, [1, 0], merger=TaskMerger(), chunk_size=1)
    assert contents(path) == {"results_0": (0, 1), "merged": (1, 1)}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dump_jobs": 1}, "need dump_dbase"),
        ({"dump_freq": 1}, "need dump_dbase"),
        ({"dump_dbase": {}, "dump_freq": -1}, "dump_freq"),
        ({"dump_dbase": {}, "dump_jobs": "all"}, "dump_jobs"),
        ({"dump_dbase": "no/such/folder/x", "dump_jobs": 1}, "no/such/folder/x cannot be used"),
        ({"dump_dbase": 5, "dump_jobs": 1}, "dump_dbase"),
    ],
)
def test_mistakes(options, text):
    with pytest.raises(ConfigError, match=text):
        WorkManager(1, **options)
