"""What it costs to keep when which worker did what."""

from __future__ import annotations

import shutil
import tempfile
import time
import tracemalloc
from array import array
from pathlib import Path

from benchmarks.harness import Benchmark, Case, Figures, Results
from benchmarks.tasks import square
from ostap_parallel import WorkManager
from ostap_parallel.views.page import BARS, Facts, page_of
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.worker.chunk import ChunkOutcome

ITEMS = 100_000

# Whether all plots of a page are there, and at rest.
DRAWN = "() => window.Bokeh && Bokeh.documents.length && Bokeh.documents.every(d => d.is_idle)"


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


def page(count: int) -> Figures:
    """Return what the page of a run with so many items costs, here and in a browser."""
    size, workers = 50, 16
    timeline = Timeline("f")
    timeline.start -= count * 1e-2 / workers
    for number in range(count // size):
        done = ChunkOutcome(f"h{number % 2}", number % workers + 1, [None] * size)
        done.seconds.extend(0.002 + 0.016 * ((7 * n + number) % 100) / 100 for n in range(size))
        done.failed.update({3} if number % 20 == 0 else ())
        done.begun = timeline.start + number // workers * size * 1e-2
        timeline.add(done, range(size * number, size * (number + 1)), timeline.start)
    from playwright.sync_api import sync_playwright

    begin = time.perf_counter()
    text = page_of(Facts("f", {}, picture=timeline.picture(BARS)))
    written = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "run.html"
        file.write_text(text)
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        shown = browser.new_page()
        opened = time.perf_counter()
        shown.goto(file.as_uri())
        shown.wait_for_function(DRAWN)
        drawn = time.perf_counter()
        browser.close()
    times = {"seconds to write": written - begin, "seconds to draw": drawn - opened}
    return {"MB": len(text.encode()) / 1e6, **times}


def judge_page(results: Results) -> str:
    name = "100000 items"
    draw = results.median(name, "seconds to draw")
    return f"{results.median(name, 'MB'):.1f} MB, {draw:.1f} s"


PAGE = Benchmark(
    "The page of a run",
    "The page of a run of so many items on 16 workers, one in a thousand of which has failed: "
    "written, and opened in Chromium without a window, until all plots are there. With more than "
    f"some {BARS} items neighbours are drawn as one bar.",
    [Case(f"{n} items", page, {"count": n}, "playwright") for n in (1000, 10**4, 10**5)],
    "100000 items in under 5 MB, drawn in 2 s",
    judge_page,
)

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
