"""How far a run is: a bar in a terminal, a display in Jupyter, or a line now and then."""

from __future__ import annotations

import importlib
import io
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, cast

from ostap_parallel.report import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Workers = Callable[[], Mapping[str, int]]

_LINE_PERIOD = 30.0  # seconds
_NOTEBOOK_PERIOD = 0.2
_REFRESHES_PER_SECOND = 10
_RATE_SECONDS, _RATE_ITEMS = 60.0, 20  # the rate is measured over both at least
_MAX_WORKERS_TEXT = 40


class ProgressReporter:
    """Counts the items that finished; shows nothing by itself."""

    def __init__(
        self, total: int | None, description: str, workers: Workers, clock: Callable[[], float]
    ) -> None:
        self.total, self.description = total, description
        self.done = self.failed = 0
        self.ended = False
        self._workers, self._clock = workers, clock
        self._start = clock()
        self._samples = deque([(0.0, 0)])  # elapsed seconds, items done

    def advance(self, done: int, failed: int = 0) -> None:
        """Count `done` more finished items, of which `failed` have no result."""
        self.done += done
        self.failed += failed

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
        elif rate := self._rate():
            parts.append(f"{rate:.1f}/s" if rate >= 0.1 else f"{duration(1 / rate)}/item")
            if self.total is not None and self.total > self.done:
                parts.append(f"{duration(max(1, round((self.total - self.done) / rate)))} left")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if workers := render_workers(dict(self._workers())):
            parts.append(workers)
        return ", ".join(parts)

    def _rate(self) -> float:
        """Return items per second, lately: hosts join and leave."""
        now, done, samples = self.elapsed, self.done, self._samples
        if done > samples[-1][1] and now - samples[-1][0] >= 1:
            samples.append((now, done))
        while len(samples) > 1 and (
            now - samples[1][0] >= _RATE_SECONDS and done - samples[1][1] >= _RATE_ITEMS
        ):
            samples.popleft()
        then, before = samples[0]
        return (done - before) / (now - then) if now > then else 0.0


class _LineReporter(ProgressReporter):
    """Prints a line from `advance` when the last one is long ago: no threads, no sleeps."""

    period = _LINE_PERIOD

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._due = self.period
        self._shown = False

    def advance(self, done: int, failed: int = 0) -> None:
        super().advance(done, failed)
        if (now := self.elapsed) >= self._due:
            self._due = now + self.period
            self._shown = True
            self.show()

    def show(self) -> None:
        """Print one line; a standard error that is closed or full must not end the run."""
        if sys.stderr is not None:
            with suppress(OSError, ValueError):
                print(f"{self.description}: {self.status()}", file=sys.stderr, flush=True)

    @contextmanager
    def shown(self) -> Iterator[ProgressReporter]:
        """End what was shown, if anything, when the block ends."""
        try:
            yield self
        finally:
            self.ended = True
            if self._shown:
                self.show()


class _NotebookReporter(_LineReporter):
    """Updates one display of a Jupyter cell. Needs no widgets, unlike rich's live display."""

    period = _NOTEBOOK_PERIOD
    _handle: Any = None

    def show(self) -> None:
        row = _row(self)
        if self._handle is None:
            display = importlib.import_module("IPython.display").display
            self._handle = display(row, display_id=True)
        else:
            self._handle.update(row)


class _Terminal(io.TextIOBase):
    """A terminal whose failures are ignored: closing its window must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def open_progress(
    enabled: bool,
    total: int | None,
    description: str,
    workers: Workers,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> AbstractContextManager[ProgressReporter]:
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
    """
    if not enabled:
        return nullcontext(ProgressReporter(total, description, workers, clock))
    console = _open_console()
    if console is None:
        return _LineReporter(total, description, workers, clock).shown()
    if console.is_jupyter:
        return _NotebookReporter(total, description, workers, clock).shown()
    return _show_bar(ProgressReporter(total, description, workers, clock), console)


def render_workers(workers: Mapping[str, int]) -> str:
    """Return e.g. ``local:2 lxplus701:8``, or ``7 hosts, 56 workers`` when that gets long."""
    text = " ".join(f"{host}:{count}" for host, count in workers.items())
    if len(text) <= _MAX_WORKERS_TEXT:
        return text
    return f"{len(workers)} hosts, {sum(workers.values())} workers"


def _open_console() -> Console | None:
    """Return rich's idea of an interactive terminal or notebook; ``None`` if there is neither."""
    stream = sys.stderr
    # FORCE_COLOR makes rich take a file for a terminal, so isatty() is asked as well.
    is_terminal = stream is not None and not stream.closed and stream.isatty()
    if not is_terminal and "ipykernel" not in sys.modules:
        return None
    from rich.console import Console

    # What users print passes through it too: it is not markup, and not ours to wrap.
    file = cast("TextIO", _Terminal(stream))
    console = Console(file=file, markup=False, emoji=False, highlight=False, soft_wrap=True)
    return console if console.is_jupyter or (is_terminal and console.is_interactive) else None


@contextmanager
def _show_bar(reporter: ProgressReporter, console: Console) -> Iterator[ProgressReporter]:
    from rich.live import Live

    live = Live(
        get_renderable=lambda: _row(reporter),
        console=console,
        refresh_per_second=_REFRESHES_PER_SECOND,
        # Standard output that goes to a file does not disturb the bar, and must get there.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )
    with live:
        try:
            yield reporter
        finally:
            reporter.ended = True
            # Live would drop a line that was begun but not ended.
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()


def _row(reporter: ProgressReporter) -> Table:
    """Return description, bar, elapsed time and status; the last is cut in a narrow terminal."""
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text

    cells: list[Any] = [Text(reporter.description)]
    if reporter.total is not None:
        cells.append(ProgressBar(max(reporter.total, 1), reporter.done, width=20))
    cells.append(Text(str(timedelta(seconds=int(reporter.elapsed)))))
    columns = [Column(no_wrap=True) for _ in cells]
    table = Table.grid(*columns, Column(no_wrap=True, ratio=1), padding=(0, 1), expand=True)
    table.add_row(*cells, Text(reporter.status()))
    return table
