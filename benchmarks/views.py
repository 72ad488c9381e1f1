"""What it costs to keep when which worker did what."""

from __future__ import annotations

import time
import tracemalloc
from array import array

from benchmarks.harness import Benchmark, Case, Figures, Results
from benchmarks.tasks import square
from ostap_parallel import WorkManager
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.worker.chunk import ChunkOutcome

ITEMS = 100_000


def keeping(size: int) -> Figures:
    """Return what keeping chunks of so many items costs, per item."""
    done = ChunkOutcome("h1", 1, [None] * size, array("d", [1e-3] * size))
    done.begun = time.time()
    chunks = [range(first, first + size) for first in range(0, ITEMS, size)]

    def keep() -> Timeline:
        timeline = Timeline("f")
        for indices in chunks:
            timeline.add(done, indices, 0.0)
        return timeline

    begin = time.perf_counter()
    keep()
    seconds = time.perf_counter() - begin
    tracemalloc.start()
    kept = keep()
    size_of_all, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == ITEMS
    return {"us per item": seconds / ITEMS * 1e6, "bytes per item": size_of_all / ITEMS}


def running(timeline: bool) -> Figures:
    """Return what an item of a run costs that keeps it or not."""
    with WorkManager(2, silent=True, timeline=timeline) as manager:
        manager.process(square, range(ITEMS))
        begin = time.perf_counter()
        manager.process(square, range(ITEMS))
        seconds = time.perf_counter() - begin
        assert (manager.report.timeline is not None) is timeline
    return {"us per item": seconds / ITEMS * 1e6}


def judge(results: Results) -> str:
    many, alone = (
        f"{results.median(name, 'us per item'):.3f} us and "
        f"{results.median(name, 'bytes per item'):.0f} bytes"
        for name in ("chunks of 100", "chunks of one item")
    )
    ratio = results.ratio("us per item", "a run", "a run without")
    return f"{many}; {alone} for items that travel alone; {ratio:.2f} times"


TIMELINE = Benchmark(
    "Timeline",
    f"{ITEMS} items are kept in a timeline, in chunks of 100 and one by one; then a run of as "
    "many trivial items on two local workers, with its timeline and with `timeline=False`.",
    [
        Case("chunks of 100", keeping, {"size": 100}),
        Case("chunks of one item", keeping, {"size": 1}),
        Case("a run", running, {"timeline": True}),
        Case("a run without", running, {"timeline": False}),
    ],
    "under 0.1 us and 100 bytes per item; a run takes no longer for it",
    judge,
    rounds=5,
)
