"""What computes, as runs and faces see it: a protocol of a few verbs."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, InvalidStateError
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ostap_parallel.engine import baggage, unseeded
from ostap_parallel.engine.retries import Attempts, Limits
from ostap_parallel.errors import WorkerLost
from ostap_parallel.machine.usage import Doing
from ostap_parallel.objects import aside, serialize
from ostap_parallel.supply.source import HostStatus
from ostap_parallel.worker.chunk import (
    INTERRUPTED,
    ChunkOutcome,
    Lost,
    pack_call,
    unpack_call,
    unpack_result,
)
from ostap_parallel.worker.execute import Call, apply
from ostap_parallel.worker.shared import Blob, Inline, Laden, Packed, Store, Stored

Result = ChunkOutcome | Lost
AnyFuture = concurrent.futures.Future[Any]


@dataclass(frozen=True)
class Abilities:
    """What a backend can do beyond running chunks.

    Attributes
    ----------
    interrupt
        End what runs already.
    time_limit
        End an item that takes too long.
    nesting
        Have tasks submit tasks, and share constants.
    """

    interrupt: bool = False
    time_limit: bool = False
    nesting: bool = False


@dataclass
class Place:
    """Where a chunk runs.

    Attributes
    ----------
    seconds
        Since it began.
    pid
        The worker process; 0 if that is not known.
    index
        The item that runs; ``None`` if that is not known.
    memory
        Bytes that the process has in memory; 0 if that is not known.
    load
        Of the host, as ``uptime`` tells; ``None`` if that is not known.
    """

    host: str
    seconds: float
    pid: int = 0
    index: int | None = None
    memory: int = 0
    load: float | None = None

    def complete(self, told: threading.Semaphore, doing: Doing) -> None:
        """Take what its worker does, and tell of that."""
        self.index = doing.item if doing.item >= 0 else None
        _, self.pid, self.memory, self.load = doing
        told.release()


class Submit(Protocol):
    """Has a chunk run, with the call that it was made for; see `Backend.open`.

    The future's result is what became of the chunk. One that is cancelled before its turn comes
    is not begun. A chunk that `is_short` may wait at a far host behind another one. `hosts` are
    those that it must run on, by name; by default any.

    Raises
    ------
    ServersUnavailable
        Nothing can run and nothing is about to come.
    RuntimeError
        The backend was closed.
    """

    def __call__(
        self, chunk: bytes, *, is_short: bool = False, hosts: frozenset[str] | None = None
    ) -> concurrent.futures.Future[Result]: ...


class Backend(ABC):
    """Runs chunks of items, see `worker.chunk`, and calls.

    A new one needs `open` and `workers`; `execute.run_foreign` does what `open` was given, on
    any Python that has this package.

    Attributes
    ----------
    abilities
        What it can do beyond that.
    hosts
        The hosts that it knows, and their states.
    round_trip
        Seconds that a message to the farthest worker and its answer take.
    patience
        Seconds that work waits for lost hosts.
    """

    abilities = Abilities()
    hosts: Sequence[HostStatus] = ()
    round_trip: float = 0.0
    patience: float = 60.0

    @property
    def name(self) -> str:
        """What it is called in errors, and where a host's name is not known."""
        return type(self).__name__

    @property
    @abstractmethod
    def workers(self) -> Mapping[str, int]:
        """Number of workers by host, of those that are up."""

    @abstractmethod
    def open(self, call: Call) -> Submit:
        """Make a call ready, with what it needs; return what submits chunks of it.

        Raises
        ------
        SerializeError
            The function, or the shared object, cannot be sent.
        """

    def window(self) -> int:
        """Return how many chunks should be under way now.

        Raises
        ------
        ServersUnavailable
            Nothing can run and nothing is about to come.
        """
        return 2 * sum(self.workers.values())

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have `listener` called, from any thread, when the window changes; return the undoing."""
        return lambda: None

    def hear(self, name: str, hearer: Callable[[Any], object] | None) -> bool:
        """Have `hearer` called, from any thread, with what tasks tell to a name while they run.

        ``None``: nobody hears it any more. Returns whether tasks can tell anything.
        """
        return False

    def wait_for_hosts(self, timeout: float | None = None) -> bool:
        """Wait until every host is up or has failed; return whether all are up."""
        return True

    def give_up(self, futures: Iterable[AnyFuture] | None = None) -> None:
        """Give up what was submitted: drop what waits, interrupt what runs if that can be.

        Does not wait for any of this. ``None`` is for all, where a backend knows them.
        """
        for future in futures or ():
            if isinstance(future, _Called):
                future.cancel(interrupt=True)
            else:
                future.cancel()

    def call(
        self,
        function: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] = {},
        shared: Any = None,
    ) -> AnyFuture:
        """Run one call; `shared` is a handle of `share`, of what `shared.shared` finds there.

        Raises
        ------
        SerializeError
            The function or an argument cannot be sent.
        """
        chunk = pack_call(function, args, kwargs)
        submit = self.open(Call(apply, shared=shared, log_level=logging.getLogger().level))
        return _Called(self.name, submit, chunk)

    def processes(self) -> Sequence[Any]:
        """Return its local processes, as `multiprocessing.Process` is one; others have none."""
        return ()

    def pids(self) -> list[int]:
        """Return the process ids of the local workers."""
        return [process.pid for process in self.processes()]

    def share(self, value: Any) -> Any:
        """Return a handle of something large that calls may name; ``None`` if that cannot be."""
        return None

    def places(self, futures: Iterable[AnyFuture], wait: float = 0.0) -> dict[AnyFuture, Place]:
        """Return where the chunks run that have begun; wait so many seconds for what hosts tell.

        Without those of which nothing is known.
        """
        return {}

    def flush(self) -> None:  # noqa: B027
        """Wait, not for long, until what workers have printed so far has arrived."""


def pack_function(call: Call) -> bytes:
    """Return the message for a call, with what is shared in it; raises `SerializeError`."""
    if not isinstance(call.shared, Inline | Stored | None):
        call = replace(call, shared=Inline(b"".join(Packed(call.shared))))
    name = getattr(call.function, "__qualname__", repr(call.function))
    packed = serialize.pack(call, f"the function {name}")
    shared = len(call.shared.data) if isinstance(call.shared, Inline) else 0
    baggage.warn_of(call.function, len(packed) - shared)
    if call.seed is not None:
        unseeded.warn_of(call.function)
    return packed


def pack_laden(call: Call, store: Store) -> tuple[bytes, Blob | None]:
    """Return the message for a call, and the blob of its large arrays, which hosts get once."""
    with aside.take() as taken:
        packed = pack_function(call)
    if not taken.arrays:
        return packed, None
    try:
        blob = store.add(Packed(taken.arrays))
    except OSError:  # there is no room
        return pack_function(call), None
    return serialize.dumps(Laden(blob.digest, packed)), blob


def chunks_of(futures: Iterable[AnyFuture]) -> list[AnyFuture]:
    """Return the futures that `Submit` has returned for these, as a call has one of its own."""
    return [one.chunk if isinstance(one, _Called) else one for one in futures]


def result_of(done: AnyFuture, name: str) -> Result:
    """Return what became of a chunk; an error of the backend's is a way to lose it."""
    try:
        result: Result = done.result()
    except (Exception, CancelledError) as exc:
        return Lost(name, 0, f"{type(exc).__name__}: {exc}", by_worker=True)
    if isinstance(result, ChunkOutcome) and not result.answers and not result.gave_back:
        return Lost(result.host, result.pid, INTERRUPTED)
    return result


def read_result(message: bytes, host: str) -> Result:
    """Return the result of a job that ran on a host."""
    try:
        result = unpack_result(message)
    except Exception as exc:
        result = Lost("", 0, f"its answer cannot be read: {exc}", by_worker=True)
    if isinstance(result, Lost):
        return replace(result, host=host)
    result.host = host
    return result


def settle(future: AnyFuture, result: Result, again: Callable[[], object] | None) -> None:
    """Give a future what became of its call, or have that run `again` if it is still worth it.

    It has `host` and `seconds` then.
    """
    try:
        if isinstance(result, ChunkOutcome):
            vars(future).update(host=result.host, seconds=sum(result.seconds))
            value, error = unpack_call(result)
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
        elif again is None:
            future.set_exception(WorkerLost(0, result.host, result.reason))
        else:
            again()
    except InvalidStateError:  # it was cancelled meanwhile
        pass
    except BaseException as exc:  # user code
        if not future.done():
            future.set_exception(exc)


class _Called(concurrent.futures.Future[Any]):
    """The outcome of a call on any backend: that of a chunk, or of the next try if it is lost."""

    def __init__(self, name: str, submit: Submit, chunk: bytes) -> None:
        super().__init__()
        self._name, self._submit, self._chunk = name, submit, chunk
        self._attempts = Attempts()
        self._inner: AnyFuture = concurrent.futures.Future()
        self._try()

    def _try(self) -> None:
        self._inner = self._submit(self._chunk)
        self._inner.add_done_callback(self._take)

    def _take(self, done: AnyFuture) -> None:
        if self.cancelled():
            return
        if done.cancelled():
            if super().cancel():
                self.set_running_or_notify_cancel()
            return
        result = result_of(done, self._name)
        self._attempts.count(result)
        settle(self, result, self._try if self._attempts.may_go_on(Limits()) else None)

    @property
    def chunk(self) -> AnyFuture:
        """The future of the chunk that it is now."""
        return self._inner

    def running(self) -> bool:
        """Return whether a worker is at it."""
        return not self.done() and self._inner.running()

    def cancel(self, interrupt: bool = False) -> bool:
        """Cancel it unless it has begun; with `interrupt` wait for it no longer, in any case."""
        if not self._inner.cancel() and interrupt and super().cancel():
            self.set_running_or_notify_cancel()
        return self.cancelled()
