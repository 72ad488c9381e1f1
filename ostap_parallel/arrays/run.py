"""A run of items in arrays of jobs, which goes on when the process has ended that submitted it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ostap_parallel.arrays import sizes
from ostap_parallel.arrays.layout import DIRECTORY, Header, Layout
from ostap_parallel.arrays.records import Record, Told, read
from ostap_parallel.arrays.settings import Settings, start_file
from ostap_parallel.arrays.submitting import Submitter
from ostap_parallel.arrays.verdict import Verdict, failure_of, judge, outcome_of
from ostap_parallel.arrays.watching import Watcher
from ostap_parallel.engine.backend import pack_function
from ostap_parallel.errors import JobRefused, OstapParallelError, SchedulerUnavailable
from ostap_parallel.runs.display import title_of
from ostap_parallel.runs.ordering import Ordering
from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.worker.chunk import Writer
from ostap_parallel.worker.execute import Call

logger = logging.getLogger(__name__)

# Seconds between looks at whether nobody looks after the run any more, and at what there was no
# room for.
LOOKING = 2.0

POLLING = 5.0
GRACE = 60.0

# Of an item whose value somebody else has.
_DONE = Outcome(-1, None)


class Run:
    """Items that are done by arrays of jobs, over a directory that all hosts share.

    Any process that can read the directory may make one, also of a run that another has begun,
    and several may at the same time: one of them sees to it that what was lost is submitted again.

    Parameters
    ----------
    directory
        Of the run; or that of a pool, if there is one run in it.
    polling
        Seconds between looks at the directory, at most.
    grace
        Seconds that a file may stay invisible here that another host has written.

    Raises
    ------
    FileNotFoundError
        There is no run in the directory, or more than one.
    PermissionError
        It is somebody else's, or others may write there.
    OstapParallelError
        It cannot be read by this version.
    """

    def __init__(
        self, directory: Path | str, *, polling: float = POLLING, grace: float = GRACE
    ) -> None:
        self._layout = Layout(_only_run(Path(directory)))
        self._layout.check()
        try:
            self.settings = Settings(**self._layout.read_json("settings"))
        except (TypeError, ValueError) as exc:
            text = "was not made by this version of ostap_parallel, or is damaged: read it with"
            raise OstapParallelError(f"{directory}: {text} the version that made it") from exc
        self._polling, self._grace = polling, grace
        self._submitter = Submitter(self._layout, self.settings)
        self._headers: dict[int, Header] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._begun_again: set[int] = set()  # chunks with items for which that holds
        self._latest: dict[int, int] = {}  # by item: the last chunk it is in, unless the first
        self._outcomes: dict[int, tuple[int, Outcome]] = {}  # with the chunk
        self._done: dict[int, tuple[int, Outcome]] = {}  # by chunk: of items that are not kept
        self._gone_since = 0.0
        self._early: dict[int, Outcome] = {}  # of items whose chunks have not ended
        self._fresh: list[int] = []  # items of which somebody is to be told
        self._stopping = self._submitter.stopping
        self._watcher: Watcher | None = None
        self._kept: Watcher | None = None  # for the next who waits
        self._refresh()

    @property
    def directory(self) -> Path:
        """Where the run is."""
        return self._layout.root

    @property
    def total(self) -> int:
        """Number of items."""
        return self.settings.total

    def __len__(self) -> int:
        return self.total

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    # -- what is known

    def _refresh(self) -> None:
        """Take in what the directory says."""
        later = [n for n in self._layout.chunks() if n >= self.settings.chunks]
        for number in [*range(self.settings.chunks), *later]:
            if number not in self._headers:
                self._add_header(number)
        missing = self._headers.keys() - self._verdicts.keys()
        for number in sorted(self._layout.results(missing)):
            told = read(self._layout.root / self._layout.name("results", number))
            if told.end and told.end != "ended":
                self._take(number, told)

    def _add_header(self, number: int) -> None:
        size, total = self.settings.size, self.total
        if number < self.settings.chunks:
            self._headers[number] = Header(
                0, range(number * size, min(total, (number + 1) * size))
            )
            return
        header = self._headers[number] = self._layout.read_header(number)
        for index in header.indices:
            if self._latest.get(index, -1) < number:
                self._latest[index] = number
                self._outcomes.pop(index, None)
                self._early.pop(index, None)

    def _chunk_of(self, index: int) -> int:
        return self._latest.get(index, index // self.settings.size)

    def _take(self, number: int, told: Told) -> None:
        """Take in what became of a chunk."""
        header = self._headers[number]
        verdict = self._verdicts[number] = judge(self.settings, header, told)
        if verdict.again:
            self._begun_again.add(number)
        records, verdict.records = verdict.records, {}  # each has its outcome: there may be many
        for index, record in records.items():
            if self._chunk_of(index) <= number:
                early = self._early.pop(index, None)
                self._outcomes[index] = number, early or outcome_of(record)
                self._fresh.append(index)
        for index, reason in verdict.failed.items():
            if self._chunk_of(index) <= number:
                self._outcomes[index] = number, failure_of(index, reason, header.attempt)
                self._fresh.append(index)

    def _take_early(self, news: Mapping[int, Iterable[Record]]) -> None:
        """Take in what items have returned whose chunks have not ended."""
        for number, records in news.items():
            for record in records:
                index = record.index
                is_new = self._chunk_of(index) == number and index not in self._outcomes
                if record.ok and is_new and index not in self._early:
                    self._early[index] = outcome_of(record)
                    self._fresh.append(index)

    def _missing_again(self) -> list[tuple[int, int]]:
        """Write the chunks of what is to be begun again; return them with their attempts."""
        made: list[tuple[int, int]] = []
        if not self._begun_again:
            return made
        known = {(h.of, tuple(h.indices)) for h in self._headers.values() if h.of >= 0}
        for number in sorted(self._begun_again):
            for again in self._verdicts[number].again:
                indices = [index for index in again.indices if self._chunk_of(index) == number]
                if indices and (number, tuple(again.indices)) not in known:
                    header = Header(0, indices, again.attempt, again.blameless, number)
                    made.append((self._write_again(header), again.attempt))
        return made

    def _write_again(self, header: Header) -> int:
        """Write a chunk of items that are in others already."""
        number = max(self._headers) + 1
        items: dict[int, Any] = {}
        for source in {self._chunk_of(index) for index in header.indices}:
            items.update(dict(self._layout.read_chunk(source)[1]))
        chosen = [(index, items[index]) for index in header.indices]
        self._layout.write_chunk(number, header, chosen)
        self._add_header(number)
        return number

    @property
    def is_done(self) -> bool:
        """Whether it is known what became of every item."""
        return len(self._outcomes) == self.total

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled."""
        return (self._layout.root / "cancelled").exists()

    # -- going on

    def arrivals(
        self, ordered: bool = False, keep: bool = True
    ) -> Generator[Batch | Outcome, None, None]:
        """Yield what becomes of the items, as they come or in their order.

        Parameters
        ----------
        keep
            Have values in memory for `results`, too; else of what was yielded only errors.

        Raises
        ------
        JobRefused
            Jobs can never run, with the scheduler's words.
        concurrent.futures.CancelledError
            The run was cancelled before all was done.
        """
        arriving: Iterator[Batch | Outcome] = self._as_they_come(keep=keep)
        with self._needed():
            yield from Ordering(float("inf")).in_order(arriving) if ordered else arriving

    def _as_they_come(
        self, end: float | None = None, keep: bool = True
    ) -> Generator[Outcome, None, None]:
        """Yield outcomes until there are all, or until a time of ``time.monotonic``."""
        self._refresh()
        self._fresh = sorted({*self._outcomes, *self._early})
        given, left_over = bytearray(self.total), self.total
        with contextlib.ExitStack() as stack:
            is_leader = self._lead(stack)
            watcher = self._watcher = self._watcher_for(is_leader)
            closing = stack.enter_context(contextlib.ExitStack())
            closing.callback(watcher.close)
            if is_leader:
                self._recover(watcher)
            next_look = time.monotonic() + LOOKING
            while True:
                fresh, self._fresh = self._fresh, []
                for index in fresh:
                    outcome = self._outcome(index, keep)
                    if not given[index]:
                        given[index], left_over = True, left_over - 1
                        yield outcome
                if not left_over and self.is_done:
                    return
                if self._stopping.is_set() or self.is_cancelled:
                    raise CancelledError("the run was cancelled")
                left = LOOKING if end is None else min(LOOKING, end - time.monotonic())
                if left <= 0:
                    if is_leader:
                        closing.pop_all()
                        self._kept = watcher
                    return
                for number, told in watcher.news(left).items():
                    self._take(number, told)
                self._take_early(watcher.early())
                if is_leader:
                    self._submit(watcher, self._missing_again())
                if time.monotonic() > next_look:
                    next_look = time.monotonic() + LOOKING
                    is_leader = self._look_around(watcher, stack, is_leader)

    def _outcome(self, index: int, keep: bool) -> Outcome:
        """Return what became of an item; only that it is done is known then, unless it is kept."""
        if (early := self._early.get(index)) is not None:
            if not keep:
                self._early[index] = _DONE
            return early
        number, outcome = self._outcomes[index]
        if not keep and outcome.error is None:
            self._outcomes[index] = self._done.setdefault(number, (number, _DONE))
        return outcome

    def _watcher_for(self, is_leader: bool) -> Watcher:
        """Return what watches; who waits again and again, for short times, has the same one.

        It knows when it has asked the scheduler, and what that has said so far.
        """
        kept, self._kept = self._kept, None
        if kept is not None and is_leader:
            return kept
        scheduler, timing = self.settings.scheduler(), (self._polling, self._grace)
        watcher = Watcher(self._layout, scheduler, *timing, item_by_item=True)
        weakref.finalize(self, watcher.close)
        return watcher

    def _lead(self, stack: contextlib.ExitStack) -> bool:
        """Become who looks after the run, unless somebody does."""
        file = (self._layout.root / "lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError as exc:  # a file system without locks: to be trusted with one process
            logger.warning("%s cannot be locked (%s): wait in one process only", file.name, exc)
        stack.enter_context(file)
        stack.callback(_unlock, file, os.getpid())
        return True

    def _recover(self, watcher: Watcher) -> None:
        """Go on where another process has stopped."""
        if self.is_cancelled:
            return
        self._submitter.waiting.clear()  # what has not been submitted is found here
        submitted: set[int] = set()
        for array in self._submitter.recover():
            submitted.update(self._layout.elements(array))
            watcher.add(array, self._verdicts)
        waiting = [n for n in sorted(self._headers) if n not in submitted and self._is_wanted(n)]
        self._submit(watcher, [(n, self._headers[n].attempt) for n in waiting])
        self._submit(watcher, self._missing_again())

    def _is_wanted(self, number: int) -> bool:
        """Return whether not all items of a chunk are in later ones, too."""
        return any(self._chunk_of(index) == number for index in self._headers[number].indices)

    def _submit(self, watcher: Watcher, chunks: list[tuple[int, int]]) -> None:
        if chunks:
            count = sum(len(self._headers[number].indices) for number, _ in chunks)
            logger.info("%d items are submitted again", count)
            for array in self._submitter.submit(chunks):
                watcher.add(array, self._verdicts)

    @contextlib.contextmanager
    def _needed(self) -> Iterator[None]:
        """Cancel the jobs if the directory is gone: nobody would ever see what they do."""
        try:
            with self._layout.needed():
                yield
        except FileNotFoundError:
            if not self._layout.exists():
                with contextlib.suppress(SchedulerUnavailable, JobRefused):
                    self._submitter.cancel()
            raise

    def _look_around(self, watcher: Watcher, stack: contextlib.ExitStack, is_leader: bool) -> bool:
        self._gone_since = 0.0 if self._layout.exists() else self._gone_since or time.monotonic()
        if self._gone_since and time.monotonic() > self._gone_since + self._grace:
            raise FileNotFoundError(self.directory)
        if not is_leader:
            self._refresh()
            if self._lead(stack):
                self._recover(watcher)
                return True
            return False
        for array in self._submitter.submit_waiting():
            watcher.add(array, self._verdicts)
        return True

    # -- what users call

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is known what became of every item; return whether it is.

        While this waits, what was lost is submitted again. Ctrl-C stops the waiting, not the run.

        Raises
        ------
        JobRefused
            Jobs can never run, with the scheduler's words.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with contextlib.suppress(CancelledError), self._needed():
            while not self.is_done:
                for _ in self._as_they_come(end):
                    pass
                if end is not None and time.monotonic() > end:
                    break
        return self.is_done

    def results(self, *, return_exceptions: bool = False) -> list[Any]:
        """Return the results in the order of the items, once all have ended.

        Parameters
        ----------
        return_exceptions
            Have exceptions in their places, in place of raising the first one.

        Raises
        ------
        Exception
            What the first item that failed has raised, or `WorkerLost`.
        concurrent.futures.CancelledError
            The run was cancelled before all was done.
        """
        self.wait()
        outcomes = [self._outcomes.get(index) for index in range(self.total)]
        missing = CancelledError("the run was cancelled")
        found = [missing if one is None else one[1].error for one in outcomes]
        if not return_exceptions:
            for error in found:
                if error is not None:
                    raise error
        return [
            one[1].value if one is not None and error is None else error
            for one, error in zip(outcomes, found, strict=True)
        ]

    def errors(self) -> dict[int, BaseException]:
        """Return the errors of the items that have failed so far, by their index."""
        failures = self.failures()
        return {one.index: one.error for one in failures if one.error is not None}

    def failures(self) -> list[Outcome]:
        """Return what became of the items that have failed so far, in their order."""
        self._refresh()
        outcomes = (outcome for _, outcome in self._outcomes.values())
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        return sorted(failed, key=lambda outcome: outcome.index)

    def jobs(self) -> list[str]:
        """Return the ids of the arrays that are known to have been submitted."""
        ids = map(self._layout.job_id, self._layout.arrays())
        return [job for job in ids if job]

    def records(self) -> Iterator[Record]:
        """Yield what is known of each item that has ended: output, host, times, memory.

        Of one that was begun again, each time.
        """
        for number in self._layout.results(self._headers):
            told = read(self._layout.root / self._layout.name("results", number))
            yield from told.records.values()

    def stop(self) -> None:
        """Have who waits for arrivals wait no longer, from any thread."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.wake()

    @property
    def ended(self) -> int:
        """Number of items of which it is known what became of them."""
        return len(self._outcomes)

    def cancel(self) -> None:
        """Cancel all jobs; what is done stays, and `resubmit` goes on with the rest.

        Raises
        ------
        SchedulerUnavailable
            Jobs may still be there: they end, when they begin, without doing anything.
        """
        self.stop()
        with contextlib.suppress(JobRefused):
            self._submitter.cancel()

    def resubmit(self) -> int:
        """Submit the items again that have failed, or that were cancelled; return their number.

        Raises
        ------
        OstapParallelError
            Another one waits for the run, and submits again what is lost.
        """
        with contextlib.ExitStack() as stack:
            if not self._lead(stack):  # both would give their chunks the same numbers
                what = "is waited for by another, which looks after it"
                raise OstapParallelError(f"{self.directory} {what}: stop that one first")
            return self._resubmit()

    def _resubmit(self) -> int:
        self._refresh()
        was_cancelled = self.is_cancelled
        (self._layout.root / "cancelled").unlink(missing_ok=True)
        self._stopping.clear()
        failed = [i for i, (_, outcome) in self._outcomes.items() if outcome.error is not None]
        if was_cancelled:
            failed += [index for index in range(self.total) if index not in self._outcomes]
        size = self.settings.size
        chunks = []
        for start in range(0, len(failed), size):
            indices = sorted(failed)[start : start + size]
            chunks.append((self._write_again(Header(0, indices)), 1))
        if chunks:
            self._submitter.submit(chunks)
        return len(failed)

    def remove(self) -> None:
        """Remove the directory; what is not done is cancelled, and what else is in the queue."""
        try:
            if self._layout.exists():
                self._refresh()  # another may have submitted some again
            if self.is_done:
                self._submitter.clear()
            else:
                self.cancel()
        except (SchedulerUnavailable, JobRefused) as exc:
            logger.warning("jobs of %s may be left, and will do nothing: %s", self, exc)
        self._layout.remove()
        if self._layout.root.parent.name == DIRECTORY:
            with contextlib.suppress(OSError):  # others may be in there
                self._layout.root.parent.rmdir()


def _unlock(file: IO[bytes], owner: int) -> None:
    """Give a lock back, also of a file that a fork has open; nothing in a fork."""
    if os.getpid() == owner:
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)


def _only_run(directory: Path) -> Path:
    if Layout(directory).exists():
        return directory
    below = sorted(directory.iterdir()) if directory.is_dir() else []
    found = [one for one in below if Layout(one).exists()]
    if len(found) == 1:
        return found[0]
    names = "".join(f"\n  {one}" for one in found)
    what = f"are {len(found)} runs" if found else "is no run"
    raise FileNotFoundError(f"there {what} in {directory.absolute()}{names}")


def create(
    root: Path | str,
    settings: Settings,
    function: Callable[[Any], Any],
    items: Iterable[Any],
    chunk_size: int | None = None,
    chunks: int | None = None,
    stopping: threading.Event | None = None,
    **timing: float,
) -> Run:
    """Write a run into a new directory, and submit it.

    Parameters
    ----------
    chunk_size, chunks
        Items that a job does, or the number of jobs; by default see `sizes.chunk_size`.
    stopping
        Is set, by another thread, when the run is not wanted any more; see `Run.stop`.
    timing
        As of `Run`.

    Raises
    ------
    SerializeError
        The function, or an item, cannot be sent.
    FileExistsError
        There is something in the directory.
    JobRefused
        Jobs can never run so, with the scheduler's words; nothing is left.
    concurrent.futures.CancelledError
        It is not wanted any more; nothing is left.
    """
    stopping = stopping or threading.Event()
    items = items if isinstance(items, Sequence) else list(items)
    size = chunk_size or sizes.chunk_size(len(items), settings, chunks)
    settings = replace(settings, total=len(items), size=size, function=title_of(function))
    layout = Layout(root)
    layout.create()
    try:
        call = Call(function, log_level=logging.getLogger().level)
        layout.write("calls/0", pack_function(call))
        layout.write("start.py", start_file().encode())
        for number in range(settings.chunks):
            if stopping.is_set():
                raise CancelledError("the run was cancelled")
            first = number * size
            indices = range(first, min(first + size, len(items)))
            writer = Writer(together=False)
            packed = [(i, writer.add(items[i], f"item {i}")) for i in indices]
            layout.write_chunk(number, Header(0, indices), packed)
        layout.write_json("settings", settings.to_json())
        run = Run(layout.root, **timing)
        run._stopping = run._submitter.stopping = stopping
        run._submitter.submit([(number, 1) for number in range(settings.chunks)])
    except BaseException:
        with contextlib.suppress(Exception):
            Run(layout.root).cancel()
        layout.remove()
        raise
    return run


def find_runs(directory: Path, **timing: float) -> list[Run]:
    """Return the run in a directory, or all those in the directories in it, the oldest first."""
    if Layout(directory).exists():
        return [Run(directory, **timing)]
    below = sorted(directory.iterdir()) if directory.is_dir() else []
    return [Run(one, **timing) for one in below if Layout(one).exists()]
