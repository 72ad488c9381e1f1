"""Tasks that submit tasks and wait for them, in a worker of ours: what a task calls.

While a worker runs a job it may send requests in place of the result; each is answered at once,
or after a second at most. They go to the caller, see `ostap_parallel.engine.nesting`: from a
worker on a host through its server. A worker that waits is given other jobs meanwhile, and runs
them on top of the one that waits. Futures of here belong to the task that has made them, and do
not travel.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import pickle
import signal
import sys
import threading
import time
from _signal import getsignal, pthread_sigmask  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    TimeoutError,  # another one than the built-in one before Python 3.11
)
from typing import Any, NamedTuple, NoReturn

from ostap_parallel.errors import RemoteError, WorkerLost
from ostap_parallel.logs import logger_of
from ostap_parallel.objects import serialize
from ostap_parallel.objects.settings import in_force
from ostap_parallel.worker import execute
from ostap_parallel.worker.chunk import (
    Lost,
    Received,
    pack_call,
    pack_result,
    unpack_call,
    unpack_result,
)
from ostap_parallel.worker.execute import Call, executing, is_ours
from ostap_parallel.worker.restore import SIGNALS, Baseline
from ostap_parallel.worker.transport import Connection

logger = logger_of(__name__)

REQUEST = b"?"  # begins a request; no result begins with it

LAST = b"."  # begins the last result of a worker that has done as many jobs as it may
CANCELLED = b""  # what stands for the result of a call that was cancelled

# Seconds that an answer takes at most; so often a worker that waits shows that it is there. What
# other threads of a task want to ask must not wait so long.
PERIOD = 1.0
PERIOD_OF_THREADS = 0.05

_APPLY = {"call": Call(execute.apply, settings=b"")}


class Link:
    """The way from this process to its server: for results, and for requests of a job."""

    def __init__(self, channel: Connection) -> None:
        self.channel = channel
        self.lock = threading.RLock()  # held from a request to its answer
        self.is_open = False  # whether a job is run
        self.jobs = 0  # that were begun, also on top of others
        self.depth = 0  # number of jobs on top of the first one
        self.ended: bytes | None = None  # the result of one on top, for the next request
        self.waiter: object = None  # whose futures the server knows to be waited for
        self.pid = os.getpid()

    def serve(self, run: Callable[[bytes], bytes], chunk: bytes, tasks: int | None = None) -> None:
        """Run a job and send its result, which says so if it is the last of so many."""
        self.jobs += 1
        self.is_open = True
        result = run(chunk)
        is_last = tasks is not None and self.jobs >= tasks
        with self.lock:  # a thread that the job has left behind may be asking
            self.is_open = False
            self.channel.send(LAST + result if is_last else result)

    def ask(self, kind: str, *details: Any) -> Any:
        """Send a request and return the answer.

        Raises
        ------
        KeyboardInterrupt
            The task was interrupted meanwhile, or before; or its time is over.
        RuntimeError
            No job is run.
        """
        with self.lock, _noting_signals():
            if not available():
                raise RuntimeError("a nested task needs a task of ostap_parallel around it")
            answer = self._exchange(kind, details)
            if executing.noted == signal.SIGINT and answer[0] != "interrupted":
                # for this job, for one on top that has just ended, or for one about to begin?
                executing.noted = 0
                verdict = self._exchange("check", ())  # takes back what has not begun
                answer = verdict if verdict[0] == "interrupted" else (*answer[:2], None)
            if answer[0] == "interrupted":
                executing.noted = signal.SIGINT
        if answer[0] == "error":
            raise answer[1]
        if answer[0] == "interrupted":  # a thread: signals are for the main one
            raise RuntimeError("the task was interrupted")
        return answer[1:]

    def _exchange(self, kind: str, details: tuple[Any, ...]) -> Any:
        ended, self.ended = self.ended, None
        request = pickle.dumps((self.depth, ended, kind, details), serialize.PROTOCOL)
        self.channel.send(REQUEST + request)
        return pickle.loads(self.channel.receive())


_link: Link | None = None


def connect(channel: Connection) -> Link:
    """Make a channel the way to this process' server."""
    global _link
    _link = Link(channel)
    return _link


def _ask(kind: str, *details: Any) -> Any:
    if _link is None:
        raise RuntimeError("a nested task needs a task of ostap_parallel around it")
    return _link.ask(kind, *details)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _noting_signals() -> Iterator[None]:
    """Raise for a signal after the body, so that a request and its answer stay together."""
    if not _in_main_thread():
        yield
        return
    was_running, executing.now, executing.noted = executing.now, False, 0
    handlers = ((number, getsignal(number)) for number in SIGNALS)
    own = [number for number, handler in handlers if callable(handler) and not is_ours(handler)]
    mask = pthread_sigmask(signal.SIG_BLOCK, own)  # what the task handles itself
    try:
        yield
    finally:
        executing.now = was_running  # from here on a signal raises by itself
        pthread_sigmask(signal.SIG_SETMASK, mask)
    if number := executing.noted:
        executing.now, executing.noted = False, 0
        executing.interrupted = number == signal.SIGINT
        executing.timed_out = number == signal.SIGALRM
        raise KeyboardInterrupt


def _run_on_top(chunk: bytes) -> None:
    """Run a job while another one waits, which then finds the process as it had left it.

    The next request brings its result. Raises KeyboardInterrupt if the time of the one that waits
    is over.
    """
    assert _link is not None
    _link.jobs += 1
    index = executing.position[0]  # which the end of the process is ascribed to
    with _put_aside() as alarm:
        result = execute.new_outcome()
        if executing.position[1] > 0:  # the alarm is for all that is run until then
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, alarm))
        if not executing.noted:
            received = Received(chunk)
            received.indices = [index]
            contextvars.Context().run(execute.run_items, _APPLY, received, result)
        is_over = executing.timed_out or executing.noted == signal.SIGALRM
        if not is_over:
            with _link.lock:  # a thread that it has left behind may be the next to ask
                _link.depth, _link.ended = _link.depth - 1, pack_result(result)
    if is_over:
        executing.now, executing.timed_out = False, True
        raise KeyboardInterrupt


@contextlib.contextmanager
def _put_aside() -> Iterator[float]:
    """Put the job that waits aside; yield the seconds until its alarm.

    The process is as before the first item then, and afterwards as the job has left it.
    """
    assert _link is not None
    pristine, mine = executing.baseline, Baseline()
    assert isinstance(pristine, Baseline)
    index, limit, was_running = executing.position[0], pristine.recursion_limit, executing.now
    alarm, begin = signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()
    executing.now, executing.position[0] = False, -1
    depth, _link.depth = _link.depth, _link.depth + 1
    try:
        pristine.recursion_limit = limit + _count_frames()  # each has as much as the first
        pristine.restore()
        yield alarm
    finally:
        with _link.lock:
            _link.depth = depth
        pristine.recursion_limit = limit
        mine.restore()
        mine.close()
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, alarm - time.monotonic() + begin))
        # what has come since is told by the next answer
        executing.interrupted = executing.timed_out = False
        executing.noted = 0
        executing.position[0] = index
        executing.now = was_running


def _count_frames() -> int:
    frame, count = sys._getframe(), 0
    while frame.f_back is not None:
        frame, count = frame.f_back, count + 1
    return count


_known = threading.Condition()  # notified when a future has ended, for other threads that wait


class Future:
    """The outcome of a call that a task has submitted, as `concurrent.futures.Future` is.

    It is none, as what waits for those would wait for ever: use `wait` and `as_completed` of here.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._is_taken = False  # the server has no more to tell of it
        self._is_known = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Future], Any]] = []

    def result(self, timeout: float | None = None) -> Any:
        """Wait; return what the call returned, or raise what it raised.

        Raises
        ------
        TimeoutError
            It has not ended after `timeout` seconds.
        CancelledError
            It was cancelled.
        """
        if (error := self.exception(timeout)) is not None:
            raise error
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait; return what the call raised, or ``None``; raises as `result` does."""
        if not self._is_known:
            _wait({self._number: self}, timeout, any_of_them=False)
        if not self._is_known:
            raise TimeoutError(f"the call has not ended after {timeout} s")
        if isinstance(self._error, CancelledError):
            raise self._error
        return self._error

    def done(self) -> bool:
        """Return whether it has ended; asks the caller unless that is known."""
        if not self._is_known:
            _wait({self._number: self}, 0, any_of_them=False)
        return self._is_known

    def running(self) -> bool:
        """Return whether a worker is at it; asks the caller."""
        return not self.done() and (self._is_taken or bool(_ask("is_running", self._number)[0]))

    def cancelled(self) -> bool:
        """Return whether it was cancelled."""
        return self.done() and isinstance(self._error, CancelledError)

    def cancel(self, interrupt: bool = False) -> bool:
        """Cancel it unless it has begun, or also then; return whether it is cancelled."""
        if self._is_known:
            return isinstance(self._error, CancelledError)
        assert _link is not None
        with _link.lock:
            if not _ask("cancel", self._number, interrupt)[0]:
                return False
            self._is_taken = True
        self._settle(CANCELLED)
        return True

    def add_done_callback(self, fn: Callable[[Future], Any]) -> None:
        """Call ``fn(self)`` when this process learns that it has ended, or now if it has."""
        with _known:
            if not self._is_known:
                self._callbacks.append(fn)
                return
        fn(self)

    def _settle(self, message: bytes) -> None:
        """Take the packed result."""
        if self._is_known:
            return
        try:
            self._value = _unpack(message)
        except (Exception, CancelledError) as exc:
            self._error = exc
        self._announce()

    def _do_here(self, chunk: bytes) -> None:
        """Do the call as a part of the task that waits for it."""
        try:
            received = Received(chunk)
            (packed,) = received.items
            call = received.read(packed)
            self._value = contextvars.Context().run(execute.apply, call)
        except BaseException as exc:  # user code
            is_usual = isinstance(exc, Exception) and not isinstance(exc, StopIteration)
            text = serialize.text_of(exc)
            self._error = exc if is_usual else RemoteError(type(exc).__name__, text)
            if executing.interrupted or executing.timed_out:
                raise
        finally:
            self._announce()

    def _announce(self) -> None:
        with _known:
            self._is_known = True
            _known.notify_all()
        for fn in self._callbacks:
            try:
                fn(self)
            except Exception:  # as the standard library has it
                logger.exception("exception calling callback for %r", self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a future of a nested task stays in the task that has submitted it: send its result"
        )


def _unpack(message: bytes) -> Any:
    """Return the value of a call; raises its error."""
    if message == CANCELLED:
        raise CancelledError
    result = unpack_result(message)
    if isinstance(result, Lost):
        raise WorkerLost(0, result.host, result.reason)
    value, error = unpack_call(result)
    if error is not None:
        raise error
    return value


class DoneAndNotDone(NamedTuple):
    """What `wait` returns."""

    done: set[Future]
    not_done: set[Future]


def tell(name: str, value: Any) -> None:
    """Have who hears a name at the caller's get a value meanwhile, see `Backend.hear`."""
    _ask("tell", name, value)


def available() -> bool:
    """Return whether this process runs a task, in a worker of ours."""
    return _link is not None and _link.is_open and _link.pid == os.getpid()


def in_worker() -> bool:
    """Return whether this process is a worker of ours, or a fork of one."""
    return _link is not None


def count_workers() -> int:
    """Return the number of workers that are up, here and on hosts."""
    return int(_ask("count_workers")[0])


def submit(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
    """Have any worker of the caller's executor call a function."""
    return submit_all([(fn, args, kwargs)])[0]


def submit_all(
    calls: Iterable[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]],
) -> list[Future]:
    """Have workers do calls, each ``(function, arguments, keywords)``, with one message for all.

    A task waits for what it submits: what has not ended when it ends is given up.

    Raises
    ------
    SerializeError
        A function or an argument cannot be sent; no call is submitted then.
    RuntimeError
        This process runs no task of ours, see `available`; or the executor is being shut down.
    """
    settings = in_force()  # of the caller's, as for the task itself
    chunks = [pack_call(fn, args, kwargs, settings) for fn, args, kwargs in calls]
    return [Future(number) for number in _ask("submit", chunks)[0]]


def wait(
    futures: Iterable[Future], timeout: float | None = None, return_when: str = ALL_COMPLETED
) -> DoneAndNotDone:
    """Wait as `concurrent.futures.wait` does; this process may run other tasks meanwhile.

    So it may return late, by the time that one of these takes which are waited for.
    """
    if return_when not in (ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION):
        raise ValueError(f"Invalid return condition: {return_when!r}")
    deadline = None if timeout is None else time.monotonic() + timeout
    wanted = list(dict.fromkeys(futures))  # of those that have not begun, the last comes first
    while not _is_enough(wanted, return_when):
        missing = {future._number: future for future in wanted if not future._is_known}
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        _wait(missing, left, any_of_them=return_when != ALL_COMPLETED)
        if deadline is not None and time.monotonic() >= deadline:
            break
    done = {future for future in wanted if future._is_known}
    return DoneAndNotDone(done, set(wanted) - done)


def _is_enough(futures: list[Future], return_when: str) -> bool:
    known = [future for future in futures if future._is_known]
    if len(known) == len(futures) or (known and return_when == FIRST_COMPLETED):
        return True
    return return_when == FIRST_EXCEPTION and any(future._error for future in known)


def as_completed(futures: Iterable[Future], timeout: float | None = None) -> Iterator[Future]:
    """Yield futures as they end; raises TimeoutError `timeout` seconds after the first `next`."""
    deadline = None if timeout is None else time.monotonic() + timeout
    pending = list(dict.fromkeys(futures))
    while pending:
        left = None if deadline is None else max(0, deadline - time.monotonic())
        done = wait(pending, left, FIRST_COMPLETED).done
        if not done:
            raise TimeoutError(f"{len(pending)} calls have not ended after {timeout} s")
        pending = [future for future in pending if future not in done]
        yield from done


def _wait(missing: dict[int, Future], seconds: float | None, any_of_them: bool) -> None:
    """Wait for futures that have not ended, by their numbers; run other jobs meanwhile."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left, helps = _period(deadline), _helps(seconds)
        finished, job = _ask_for(missing, any_of_them, left, helps)
        for number, message in finished:
            missing[number]._settle(message)
        if job is not None:
            number, chunk = job
            if helps == "parts":
                missing[number]._do_here(chunk)
            else:
                _run_on_top(chunk)
                continue
        ended = [number for number, future in missing.items() if future._is_known]
        for number in ended:
            del missing[number]
        is_over = deadline is not None and time.monotonic() >= deadline
        if not missing or (ended and any_of_them) or is_over:
            return


def _ask_for(missing: dict[int, Future], any_of_them: bool, left: float, helps: str) -> Any:
    """Ask for futures; or wait for other threads of the task, if they are at all of these."""
    assert _link is not None
    with _link.lock:
        wanted = [number for number, future in missing.items() if not future._is_taken]
        if wanted:
            is_known = _link.waiter is missing
            _link.waiter = missing
            numbers = None if is_known else wanted
            finished, job = _ask("wait", numbers, any_of_them, left, helps)
            for number, _ in (*finished, *[job] * (helps == "parts" and job is not None)):
                missing[number]._is_taken = True
            return finished, job
    with _known:
        _known.wait_for(lambda: any(future._is_known for future in missing.values()), left)
    return (), None


def _has_threads() -> bool:
    return threading.active_count() > 1


def _period(deadline: float | None) -> float:
    """Return for how many seconds to wait before signs of life are exchanged."""
    period = PERIOD_OF_THREADS if _has_threads() else PERIOD
    if executing.position[1] > 0:  # an alarm that comes meanwhile is heeded then
        period = min(period, signal.getitimer(signal.ITIMER_REAL)[0] + 0.01)
    return period if deadline is None else max(0.0, min(period, deadline - time.monotonic()))


def _helps(seconds: float | None) -> str:
    """Return what this process may run while it waits.

    That is any job, or those it waits for; or, as parts of the task, those that it waits for:
    other threads of the task must not find the process as another task has it.
    """
    if seconds == 0:
        return "none"
    if _has_threads():
        return "parts"
    return "any" if seconds is None and executing.position[1] == 0 else "own"


def set_constant(name: str, value: Any) -> None:
    """Give all tasks of the executor a value by a name; raises TypeError if it has one."""
    _ask("set_constant", name, serialize.pack(value, f"the constant {name}"))


def constant(name: str, timeout: float | None = None) -> Any:
    """Return the value with a name, waiting for it; raises KeyError after `timeout` seconds.

    The caller has the same: `Engine.set_constant` and `Engine.constant`.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        (packed,) = _ask("constant", name, _period(deadline))
        if packed is not None:
            return serialize.loads(packed)
        if deadline is not None and time.monotonic() >= deadline:
            raise KeyError(name)
