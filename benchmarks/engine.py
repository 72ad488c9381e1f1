"""Benchmarks of what workers cost: to start, to keep, to call in a loop, to lose."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool as TheirPool
from pathlib import Path
from typing import Any

from sshd import HostOptions, descendants

from benchmarks.harness import Benchmark, Case, Figures, Results
from benchmarks.peers import OURS
from benchmarks.remote import open_manager
from benchmarks.tasks import burn_for, first_row, keep, kept_size, kill_once, square, who_and_where
from ostap_parallel import Pool

THEIRS = "multiprocessing.Pool"
FORKSERVER = "multiprocessing.Pool, forkserver"


@contextlib.contextmanager
def open_pool(name: str, workers: int, *init: Any) -> Iterator[TheirPool]:
    """Open a pool of ours or of the standard library's."""
    if name == OURS:
        pool: TheirPool = Pool(workers, *init)
    else:
        method = "forkserver" if name == FORKSERVER else "fork"
        pool = multiprocessing.get_context(method).Pool(workers, *init)
    with pool:
        yield pool


def beside(column: str, other: str = THEIRS) -> Callable[[Results], str]:
    """Return what tells how our figure stands beside that of another."""
    return lambda results: f"{results.ratio(column, OURS, other):.2f}"


# -- calls in a loop -------------------------------------------------------------------------

CALLS = 500
LENGTHS = (0, 200, 1000)  # microseconds


def apply(name: str) -> Figures:
    """Return the microseconds of a call that is waited for before the next one."""
    with open_pool(name, 2) as pool:
        for x in range(50):
            pool.apply(square, (x,))
        begin = time.perf_counter()
        for x in range(CALLS):
            assert pool.apply(square, (x,)) == x * x
        return {"microseconds": (time.perf_counter() - begin) / CALLS * 1e6}


def submit(name: str) -> Figures:
    """The same by ``submit`` of an executor."""
    from ostap_parallel import Executor

    with Executor(2) as executor:
        for x in range(50):
            executor.submit(square, x).result()
        begin = time.perf_counter()
        for x in range(CALLS):
            assert executor.submit(square, x).result() == x * x
        return {"microseconds": (time.perf_counter() - begin) / CALLS * 1e6}


SUBMIT = f"{OURS}, submit"

APPLY = Benchmark(
    "Calls in a loop",
    f"`Pool.apply(square, (x,))` on two local workers, {CALLS} times, one after another; and "
    "`Executor.submit(square, x).result()`.",
    [
        Case(OURS, apply, {"name": OURS}),
        Case(SUBMIT, submit, {"name": SUBMIT}),
        Case(THEIRS, apply, {"name": THEIRS}),
    ],
    "0.7 of `multiprocessing.Pool.apply`, both",
    lambda results: (
        f"{results.ratio('microseconds', OURS, THEIRS):.2f} and "
        f"{results.ratio('microseconds', SUBMIT, THEIRS):.2f}"
    ),
    rounds=5,
)


def sampler(name: str) -> Figures:
    """Return the microseconds of a map of 32 items, as samplers make one after another."""
    figures = {}
    with open_pool(name, 2) as pool:
        for length in LENGTHS:
            items = [length] * 32
            for _ in range(10):
                pool.map(burn_for, items)
            begin = time.perf_counter()
            for _ in range(100):
                pool.map(burn_for, items)
            figures[f"{length} us"] = (time.perf_counter() - begin) / 100 * 1e6
    return figures


SAMPLER = Benchmark(
    "Small maps in a loop",
    "`Pool.map` of 32 items that use a processor for so long, 100 times: microseconds per map.",
    [Case(name, sampler, {"name": name}) for name in (OURS, THEIRS)],
    "1.5, 1.05 and 1.03 times `multiprocessing.Pool`",
    lambda results: ", ".join(
        f"{results.ratio(f'{length} us', OURS, THEIRS):.2f}" for length in LENGTHS
    ),
    rounds=5,
)

# -- workers ---------------------------------------------------------------------------------


def start(name: str, workers: int = 16) -> Figures:
    """Return how long it takes until each worker has answered, and what they hold then."""
    begin = time.perf_counter()
    with open_pool(name, workers) as pool:
        pids: set[int] = set()
        while len(pids) < workers:
            pids |= {pid for _, pid in pool.map(who_and_where, [0.005] * 2 * workers, 1)}
        seconds = time.perf_counter() - begin
        time.sleep(0.5)  # they are idle
        memory = sum(map(proportional, descendants(os.getpid())))
    return {"seconds": seconds, "MB": memory / 1024}


def proportional(pid: int) -> int:
    """Return the memory of a process in KiB, in which what n share counts an nth."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


WORKERS = Benchmark(
    "Sixteen local workers",
    "From the call that makes a pool until each of 16 workers has answered; and the memory of "
    "all processes below the caller then (PSS).",
    [Case(name, start, {"name": name}) for name in (OURS, FORKSERVER)],
    "1.0 times the time of a forkserver pool, under 60 MB",
    lambda results: (
        f"{beside('seconds', FORKSERVER)(results)}, {results.median(OURS, 'MB'):.0f} MB"
    ),
    rounds=5,
)


def replace(name: str) -> Figures:
    """Return the milliseconds from an item's death to when it runs again."""
    import tempfile

    from ostap_parallel import WorkManager

    with WorkManager(1, silent=True) as manager, tempfile.TemporaryDirectory() as folder:
        manager.process(square, range(10))
        taken = []
        for number in range(10):
            (died, ran) = manager.process(kill_once, [f"{folder}/{number}"], chunk_size=1)[0]
            taken.append((ran - died) * 1e3)
    return {"milliseconds": sorted(taken)[len(taken) // 2]}


REPLACE = Benchmark(
    "A worker that is killed",
    "From the SIGKILL that an item sends its worker until that item runs again in the next one.",
    [Case(OURS, replace, {"name": OURS})],
    "10 ms",
    lambda results: f"{results.median(OURS, 'milliseconds'):.1f} ms",
    rounds=5,
)

# -- data ------------------------------------------------------------------------------------


def initargs(name: str, size: int = 100_000_000) -> Figures:
    """Return what a worker holds that was given much at its start, and the time of ten maps."""
    with open_pool(name, 1, keep, (bytes(size),)) as pool:
        assert pool.map(kept_size, [0])[0][0] == size
        begin = time.perf_counter()
        for _ in range(10):
            _, memory = pool.map(kept_size, [0])[0]
        return {"MB": memory / 1024, "seconds of ten maps": time.perf_counter() - begin}


INITARGS = Benchmark(
    "A large argument of the initializer",
    "`Pool(1, init, (100 MB,))`, then ten maps of one item: what the worker holds, and the time.",
    [Case(name, initargs, {"name": name}) for name in (OURS, FORKSERVER)],
    "1.5 times the memory of the original's",
    beside("MB", FORKSERVER),
)


def repeated(name: str, size: int = 10_000_000, count: int = 400) -> Figures:
    """Return the seconds of a map whose items share an array."""
    import numpy

    array = numpy.zeros(size // 8)
    with open_pool(name, 2) as pool:
        pool.map(square, range(10))
        begin = time.perf_counter()
        for _ in range(3):
            found = pool.starmap(
                first_row, zip(itertools.repeat(array), range(count), strict=False)
            )
        assert found == list(range(count))
        return {"seconds": (time.perf_counter() - begin) / 3}


REPEATED = Benchmark(
    "Items that share an array",
    "`starmap(f, zip(repeat(array of 10 MB), range(400)))` on two local workers; the mean of 3.",
    [Case(name, repeated, {"name": name}, "numpy") for name in (OURS, THEIRS)],
    "1.2 times `multiprocessing.Pool`",
    beside("seconds"),
)

# -- many workers of one host, many hosts ----------------------------------------------------


def wide(ssh_config: str, workers: int) -> Figures:
    """Return how long it takes until each worker of a host has answered, and our threads."""
    before = threading.active_count()
    begin = time.perf_counter()
    with open_manager(["h1"], ssh_config, workers) as manager:
        pids: set[int] = set()
        while len(pids) < workers:
            found = manager.iexecute(who_and_where, [0.01] * 2 * workers, chunk_size=1)
            pids |= {pid for _, pid in found}
        return {
            "seconds": time.perf_counter() - begin,
            "threads": threading.active_count() - before,
        }


WIDE = Benchmark(
    "A host with many workers",
    "From the call that makes a manager until each worker of its one host has answered; threads "
    "of the caller besides its own.",
    [Case(f"{count} workers", wide, {"workers": count}) for count in (1, 64)],
    "3 times as long for 64 as for 1, 8 threads",
    lambda results: (
        f"{results.ratio('seconds', '64 workers', '1 workers'):.1f} times, "
        f"{results.median('64 workers', 'threads'):.0f} threads"
    ),
    hosts=[HostOptions()],
)

BENCHMARKS = {
    "apply": APPLY,
    "sampler": SAMPLER,
    "workers": WORKERS,
    "replace": REPLACE,
    "initargs": INITARGS,
    "repeated": REPEATED,
    "wide": WIDE,
}
