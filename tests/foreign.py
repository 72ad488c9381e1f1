"""Executors of somebody else's, each with two workers that find what the tests import."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

HEAVY = ["dask", "mpi"]  # for runs with --all

# Parameters of a fixture or test.
FOREIGN = [
    "processes",
    "threads",
    *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY),
]


def open_foreign(name: str) -> AbstractContextManager[Executor]:
    """Return what opens the executor of that name in `FOREIGN`, and closes it."""
    return {"processes": processes, "threads": threads, "dask": dask, "mpi": mpi}[name]()


def processes() -> ProcessPoolExecutor:
    # a fork of a process with threads may hang
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


@contextmanager
def dask() -> Iterator[Executor]:
    from distributed import Client

    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        yield client.get_executor()


@contextmanager
def mpi() -> Iterator[Executor]:
    with pytest.MonkeyPatch.context() as patch:  # the wheel of MPI has its mpiexec there
        folder = str(Path(sys.executable).parent)
        patch.setenv("PATH", os.pathsep.join([folder, os.environ["PATH"]]))
        from mpi4py.futures import MPIPoolExecutor

        with MPIPoolExecutor(2, path=sys.path, main=False) as executor:
            yield executor
