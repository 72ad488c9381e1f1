"""Benchmarks on the cores of this machine, beside the peers."""

from __future__ import annotations

import heapq
import itertools
import random
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.harness import Benchmark, Case, Figures, Results
from benchmarks.peers import OURS, PEERS
from benchmarks.plots import plot_cost
from benchmarks.tasks import burn, make_bytes, nap, square

COUNTS = (100, 1000, 5000, 20_000, 100_000)
CALLS = 300  # that are made one at a time
SLOW = ("pathos ParallelPool", "Ray", "dask.distributed", "SCOOP")


def cases(
    function: Callable[..., Figures], names: Iterable[str], **arguments: object
) -> list[Case]:
    """Return one case for each of the peers."""
    return [
        Case(
            name,
            function,
            {"peer": name, **arguments},
            PEERS[name].needs,
            ("-m", "scoop", "-n", "2", "benchmarks/case.py")
            if name == "SCOOP"
            else ("-m", "benchmarks.case"),
        )
        for name in names
    ]


# -- trivial tasks ---------------------------------------------------------------------------


def trivial(peer: str) -> Figures:
    """Return the microseconds that a trivial task costs, by the number of tasks."""
    most, figures = PEERS[peer].most or max(COUNTS), {}
    with PEERS[peer].open(2) as pool:
        list(pool.map(square, range(100)))  # all workers are up, and know the function
        for count in (count for count in COUNTS if count <= most):
            begin = time.perf_counter()
            total = sum(pool.map(square, range(count)))
            figures[f"{count} tasks"] = (time.perf_counter() - begin) / count * 1e6
            assert total == (count - 1) * count * (2 * count - 1) // 6
    return figures


def judge_trivial(results: Results) -> str:
    pool = "multiprocessing.Pool"
    many, few = (results.ratio(f"{n} tasks", OURS, pool) for n in (100_000, 5000))
    costs = [
        results.median(name, column) for name in SLOW for column in ("1000 tasks", "5000 tasks")
    ]
    slow = min((cost for cost in costs if cost > 0), default=0.0) / results.median(
        OURS, "100000 tasks"
    )
    return f"{many:.1f} and {few:.1f} times its cost; {slow:.0f} times below the best of those"


TRIVIAL = Benchmark(
    "Trivial tasks",
    "`x * x` for many x on two local workers, unordered, chunks as each chooses them. "
    "Microseconds per task, by the number of tasks; peers that need seconds for more get fewer.",
    cases(trivial, PEERS),
    "within 5 times `multiprocessing.Pool.map` at 100 000 tasks and 10 times at 5000, and 100 "
    "times below ParallelPool, Ray, dask and SCOOP",
    judge_trivial,
    plot=plot_cost,
)


def one_at_a_time(peer: str) -> Figures:
    """Return the microseconds from a call to its result."""
    with PEERS[peer].open(2) as pool:
        for x in range(20):
            pool.call(square, x)
        begin = time.perf_counter()
        for x in range(CALLS):
            assert pool.call(square, x) == x * x
        return {"microseconds": (time.perf_counter() - begin) / CALLS * 1e6}


ONE_AT_A_TIME = Benchmark(
    "One task at a time",
    f"`submit(square, x).result()`, or what each has in its place, {CALLS} times in a loop.",
    cases(one_at_a_time, (name for name in PEERS if "," not in name)),
    "half of ppft's `submit`",
    lambda results: f"{results.ratio('microseconds', OURS, 'ppft'):.2f} of it",
)


# -- uneven tasks ----------------------------------------------------------------------------


def uneven_loops(seed: int, mean: float = 0.020, count: int = 400) -> list[int]:
    """Return numbers of loops that take log-normal times, `mean` seconds in the mean."""
    per_second = 1_000_000 / min(burn(1_000_000) for _ in range(5))
    random_times = random.Random(seed)
    times = [random_times.lognormvariate(0, 1.5) for _ in range(count)]
    return [int(per_second * mean * count * one / sum(times)) for one in times]


def uneven_tasks(peer: str, seed: int) -> Figures:
    """Return how long uneven tasks take, beside what they must."""
    loops = uneven_loops(seed)
    with PEERS[peer].open(2) as pool:
        run = pool.unordered or pool.map
        list(run(burn, [1000] * 100))
        begin = time.perf_counter()
        taken = list(run(burn, loops))
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "of the bound": seconds / max(sum(taken) / 2, *taken)}


def uneven_in_turn(seed: int, speeds: Sequence[float] = (1.0, 1.0)) -> Figures:
    """Return what the same tasks would take if they were handed out in turn, at no cost."""
    loops = uneven_loops(seed)
    free = [(0.0, speed) for speed in speeds]
    for one in loops:
        begin, speed = heapq.heappop(free)
        heapq.heappush(free, (begin + one / speed, speed))
    bound = max(sum(loops) / sum(speeds), max(loops) / max(speeds))
    return {"of the bound": max(free)[0] / bound}


IN_TURN = "in turn, at no cost (computed)"

UNEVEN_TASKS = Benchmark(
    "Uneven tasks",
    "400 tasks that use a processor for log-normal times (sigma 1.5, 20 ms in the mean), other "
    "ones in each round, on two local workers, unordered. The bound is the larger of half of the "
    "sum of the times that the tasks took and the longest one.",
    [
        *cases(
            uneven_tasks,
            (OURS, "multiprocessing.Pool", "joblib", "concurrent.futures", "pathos ParallelPool"),
        ),
        Case(IN_TURN, uneven_in_turn),
    ],
    "1.05 of the bound",
    lambda results: f"{results.median(OURS, 'of the bound'):.3f}",
    rounds=5,
)


# -- data and memory -------------------------------------------------------------------------


def large_results(peer: str, count: int = 200, size: int = 10_000_000) -> Figures:
    """Return how fast large results arrive."""
    with PEERS[peer].open(2) as pool:
        run = pool.unordered or pool.map
        list(run(square, range(100)))
        begin = time.perf_counter()
        total = sum(len(result) for result in run(make_bytes, [size] * count))
        assert total == count * size
        return {"MB/s": total / (time.perf_counter() - begin) / 1e6}


LARGE_RESULTS = Benchmark(
    "Large results",
    "200 results of 10 MB of bytes from two local workers, each dropped as it comes.",
    cases(
        large_results,
        (OURS, "multiprocessing.Pool", "concurrent.futures", "joblib", "loky", "dask.distributed"),
    ),
    "1.0 of `multiprocessing.Pool`",
    lambda results: f"{results.ratio('MB/s', OURS, 'multiprocessing.Pool'):.2f} of it",
)


def memory(count: int) -> Figures:
    """Return the peak memory of a caller that takes its items from a generator."""
    with PEERS[OURS].open(2) as pool:
        total = sum(
            pool.map(square, (x % 1000 for x in itertools.islice(itertools.count(), count)))
        )
    assert total == sum(x * x for x in range(1000)) * count // 1000
    return {"MB": status_of("VmHWM") / 1024}


def status_of(name: str) -> int:
    """Return a number of this process' status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


MEMORY = Benchmark(
    "Items from a generator",
    "Trivial tasks whose items come from a generator; the peak of the caller's memory.",
    [Case(f"{count} items", memory, {"count": count}) for count in (10_000, 1_000_000)],
    "1.2 times as much for 1 000 000 as for 10 000",
    lambda results: f"{results.ratio('MB', '1000000 items', '10000 items'):.2f} times",
)


def idle(peer: str, workers: int = 10) -> Figures:
    """Return the processor time of a caller whose workers sleep."""
    with PEERS[peer].open(workers) as pool:
        run = pool.unordered or pool.map
        list(run(square, range(100)))
        begin, used = time.perf_counter(), own_cpu()
        assert sum(run(nap, [0.1] * 1000)) == 1000
        seconds = time.perf_counter() - begin
        return {"CPU seconds per second": (own_cpu() - used) / seconds, "seconds": seconds}


def own_cpu() -> float:
    """Return the processor time that this process has used, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


IDLE = Benchmark(
    "While workers sleep",
    "1000 tasks that sleep 100 ms, on 10 local workers: the caller's own processor time.",
    cases(
        idle,
        (
            OURS,
            "multiprocessing.Pool",
            "concurrent.futures",
            "pathos ParallelPool",
            "dask.distributed",
        ),
    ),
    "0.05",
    lambda results: f"{results.median(OURS, 'CPU seconds per second'):.3f}",
)
