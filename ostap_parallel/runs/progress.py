"""How far a run is: a bar in a terminal, a display in Jupyter, or a line now and then."""

from __future__ import annotations

import importlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from ostap_parallel.views.words import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

Workers = Callable[[], Mapping[str, int]]

_LINE_PERIOD = 30.0  # seconds
_NOTEBOOK_PERIOD = 0.2
_REFRESHES_PER_SECOND = 10
_RATE_SAMPLES = 20  # at least as many seconds, and items
_MAX_WORKERS_TEXT = 40


class ProgressReporter:
    """Counts the items that finished; shows nothing by itself."""

    period = float("inf")  # seconds between two calls of `show` by `advance`

    def __init__(
        self,
        total: int | None,
        description: str,
        workers: Workers,
        clock: Callable[[], float],
        coming: object = "",
    ) -> None:
        self.total, self.description = total, description
        self.done = self.failed = 0
        self.ended = False
        self.workers, self._clock = workers, clock
        self._coming = coming
        self._start = clock()
        self._due = self.period
        self._samples = deque([(0.0, 0)], maxlen=_RATE_SAMPLES)  # elapsed seconds, items done

    def advance(self, done: int, failed: int = 0) -> None:
        """Count `done` more finished items, of which `failed` have no result."""
        self.done += done
        self.failed += failed
        if (now := self.elapsed) >= self._due:
            self._due = now + self.period
            self.show()

    def end(self) -> None:
        """Show the last state, if any was shown."""
        self.ended = True
        if self._due > self.period:
            self.show()

    def show(self) -> None:
        """Show the present state."""

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def status(self) -> str:
        """Return one line: the counts, the rate, the time left and the workers."""
        of_total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.done}{of_total} items"]
        if self.ended:
            parts[0] += f" in {duration(self.elapsed)}"
        elif rate := self.rate():
            parts.append(f"{rate:.1f}/s" if rate >= 0.1 else f"{duration(1 / rate)}/item")
            if self.total is not None and self.total > self.done:
                parts.append(f"{duration(max(1, round((self.total - self.done) / rate)))} left")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if workers := render_workers(self.workers()):
            parts.append(workers)
        if not self.ended and (coming := str(self._coming)):
            parts.append(coming)
        return ", ".join(parts)

    def rate(self) -> float:
        """Return items per second, lately: hosts join and leave."""
        now, done, samples = self.elapsed, self.done, self._samples
        if done > samples[-1][1] and now - samples[-1][0] >= 1:
            samples.append((now, done))
        then, before = samples[0]
        return (done - before) / (now - then) if now > then else 0.0


class _LineReporter(ProgressReporter):
    """Prints a line from `advance` when the last one is long ago: no threads, no sleeps."""

    period = _LINE_PERIOD

    def show(self) -> None:
        with suppress(OSError, ValueError):  # a standard error that is full or closed
            print(f"{self.description}: {self.status()}", file=sys.stderr, flush=True)


class _NotebookReporter(ProgressReporter):
    """Updates one display of a Jupyter cell. Needs no widgets, unlike rich's live display."""

    period = _NOTEBOOK_PERIOD
    _handle: Any = None

    def show(self) -> None:
        shown = _with_workers(self)
        if self._handle is None:
            display = importlib.import_module("IPython.display").display
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)


@contextmanager
def open_progress(
    enabled: bool,
    total: int | None,
    description: str,
    workers: Workers,
    *,
    clock: Callable[[], float] = time.monotonic,
    coming: object = "",
) -> Iterator[ProgressReporter]:
    """Show progress while the block runs, in the way that suits where standard error goes.

    In a terminal a bar; in Jupyter the same, updated by `ProgressReporter.advance`; elsewhere
    a line every 30 seconds at most; nothing unless `enabled`.

    Parameters
    ----------
    total
        Number of items; ``None`` when it is not known.
    workers
        Returns the number of workers by host. A thread may call it, ten times a second.
    clock
        Returns seconds from any origin.
    coming
        Its text tells what is waited for.
    """
    kind: type[ProgressReporter] = ProgressReporter
    terminal: Console | None = None
    if enabled and sys.stderr is not None:
        console = _open_console()
        # FORCE_COLOR makes rich take a file for a terminal, so isatty() is asked as well.
        if console is not None and console.is_interactive and sys.stderr.isatty():
            terminal = console
        else:
            is_notebook = console is not None and console.is_jupyter
            kind = _NotebookReporter if is_notebook else _LineReporter
    reporter = kind(total, description, workers, clock, coming)
    with _live(reporter, terminal) if terminal else nullcontext():
        try:
            yield reporter
        finally:
            reporter.end()
            with suppress(OSError, ValueError):  # of a stream that is closed
                for stream in (sys.stdout, sys.stderr):
                    # Live would drop a line that was begun but not ended.
                    print(end="", file=stream, flush=True)


def render_workers(workers: Mapping[str, int]) -> str:
    """Return e.g. ``local:2 lxplus701:8``, or ``7 hosts, 56 workers`` when that gets long."""
    text = " ".join(f"{host}:{count}" for host, count in workers.items())
    if len(text) <= _MAX_WORKERS_TEXT:
        return text
    return f"{len(workers)} hosts, {sum(workers.values())} workers"


def _open_console() -> Console | None:
    """Return standard error for rich; ``None`` on a bare host, where a task has its own runs."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    # What users print passes through it too: it is not markup, and not ours to wrap.
    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _live(reporter: ProgressReporter, console: Console) -> Live:
    from rich.live import Live

    class Forgiving(Live):
        def stop(self) -> None:
            with suppress(OSError):  # the terminal has gone: the run goes on
                super().stop()

    return Forgiving(
        get_renderable=lambda: _row(reporter),
        console=console,
        refresh_per_second=_REFRESHES_PER_SECOND,
        # Standard output that goes to a file does not disturb the bar, and must get there.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )


def _with_workers(reporter: ProgressReporter) -> Table:
    """Return the row, and below it the number of workers of each host where there are several."""
    from rich.table import Table
    from rich.text import Text

    workers = reporter.workers()
    rows = Table.grid(expand=True)
    rows.add_row(_row(reporter))
    if len(workers) > 1:
        rows.add_row(Text("  ".join(f"{host}:{count}" for host, count in workers.items()), "dim"))
    return rows


def _row(reporter: ProgressReporter) -> Table:
    """Return description, bar and status; the last is cut in a narrow terminal."""
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text

    cells: list[Any] = [Text(reporter.description)]
    if reporter.total is not None:
        cells.append(ProgressBar(max(reporter.total, 1), reporter.done, width=20))
    columns = [Column(no_wrap=True) for _ in cells]
    table = Table.grid(*columns, Column(no_wrap=True, ratio=1), padding=(0, 1), expand=True)
    table.add_row(*cells, Text(reporter.status()))
    return table
