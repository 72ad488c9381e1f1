"""Benchmarks of pools on batch systems, which are brought up for each measurement."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

from clusters import open_sge, open_slurm

from benchmarks import tasks
from benchmarks.harness import Benchmark, Case, Figures, Results

OURS, PARTY = "SlurmPool, 4 jobs", "pypoolparty slurm.Pool, 4 chunks"
SLOTS = 4
NAPS, NAP = 64, 0.05
TRIVIAL = 2000


@contextmanager
def on(kind: str) -> Any:
    """Bring up a batch system of four slots, and be in a directory that its jobs see."""
    opening = open_slurm(accounts=kind == "accounts") if kind != "sge" else open_sge(SLOTS)
    with opening as cluster, tempfile.TemporaryDirectory(dir=cluster.directory) as folder:
        os.environ |= cluster.environ
        os.chdir(folder)
        yield cluster


Map = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]


def measure(begin: Callable[[], Map], trivial: int = TRIVIAL) -> Figures:
    """Return the seconds of two maps by what `begin` makes anew, and until the first result."""
    figures = {}
    start = time.perf_counter()
    results = iter(begin()(tasks.nap, [NAP] * NAPS))
    values = [next(results)]
    figures["64 x 50 ms: first"] = time.perf_counter() - start
    values += results
    figures["all"] = time.perf_counter() - start
    assert values == [1] * NAPS, values
    start = time.perf_counter()
    squares = sorted(begin()(tasks.square, [*range(trivial)]))
    assert squares == [x * x for x in range(trivial)], squares
    figures[f"{TRIVIAL} trivial"] = (time.perf_counter() - start) * TRIVIAL / trivial
    return figures


def ours(kind: str) -> Figures:
    """Measure our pool, also with an item that ends its worker."""
    from ostap_parallel import WorkerLost
    from ostap_parallel.batch import SgePool, SlurmPool

    pool_of = SgePool if kind == "sge" else SlurmPool
    with on(kind):
        with pool_of(chunks=SLOTS) as pool:
            figures = measure(lambda: pool.imap_unordered)
        start = time.perf_counter()
        with pool_of(keep=False) as pool:
            try:
                pool.map(tasks.end_worker, [0])
            except WorkerLost:
                figures["item killed"] = time.perf_counter() - start
        return figures


def party(kind: str, array: bool) -> Figures:
    """Measure pypoolparty, which looks every half second."""
    import pypoolparty

    given = {"polling_interval": 0.5, "python_path": sys.executable}
    with on(kind):
        if array:
            make = pypoolparty.slurm.array.Pool
            return measure(lambda: make(**given).map, 64)
        make = pypoolparty.slurm.Pool if kind == "slurm" else pypoolparty.sun_grid_engine.Pool
        return measure(lambda: make(num_chunks=SLOTS, **given).map)


def submitit() -> Figures:
    """Measure submitit, a job for each item, which needs accounts."""
    from submitit import AutoExecutor

    def begin() -> Map:
        executor = AutoExecutor(folder="log", cluster="slurm")
        executor.update_parameters(timeout_min=5, slurm_array_parallelism=SLOTS)

        def run(function: Callable[[Any], Any], items: list[Any]) -> Iterable[Any]:
            for job in executor.map_array(function, items):
                yield job.result()

        return run

    with on("accounts"):
        return measure(begin, 64)


def dask(kind: str) -> Figures:
    """Measure dask-jobqueue."""
    from dask.distributed import Client, as_completed
    from dask_jobqueue import SGECluster, SLURMCluster

    given = {"cores": 1, "memory": "200MB", "walltime": "00:10:00"}
    with on(kind):

        def begin() -> Map:
            if kind == "slurm":
                cluster = SLURMCluster(processes=1, **given)
            else:
                cluster = SGECluster(processes=1, resource_spec="h_rt=600", **given)
            cluster.scale(SLOTS)
            client = Client(cluster)

            def run(function: Callable[[Any], Any], items: list[Any]) -> Iterable[Any]:
                futures = client.map(function, items, pure=False)
                if len(items) == NAPS:
                    yield from (future.result() for future in as_completed(futures))
                else:
                    yield from client.gather(futures)
                client.close()
                cluster.close()

            return run

        return measure(begin)


def judge(results: Results) -> str:
    """Return ours beside the fastest peer's."""
    ratio = results.ratio("all", OURS, PARTY)
    return f"{ratio:.2f} times the seconds of pypoolparty in as many chunks"


BATCH = Benchmark(
    "Batch systems",
    "64 naps of 50 ms, and 2000 trivial items, on 4 slots of a SLURM or an SGE on this machine "
    "that is brought up before; seconds from nothing, a pool or cluster made anew for each. Of "
    "those with a job for each item, the time of 2000 is made from that of 64. The last column: "
    "seconds until the error of an item that kills its worker has come.",
    [
        Case(OURS, ours, {"kind": "slurm"}),
        Case("SgePool, 4 jobs", ours, {"kind": "sge"}),
        Case(PARTY, party, {"kind": "slurm", "array": False}, "pypoolparty"),
        Case(
            "pypoolparty slurm.array.Pool", party, {"kind": "slurm", "array": True}, "pypoolparty"
        ),
        Case(
            "pypoolparty sun_grid_engine.Pool, 4 chunks",
            party,
            {"kind": "sge", "array": False},
            "pypoolparty",
        ),
        Case("submitit map_array", submitit, {}, "submitit"),
        Case("dask-jobqueue SLURMCluster", dask, {"kind": "slurm"}, "dask_jobqueue"),
        Case("dask-jobqueue SGECluster", dask, {"kind": "sge"}, "dask_jobqueue"),
    ],
    "no more seconds than any of these",
    judge,
    rounds=1,
)
