"""One way to run many items on any backend: chunks, a window, retries, outcomes in turn."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from ostap_parallel.engine.backend import Backend, Submit, result_of
from ostap_parallel.engine.retries import LOST_RETRIES, Limits
from ostap_parallel.errors import SerializeError, TaskTimeout, WorkerLost
from ostap_parallel.runs.checks import check_number, check_timeout, length_of
from ostap_parallel.runs.chunking import (
    CHUNK_SECONDS,
    LONGEST_CHUNK,
    SMALL,
    Chunk,
    ChunkSize,
    Item,
    Packing,
)
from ostap_parallel.runs.merged import combined, merge_error
from ostap_parallel.runs.ordering import HELD_BYTES, Ordering
from ostap_parallel.runs.outcome import Batch, Checkpoint, Journal, Outcome, keep
from ostap_parallel.runs.report import Running
from ostap_parallel.runs.trust import DEFAULT_RULES, HostRules, Trust, is_of_host, why
from ostap_parallel.runs.watching import Watch
from ostap_parallel.worker.chunk import (
    INTERRUPTED,
    ChunkOutcome,
    Lost,
    draw_id,
    pack_chunk,
    traced,
    unpack_answer,
)
from ostap_parallel.worker.execute import Call

# From an input: nothing is there now, and `Run.wake` will be called when there is.
PAUSE = object()

# Seconds that interrupted workers get to come back before a run that is stopped returns.
STOP_PATIENCE = 3.5

# Seconds that hosts get to tell what they do before they are stopped.
STOP_ANSWER = 0.2

# Told of each run that begins in this context, for who waits elsewhere and may want to cancel it.
on_run: ContextVar[Callable[[Run], object]] = ContextVar("on_run", default=lambda run: None)


@dataclass
class Run:
    """The items of one run on one backend; iterate over `arrivals`.

    Parameters
    ----------
    chunk_size
        Items per chunk; ``None`` adapts it to the time that items take.
    ordered
        Yield in the order of the items, holding back what comes early.
    retries
        How often an item that raised, or took too long, is run again.
    lost_retries
        How often an item by which its worker died is run again.
    host_rules
        When a host is no longer used, see `trust`.
    collects
        Who takes the outcomes goes on when one is a failure.
    held_bytes
        With `ordered`: bytes of results that may be held back, about.
    window
        Chunks that are under way at most; ``None``: about two per worker.
    heard
        Called with the future of each chunk as that is done, from any thread.

    Raises
    ------
    ValueError
        A number is out of range.
    TypeError
        The backend cannot limit the time of an item.

    Attributes
    ----------
    total
        Number of items, if the input tells it.
    trust
        What is known of the hosts.
    """

    backend: Backend
    call: Call
    items: Iterable[Any]
    chunk_size: int | None = None
    ordered: bool = False
    retries: int = 0
    lost_retries: int = LOST_RETRIES
    retried: int = 0  # how often an item was run again
    copies: int = 0  # how many chunks were begun a second time elsewhere
    stragglers: list[Running] = field(default_factory=list)  # what took far longer than others
    checkpoint: Checkpoint | None = None
    host_rules: HostRules = DEFAULT_RULES
    collects: bool = False
    held_bytes: float = HELD_BYTES
    window: int | None = None
    heard: Callable[[Future[Any], Chunk], object] = lambda done, chunk: None
    journal: Journal | None = None  # once it is open

    _again: deque[list[Item]] = field(default_factory=deque)  # chunks to be run again
    _unsent: deque[Outcome] = field(default_factory=deque)  # known without being sent
    _running: dict[Future[Any], Chunk] = field(default_factory=dict)
    _pinned: dict[Future[Any], frozenset[str]] = field(default_factory=dict)  # that run, to hosts
    _news: queue.SimpleQueue[Future[Any] | None] = field(default_factory=queue.SimpleQueue)
    _cache: dict[type, bytes] = field(default_factory=dict)
    _next: int = 0  # index of the next item to be read
    _exhausted: bool = False
    _is_cancelled: bool = False
    _is_paused: bool = False
    _is_over: bool = False
    _stopped: list[Running] = field(default_factory=list)  # what ran then
    _pid: int = field(default_factory=os.getpid)
    _is_heavy: bool = False  # items share so much that there should be few chunks

    def __post_init__(self) -> None:
        self.total = length_of(self.items)
        self._size = ChunkSize.of(self.call.function)
        self._limit = LONGEST_CHUNK if self.chunk_size is None else math.inf
        check_number("retries", self.retries, 0)
        check_number("lost_retries", self.lost_retries, 0)
        check_number("chunk_size", self.chunk_size, 1, or_none=True)
        check_number("window", self.window, 1, or_none=True)
        check_timeout(self.call.timeout, self.backend)
        self._limits = Limits(failed=self.retries, lost=self.lost_retries)
        self._watch = Watch(self.backend, self._running, self.stragglers)
        self._ordering = Ordering(self.held_bytes)
        self.trust = Trust(self.backend, self.host_rules, self.collects)

    @property
    def submitted(self) -> int:
        """Number of items read from the input."""
        return self._next

    def running(self) -> list[Running]:
        """Return what runs now, the longest first; what ran when the run was stopped."""
        return self._stopped if self._is_over else self._watch.look()

    def cancel(self) -> None:
        """Have `arrivals` end soon, from any thread."""
        self._is_cancelled = True
        self.wake()

    def wake(self) -> None:
        """Have `arrivals` look again, from any thread."""
        self._news.put(None)

    @cached_property
    def submit(self) -> Submit:
        """What takes chunks; made of the function as that is when this is first asked for."""
        return self.backend.open(self.call)

    def arrivals(self) -> Generator[Batch | Outcome, None, None]:
        """Yield what becomes of the items, as they come or in order; input is read as needed.

        Leaving the iteration early stops the run: what is queued is dropped and what runs is
        interrupted.

        Raises
        ------
        SerializeError
            The function, or the shared object, cannot be sent.
        ServersUnavailable
            No worker is left and none is about to come.
        concurrent.futures.CancelledError
            `cancel` was called.
        """
        on_run.get()(self)
        self._input = iter(self.items)
        # other programs may use the same servers
        self._id = draw_id(self.call.goes_on)
        # items that are sent as they are; a journal wants to see them all
        self._as_it_is = SMALL if self.checkpoint is None else frozenset[type]()
        _ = self.submit
        with contextlib.ExitStack() as leaving:
            # the traceback of an error that is kept holds this run, but not what has travelled
            leaving.callback(vars(self).pop, "submit", None)
            leaving.callback(self._stop)
            leaving.callback(self.backend.listen(self.wake))
            arriving = self._as_they_come()
            if self.checkpoint is not None:
                self.journal = leaving.enter_context(self.checkpoint.open(self.call, self.total))
                self.journal.look = self.running
                arriving = keep(self.journal, arriving)
            try:
                yield from self._ordering.in_order(arriving) if self.ordered else arriving
            except RuntimeError:  # the executor was shut down, too
                if not self._is_cancelled:
                    raise
                raise CancelledError("the run was cancelled") from None

    def _as_they_come(self) -> Iterator[Batch | Outcome]:
        while True:
            if self._is_cancelled:
                raise CancelledError("the run was cancelled")
            self._feed()
            if self._unsent:
                while self._unsent:
                    yield self._unsent.popleft()
                continue  # there may still be room for items that are not known
            if not self._running:
                if self._exhausted and not self._again:
                    return
                if self.trust.window() and not self._is_paused:
                    continue
            if self._pinned and self.trust.time_left() == 0:
                self._free_stranded()
            if self._watch.is_due():
                self._watch.warn()
            done = None
            with contextlib.suppress(queue.Empty):
                done = self._news.get(timeout=self._patience())
            if done is None:
                self._free_stranded()
            else:
                self._pinned.pop(done, None)
                if (chunk := self._running.pop(done, None)) is not None:  # else it was dropped
                    yield from self._arrivals_of(done, chunk)

    def _patience(self) -> float:
        """Return after how many seconds without news there is something to look at."""
        # five: a signal that comes just before a wait without end would not be heard
        times = [5.0, self._watch.patience(), self.trust.time_alone()]
        if self._pinned:
            times.append(self.trust.time_left())
        return min(seconds for seconds in times if seconds)

    def _feed(self) -> None:
        """Keep as many chunks under way as the backend wants, and never more."""
        wanted = self.trust.window()
        window = min(wanted, self.window or wanted)
        workers = max(1, self.trust.workers())
        while len(self._running) < window:
            found = self._take_again(workers) if self._again else self._read_chunk(workers)
            if found is None:
                return
            self._send(*found, self._places_for(found[0].history or ()))

    def _send(self, chunk: Chunk, message: bytes, places: frozenset[str] | None) -> None:
        is_short = chunk.history is None and self._size.is_short(len(chunk.items))
        future = self.submit(message, is_short=is_short, hosts=places)
        self._running[future] = chunk
        if places is not None:
            self._pinned[future] = places
        # who holds the future is not to hold the run, which holds what travels with it
        future.add_done_callback(partial(_tell, weakref.ref(self), chunk))

    def _places_for(self, again: Sequence[Item]) -> frozenset[str] | None:
        tried = frozenset[str]().union(*(item.tried for item in again))
        return self.trust.places(tried, may_wait=any(item.doubted for item in again))

    def _free_stranded(self) -> None:
        """Take back what waits for hosts that have gone; it runs elsewhere then."""
        if self._pinned and (stranded := self.trust.stranded(self._pinned)):
            self.backend.give_up(stranded)
            for future in stranded:
                del self._pinned[future]

    def _read_chunk(self, workers: int) -> tuple[Chunk, bytes] | None:
        """Read and pack some items; ``None`` if there are none to be sent now."""
        size = self._wanted_size(workers)
        if self.ordered:  # what is held back for one slow item must not grow without limit
            size = min(size, 8 * size * workers + 64 - (self._next - self._ordering.first))
            size = max(0, int(min(size, self._ordering.room(self._under_way()))))
        if not isinstance(self.items, (range, list, tuple)):
            return self._pack(itertools.islice(self._input, size), size)
        values = self.items[self._next : self._next + size]
        if not set(map(type, values)) <= self._as_it_is:
            return self._pack(values, size)
        # no need to look at them one by one
        first, self._next = self._next, self._next + len(values)
        self._exhausted = len(values) < size
        if not values:
            return None
        chunk = Chunk(range(first, self._next), list(values), values)
        return chunk, pack_chunk(chunk.indices, values, None, self._id, self._limit)

    def _pack(self, values: Iterable[Any], size: int) -> tuple[Chunk, bytes] | None:
        """Pack some of so many items, as their bytes and the time to get them allow."""
        enough = time.monotonic() + CHUNK_SECONDS  # input may come slowly: workers must not wait
        # what comes later may be what came before, changed
        is_there = isinstance(values, (list, tuple))
        packing = Packing(self._cache, together=is_there)
        last = self._next + size
        self._is_paused = False
        for value in values:
            self._is_paused = value is PAUSE
            if self._is_paused or not packing.has_room(value):
                break
            index, self._next = self._next, self._next + 1
            self._add(packing, index, value)
            if time.monotonic() > enough or (packing.is_full and not is_there):
                break
        else:
            self._exhausted = self._next < last
        if not packing.items:
            return None
        if isinstance(self.items, list | tuple) and packing.is_full:
            self._is_heavy = any(map(packing.has_room, self.items[self._next : self._next + 1]))
        chunk = packing.chunk()
        return chunk, packing.message(chunk.indices, self._id, self._limit)

    def _add(self, packing: Packing, index: int, value: Any) -> None:
        """Pack an item; if there is an outcome without sending it, queue that."""
        if self.journal is not None and (known := self.journal.find(index, value)):
            self._unsent.append(known)
            return
        try:
            packing.add(index, value)
        except SerializeError as exc:
            self._unsent.append(Outcome(index, value, error=exc, traceback=str(exc)))

    def _wanted_size(self, workers: int, given_back: int = 0) -> int:
        if self.chunk_size is not None:
            return self.chunk_size
        left = (self.total or 0) - self._next + given_back
        if len(self._running) < workers:  # what the others have is no less than this one's share
            left += self._under_way()
        known = workers, self.total, left, self.backend.round_trip, self._is_heavy
        return self._size.choose(*known)

    def _under_way(self) -> int:
        return sum(len(chunk.items) for chunk in self._running.values())

    def _take_again(self, workers: int) -> tuple[Chunk, bytes] | None:
        """Take items that are run again, or of those that were given back, which may be many."""
        items = deque(self._again.popleft())
        packing, taken = Packing(self._cache, together=True), list[Item]()
        size = self._wanted_size(workers, len(items))
        while items and len(taken) < size and packing.has_room(items[0].item):
            one = items.popleft()
            try:
                packing.add(one.index, one.item, one.sent)
            except SerializeError as exc:  # it has changed since
                error = (exc, str(exc), "", 0, 0.0, one.attempts - 1)
                self._unsent.append(Outcome(one.index, one.item, None, *error))
            else:
                taken.append(one)
        if items:
            self._again.appendleft(list(items))
        if not taken:
            return None
        chunk = Chunk(packing.indices, packing.items, packing.sent, taken)
        return chunk, packing.message(chunk.indices, self._id, self._limit)

    def _arrivals_of(self, done: Future[Any], chunk: Chunk) -> Iterator[Batch | Outcome]:
        result = result_of(done, self.backend.name)
        if isinstance(result, ChunkOutcome) and result.answers:
            self._watch.times.sample(result.seconds)
            count = len(result.answers)
            if len(result.failed) < count or self.trust.is_fit(result.host):
                self._size.adapt(sum(result.seconds), count, self.backend.round_trip)
            values = result.values(len(chunk.items)) if chunk.history is None else None
            if values is not None:
                self.trust.count_done(result.host, len(values))
                if self.ordered:
                    self._ordering.weigh(chunk.indices[0], result.answers, count)
                columns = chunk.indices, chunk.items, values, result.seconds
                yield Batch(*columns, result.host, result.pid)
                return
        items = chunk.split()
        if isinstance(result, Lost):
            yield from self._lost(result, items)
            return
        if result.merge_failure is not None:
            raise merge_error(result, items)
        if good := len(result.answers) - len(result.failed):
            ran = enumerate(items[: len(result.answers)])
            again = (item for n, item in ran if item.tried and n not in result.failed)
            self.trust.count_done(result.host, good, again)
        for start, stop in result.merged:
            if self.ordered:
                self._ordering.weigh(items[start].index, [result.answers[start]], stop - start)
            yield combined(result, items, start, stop)
        yield from self._outcomes_of(result, items)

    def _outcomes_of(self, result: ChunkOutcome, items: list[Item]) -> Iterator[Outcome]:
        merged = {n for bounds in result.merged for n in range(*bounds)}
        doubted: list[Item] = []
        for position, item in enumerate(items[: len(result.answers)]):
            if position not in merged:
                yield from self._outcome_of(result, item, position, doubted)
        if doubted:
            self._run_again(doubted)
        left = items[len(result.answers) :]
        if result.gave_back:
            self._again.append(left)
            return
        yield from self._lost(Lost(result.host, result.pid, INTERRUPTED), left)

    def _outcome_of(
        self, result: ChunkOutcome, item: Item, position: int, doubted: list[Item]
    ) -> Iterator[Outcome]:
        """Yield what became of an item, unless it is run again, now or with others `doubted`."""
        outcome = self._outcome(item, result, position)
        if outcome.error is None or position not in result.failed:
            yield outcome
            return
        of_host = is_of_host(outcome, result.was_prepared)
        is_doubtful = self.trust.may_be_the_hosts(item, outcome, of_host)
        self.trust.count_failed(item, result.host, why(outcome), of_host)
        if item.failed < self.retries:
            item.failed += 1
            self._run_again([item])
        elif is_doubtful:
            item.doubted += 1
            doubted.append(item)
        else:
            self.trust.count_given_up(item)
            yield outcome

    def _outcome(self, item: Item, result: ChunkOutcome, position: int) -> Outcome:
        value, error, text = unpack_answer(result, position, f"item {item.index}")
        if error is None and position in result.failed:
            error = self._timed_out(item, result.host)
        if error is not None:
            traced(error, result, text, f"item {item.index}")
        if self.ordered:
            self._ordering.weigh(item.index, [result.answers[position]])
        origin = (text, result.host, result.pid, result.seconds[position], item.attempts)
        return Outcome(item.index, item.item, value, error, *origin)

    def _timed_out(self, item: Item, host: str) -> TaskTimeout:
        assert self.call.timeout is not None
        return TaskTimeout(item.index, host, self.call.timeout)

    def _lost(self, lost: Lost, chunk: list[Item]) -> Iterator[Outcome]:
        """Run the items of a lost chunk again, or give them up."""
        indices = [item.index for item in chunk]
        if lost.index in indices:
            # The others are not to blame: those before it are run again together, and those
            # behind it, which had not begun, as if nothing had happened.
            position = indices.index(lost.index)
            before, culprit, behind = chunk[:position], chunk[position], chunk[position + 1 :]
            if behind:
                self._again.append(behind)
            yield from self._lost_by(culprit, lost)
            chunk = before
        elif lost.by_worker:
            for item in chunk:
                yield from self._lost_by(item, lost)
            return
        for item in chunk:
            item.blameless += 1
        if chunk and chunk[0].blameless == 1:
            self._run_again(chunk)
            return
        for item in chunk:  # alone: one that takes every host along must not take others along
            if item.may_go_on(self._limits):
                self._run_again([item])
            else:
                yield self._given_up(item, lost)

    def _lost_by(self, item: Item, lost: Lost) -> Iterator[Outcome]:
        """Run an item again that has ended its worker, alone, or give it up."""
        item.count(lost)
        self.trust.count_failed(item, lost.host, lost.reason)
        if item.may_go_on(self._limits):
            self._run_again([item])
        else:
            yield self._given_up(item, lost)

    def _given_up(self, item: Item, lost: Lost) -> Outcome:
        late = self._timed_out(item, lost.host) if lost.timed_out else None
        error: Exception = late or WorkerLost(item.index, lost.host, lost.reason)
        self.trust.count_given_up(item)
        rest = (lost.reason, lost.host, lost.pid, 0.0, item.attempts - 1)
        return Outcome(item.index, item.item, None, error, *rest)

    def _run_again(self, chunk: list[Item]) -> None:
        self._again.append(chunk)
        self.retried += len(chunk)

    def _stop(self) -> None:
        """Give up what is under way and wait, not for long, until workers are free again."""
        if not self._running or os.getpid() != self._pid:  # a fork has nothing to stop
            self._is_over = True
            return
        running = list(self._running)
        # The garbage collector may end a run anywhere, also where this thread has a lock that the
        # backend needs.
        stopping = threading.Thread(target=self._give_up, args=[running], daemon=True)
        end = time.monotonic() + STOP_PATIENCE
        try:
            stopping.start()
            stopping.join(STOP_PATIENCE)
        except RuntimeError:  # at the exit of the interpreter there are no threads to be had
            self._give_up(running)
        # one that is cancelled while it is queued may be notified only when its turn comes
        running = [future for future in running if not future.cancelled()]
        wait(running, timeout=max(0, end - time.monotonic()))
        self._running.clear()

    def _give_up(self, running: list[Future[Any]]) -> None:
        with contextlib.suppress(Exception):  # what is asked for here must not hinder the end
            self._stopped = self._watch.look(STOP_ANSWER)
        self._is_over = True
        self.backend.give_up(running)


def _tell(waiting: weakref.ref[Run], chunk: Chunk, done: Future[Any]) -> None:
    if run := waiting():
        try:
            run.heard(done, chunk)
        finally:
            run._news.put(done)
