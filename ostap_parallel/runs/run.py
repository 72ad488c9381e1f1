"""One way to run many items on anything: chunks, a bounded window, retries, outcomes in turn.

Works on every executor of PEP 3148; on ours a function travels once per worker.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, wait
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from ostap_parallel.engine.foreign import count_workers
from ostap_parallel.engine.nesting import HOST_RETRIES, LOST_RETRIES
from ostap_parallel.engine.parallel import ParallelExecutor
from ostap_parallel.errors import (
    RemoteTraceback,
    SerializeError,
    TaskTimeout,
    WorkerLost,
    add_note,
)
from ostap_parallel.runs.chunking import (
    CHUNK_SECONDS,
    LONGEST_CHUNK,
    Chunk,
    ChunkSize,
    Item,
    pack_chunk,
)
from ostap_parallel.runs.outcome import Batch, Checkpoint, Combined, Journal, Outcome, keep
from ostap_parallel.worker import execute, serialize
from ostap_parallel.worker.execute import Call, ChunkOutcome, Lost
from ostap_parallel.worker.shared import SMALL, Blob, Inline, Packed, Stored

MAX_CHUNK_BYTES = 1 << 22

_SMALL = frozenset(execute.PLAIN) - {str}
_NOT_SENT = object()

# From an input: nothing is there now, and `Run.wake` will be called when there is.
PAUSE = object()

# Seconds that interrupted workers get to come back before a run that is stopped returns.
STOP_PATIENCE = 3.5

# Told of each run that begins in this context, for who waits elsewhere and may want to cancel it.
on_run: ContextVar[Callable[[Run], object]] = ContextVar("on_run", default=lambda run: None)


@dataclass
class Run:
    """The items of one run on one executor; iterate over `arrivals`.

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
    window
        Chunks that are under way at most; ``None``: about two per worker.

    Raises
    ------
    ValueError
        A number is out of range.
    TypeError
        The executor cannot limit the time of an item.

    Attributes
    ----------
    total
        Number of items, if the input tells it.
    """

    executor: Executor
    call: Call
    items: Iterable[Any]
    chunk_size: int | None = None
    ordered: bool = False
    retries: int = 0
    lost_retries: int = LOST_RETRIES
    retried: int = 0  # how often an item was run again
    checkpoint: Checkpoint | None = None
    window: int | None = None

    _again: deque[list[Item]] = field(default_factory=deque)  # chunks to be run again
    _unsent: deque[Outcome] = field(default_factory=deque)  # known without being sent
    _running: dict[Future[Any], Chunk | list[Item]] = field(default_factory=dict)
    _news: queue.SimpleQueue[Future[Any] | None] = field(default_factory=queue.SimpleQueue)
    _cache: dict[type, bytes] = field(default_factory=dict)
    _journal: Journal | None = None
    _first: int = 0  # the oldest item that is not yet yielded in order
    _next: int = 0  # index of the next item to be read
    _exhausted: bool = False
    _is_cancelled: bool = False
    _is_paused: bool = False

    def __post_init__(self) -> None:
        self.total = _length(self.items)
        self._size = ChunkSize.of(self.call.function)
        self._limit = LONGEST_CHUNK if self.chunk_size is None else math.inf
        _check_number("retries", self.retries, 0)
        _check_number("lost_retries", self.lost_retries, 0)
        if self.chunk_size is not None:
            _check_number("chunk_size", self.chunk_size, 1)
        if self.window is not None:
            _check_number("window", self.window, 1)
        _check_timeout(self.call.timeout, self.executor)

    @property
    def submitted(self) -> int:
        """Number of items read from the input."""
        return self._next

    def cancel(self) -> None:
        """Have `arrivals` end soon, from any thread."""
        self._is_cancelled = True
        self.wake()

    def wake(self) -> None:
        """Have `arrivals` look again, from any thread."""
        self._news.put(None)

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
        self._id = os.urandom(16)  # other programs may use the same servers
        # items that are sent as they are; a journal wants to see them all
        self._as_it_is = _SMALL if self.checkpoint is None else frozenset[type]()
        self._submit = self._submitter()
        with contextlib.ExitStack() as leaving:
            leaving.callback(self._stop)
            if isinstance(self.executor, ParallelExecutor):
                leaving.callback(self.executor.listen(lambda: self._news.put(None)))
            arriving = self._as_they_come()
            if self.checkpoint is not None:
                opened = self.checkpoint.open(self.call, self.total)
                self._journal = leaving.enter_context(opened)
                arriving = keep(self._journal, arriving)
            try:
                yield from self._in_order(arriving) if self.ordered else arriving
            except RuntimeError:  # the executor was shut down, too
                if not self._is_cancelled:
                    raise
                raise CancelledError("the run was cancelled") from None

    def _submitter(self) -> Callable[[bytes, bool], Future[ChunkOutcome | Lost]]:
        """Pack the function and what is shared; return what submits a chunk, short or not."""
        where, blob = self._share()
        name = getattr(self.call.function, "__qualname__", repr(self.call.function))
        initializer = getattr(self.executor, "initializer", None)
        call = replace(self.call, shared=where, initializer=initializer)
        packed = serialize.pack(call, f"the function {name}", cache=self._cache)
        executor, numbers = self.executor, itertools.count()
        if isinstance(executor, ParallelExecutor):
            modules = executor.modules.look()
            needs = blob, modules
            return lambda chunk, short: executor.submit_chunk(packed, chunk, *needs, short)
        run = execute.run_foreign
        return lambda chunk, short: executor.submit(run, packed, chunk, next(numbers))

    def _share(self) -> tuple[Inline | Stored | None, Blob | None]:
        """Pack the shared object; return where workers find it, and the blob, if it is in one."""
        if self.call.shared is None:
            return None, None
        packed = Packed(self.call.shared)
        if packed.size <= SMALL or not isinstance(self.executor, ParallelExecutor):
            return Inline(b"".join(packed)), None
        try:
            blob = self.executor.server.store.add(packed)
        except OSError as exc:
            raise SerializeError("the shared object", f"{exc.strerror}; set TMPDIR") from exc
        return Stored(blob.digest), blob

    def _workers(self) -> int:
        if isinstance(self.executor, ParallelExecutor):
            self.executor.check()
            return sum(self.executor.workers.values())
        return count_workers(self.executor)

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
                if self._workers() and not self._is_paused:
                    continue
            done = self._news.get()
            if done is not None:
                yield from self._arrivals_of(done, self._running.pop(done))

    def _in_order(self, arriving: Iterator[Batch | Outcome]) -> Iterator[Batch | Outcome]:
        held: dict[int, Batch | Outcome] = {}  # by the index of the first item
        for arrival in arriving:
            if isinstance(arrival, Batch) and arrival.has_gaps:
                held.update((outcome.index, outcome) for outcome in arrival)
            else:
                held[arrival.index] = arrival
            while self._first in held:
                arrival = held.pop(self._first)
                self._first += len(arrival) if isinstance(arrival, Batch) else 1
                yield arrival
                del arrival  # not to be kept while the next one is awaited

    def _feed(self) -> None:
        """Keep about two chunks per worker under way, and never more."""
        workers = self._workers()
        while len(self._running) < min(2 * workers, self.window or 2 * workers):
            chunk = self._take_again(workers) if self._again else self._read_chunk(workers)
            if not chunk:
                return
            try:
                is_short = isinstance(chunk, Chunk) and self._size.is_short(len(chunk.items))
                future = self._submit(pack_chunk(chunk, self._id, self._limit), is_short)
            except BrokenExecutor as exc:  # a foreign one that a worker's death has ended
                future = Future()
                future.set_exception(exc)
            self._running[future] = chunk
            future.add_done_callback(self._news.put)

    def _read_chunk(self, workers: int) -> Chunk | None:
        """Read and pack some items; ``None`` if there are none to be sent now."""
        size, room = self._wanted_size(workers), MAX_CHUNK_BYTES
        if self.ordered:  # what is held back for one slow item must not grow without limit
            size = min(size, 8 * size * workers + 64 - (self._next - self._first))
        size = max(0, size)
        values: Iterable[Any] = itertools.islice(self._input, size)
        if isinstance(self.items, (range, list, tuple)):
            values = self.items[self._next : self._next + size]
            if set(map(type, values)) <= self._as_it_is:  # no need to look at them one by one
                first, self._next = self._next, self._next + len(values)
                self._exhausted = len(values) < size
                return Chunk(range(first, self._next), list(values), values) if values else None
        enough = time.monotonic() + CHUNK_SECONDS  # input may come slowly: workers must not wait
        indices: list[int] = []
        items: list[Any] = []
        sent: list[Any] = []
        last = self._next + size
        self._is_paused = False
        for value in values:
            if value is PAUSE:
                self._is_paused = True
                break
            index, self._next = self._next, self._next + 1
            packed = value if type(value) in self._as_it_is else self._prepare(index, value)
            if packed is not _NOT_SENT:
                indices.append(index)
                items.append(value)
                sent.append(packed)
            if type(packed) in (bytes, str):
                room -= len(packed)
            if room <= 0 or time.monotonic() > enough:
                break
        else:
            self._exhausted = self._next < last
        if not items:
            return None
        without_gaps = range(indices[0], indices[-1] + 1)  # takes no memory, and no time to send
        return Chunk(without_gaps if len(without_gaps) == len(items) else indices, items, sent)

    def _prepare(self, index: int, value: Any) -> Any:
        """Return a packed item; if there is an outcome without sending it, queue that."""
        if self._journal is not None and (known := self._journal.find(index, value)):
            self._unsent.append(known)
            return _NOT_SENT
        try:
            what = f"item {index} (a {type(value).__name__})"
            return execute.pack_value(value, what, cache=self._cache)
        except SerializeError as exc:
            self._unsent.append(Outcome(index, value, error=exc, traceback=str(exc)))
            return _NOT_SENT

    def _wanted_size(self, workers: int, given_back: int = 0) -> int:
        if self.chunk_size is not None:
            return self.chunk_size
        left = (self.total or 0) - self._next + given_back
        return self._size.choose(workers, self.total, left, self._round_trip())

    def _take_again(self, workers: int) -> list[Item]:
        """Take items that are run again, or of those that were given back, which may be many."""
        chunk = self._again.popleft()
        size = self._wanted_size(workers, len(chunk))
        if chunk[size:]:
            self._again.appendleft(chunk[size:])
        return chunk[:size]

    def _round_trip(self) -> float:
        return getattr(self.executor, "round_trip", 0.0)

    def _arrivals_of(
        self, done: Future[Any], chunk: Chunk | list[Item]
    ) -> Iterator[Batch | Outcome]:
        try:
            result = done.result()
        except (Exception, CancelledError) as exc:  # a foreign executor's way to lose a chunk
            result = Lost(type(self.executor).__name__, 0, f"{type(exc).__name__}: {exc}", True)
        if isinstance(result, ChunkOutcome) and result.answers:
            self._size.adapt(sum(result.seconds), len(result.seconds), self._round_trip())
            values = result.values(len(chunk.items)) if isinstance(chunk, Chunk) else None
            if isinstance(chunk, Chunk) and values is not None:
                columns = chunk.indices, chunk.items, values, result.seconds
                yield Batch(*columns, result.host, result.pid)
                return
        items = chunk.split() if isinstance(chunk, Chunk) else chunk
        if isinstance(result, Lost):
            yield from self._lost(result, items)
            return
        if result.merge_failure is not None:
            raise _merge_error(result, items)
        for start, stop in result.merged:
            yield _combined(result, items, start, stop)
        yield from self._outcomes_of(result, items)

    def _outcomes_of(self, result: ChunkOutcome, items: list[Item]) -> Iterator[Outcome]:
        answers = zip(result.answers, result.seconds, strict=True)
        done = {n for bounds in result.merged for n in range(*bounds)}
        for position, (item, (packed, seconds)) in enumerate(zip(items, answers, strict=False)):
            if position in done:
                continue
            ok = position not in result.failed
            outcome = self._outcome(item, ok, packed, seconds, result)
            if outcome is not None:
                yield outcome
        rest = items[len(result.answers) :]
        if result.gave_back:
            self._again.append(rest)
            return
        yield from self._lost(Lost(result.host, result.pid, "it was interrupted"), rest)

    def _outcome(
        self, item: Item, ok: bool, packed: Any, seconds: float, result: ChunkOutcome
    ) -> Outcome | None:
        """Return what became of an item, or ``None`` if it is run again."""
        if not ok and item.failed < self.retries:
            item.failed += 1
            self._run_again([item])
            return None
        value, error, text = _unpack(item, ok, packed)
        if error is None and not ok:
            error = self._timed_out(item, result.host)
        if error is not None and error.__cause__ is None:
            where = f"item {item.index} on {result.host}, process {result.pid}"
            error.__cause__ = RemoteTraceback(f"{where}:\n{text}")
        rest = (text, result.host, result.pid, seconds, item.attempts)
        return Outcome(item.index, item.item, value, error, *rest)

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
            if item.blameless <= HOST_RETRIES:
                self._run_again([item])
            else:
                yield self._given_up(item, lost)

    def _lost_by(self, item: Item, lost: Lost) -> Iterator[Outcome]:
        """Run an item again that has ended its worker, alone, or give it up."""
        if lost.timed_out:
            item.failed += 1
        else:
            item.lost += 1
        if item.lost <= self.lost_retries and item.failed <= self.retries:
            self._run_again([item])
        else:
            yield self._given_up(item, lost)

    def _given_up(self, item: Item, lost: Lost) -> Outcome:
        error: Exception = WorkerLost(item.index, lost.host, lost.reason)
        if lost.timed_out:
            error = self._timed_out(item, lost.host)
        rest = (lost.reason, lost.host, lost.pid, 0.0, item.attempts - 1)
        return Outcome(item.index, item.item, None, error, *rest)

    def _run_again(self, chunk: list[Item]) -> None:
        self._again.append(chunk)
        self.retried += len(chunk)

    def _stop(self) -> None:
        """Give up what is under way and wait, not for long, until workers are free again."""
        if not self._running:
            return
        running = list(self._running)
        if isinstance(self.executor, ParallelExecutor):
            # The garbage collector may end a run anywhere, also where this thread has one of the
            # executor's locks.
            interrupting = threading.Thread(target=self.executor.interrupt, args=[running])
            interrupting.daemon = True
            interrupting.start()
        else:
            # one that is cancelled while it is queued may be notified only when its turn comes
            running = [future for future in running if not future.cancel()]
        wait(running, timeout=STOP_PATIENCE)
        self._running.clear()


def _combined(result: ChunkOutcome, items: list[Item], start: int, stop: int) -> Combined:
    """Return items that were merged on the worker; raises what their value does in reading."""
    merged = items[start:stop]
    indices = [item.index for item in merged]
    try:
        value = execute.unpack_value(result.answers[start])
    except Exception as exc:  # user code
        add_note(exc, f"while what items {indices[0]} to {indices[-1]} were merged to was read")
        raise
    rest = (result.seconds[start:stop], result.host, result.pid)
    return Combined(indices, [item.item for item in merged], [value], *rest)


def _merge_error(result: ChunkOutcome, items: list[Item]) -> BaseException:
    assert result.merge_failure is not None
    start, stop, packed = result.merge_failure
    error, text = execute.unpack_error(packed)
    assert error is not None  # it has no time limit
    what = f"while the results of items {items[start].index} to {items[stop - 1].index}"
    what += f" were merged on {result.host}, process {result.pid}"
    if error.__cause__ is None:
        error.__cause__ = RemoteTraceback(f"{what}:\n{text}")
    add_note(error, what)
    return error


def _unpack(item: Item, ok: bool, packed: Any) -> tuple[Any, BaseException | None, str]:
    """Return value, error and traceback of an item; what cannot be read is an error."""
    try:
        if ok:
            return execute.unpack_value(packed), None, ""
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # user code
        reason = f"it cannot be read here: {serialize.name_and_text(exc)}"
        error = SerializeError(f"the result of item {item.index}", reason)
        return None, error, str(error)
    return None, *execute.unpack_error(packed)


def _length(items: Iterable[Any]) -> int | None:
    try:
        return len(items) if isinstance(items, Sized) else None
    except TypeError:  # of a progress bar around a generator, for example
        return None


def _check_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number from {least} on, not {value!r}")


def _check_timeout(timeout: Any, executor: Executor) -> None:
    if timeout is None:
        return
    is_number = isinstance(timeout, Real) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout <= threading.TIMEOUT_MAX / 2:
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
    if not isinstance(executor, ParallelExecutor):
        raise TypeError(
            f"timeout is for our own workers: {type(executor).__name__} cannot end an item"
        )
