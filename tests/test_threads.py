"""Workers share the cores: the libraries in them take one thread each, unless told otherwise."""

from __future__ import annotations

import os

import pytest
from helpers import open_manager

from ostap_parallel import WorkManager
from ostap_parallel.machine.cpus import thread_limits

NAMES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
ONE = dict.fromkeys(NAMES, "1")


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def found(manager):
    """Return the variables of a worker."""
    names = NAMES
    (found,) = manager.process(lambda x: {name: os.environ.get(name) for name in names}, [0])
    return found


@pytest.mark.parametrize(
    ("given", "others"),
    [
        ({}, "1"),
        ({"OMP_NUM_THREADS": "4"}, "4"),
        ({"OMP_NUM_THREADS": "4,2"}, "4"),  # of nested regions
        ({"OMP_NUM_THREADS": ""}, "1"),
        ({"MKL_NUM_THREADS": "8"}, "1"),
    ],
)
def test_what_is_set_stays(given, others):
    assert given | thread_limits(given) == dict.fromkeys(NAMES, others) | given


@pytest.mark.slow
def test_local_workers(monkeypatch):
    before = dict(os.environ)
    with WorkManager(1, silent=True) as manager:
        assert found(manager) == ONE
    assert dict(os.environ) == before
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    with WorkManager(1, silent=True) as manager:
        assert found(manager) == ONE | {"MKL_NUM_THREADS": "3"}


@pytest.mark.slow
def test_hosts(hosts):
    with open_manager(hosts, "h1*1") as manager:
        assert found(manager) == ONE
    with open_manager(hosts, "h1*1", environment="export OMP_NUM_THREADS=2") as manager:
        assert found(manager) == dict.fromkeys(NAMES, "2")
