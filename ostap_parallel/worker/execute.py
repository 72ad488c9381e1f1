"""Running a chunk of items in a worker; its outcomes are data, never ``None`` for an error.

A job is a serialised `Call`, which travels once to each worker, and a serialised chunk.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from ostap_parallel import libraries
from ostap_parallel.errors import SerializeError
from ostap_parallel.objects import program, serialize, settings
from ostap_parallel.worker import calls, generators, modules, shared
from ostap_parallel.worker.chunk import (
    ALL_PLAIN,
    PLAIN,
    ChunkOutcome,
    Lost,
    Received,
    pack_error,
    pack_result,
    pack_value,
    unpack_result,
    unpack_value,
)
from ostap_parallel.worker.combine import Combiner
from ostap_parallel.worker.modes import modes_of
from ostap_parallel.worker.restore import Baseline, NoBaseline, set_environ

# Seconds that an item gets to come back after its time is over, before the process is ended; and
# by how much this end may be late.
GRACE = 2.0
SLACK = 0.2

# Seconds by which an alarm may come before the time that it was set for.
EARLY = 0.005

# Seconds: what items leave behind that each take less is looked for when so many have gone by that
# they have taken some time together. To look costs more than such an item.
BRIEF = 5e-6
MANY_BRIEF = 1e-4


@dataclass(frozen=True)
class Call:
    """What a worker needs to know to run the items of one run.

    Attributes
    ----------
    function
        Called as ``function(item)``, or ``function(index, item)`` with `with_index`.
    initializer
        Called in each worker process before all else; it knows whether it was already.
    worker_init
        Called once in each worker process before its first item.
    surroundings
        ``directory``, ``environment``, ``prepend_to``, ``append_to``, ``dot_in_path`` and
        ``modes`` that hold while an item runs, see `surroundings_of`.
    seed
        Seeds the random generators before each item, together with its index.
    log_level
        Level of the root logger of workers.
    timeout
        Seconds that an item may take; ``None`` for no limit. Workers of ours only.
    shared
        The object that all items share; for a worker, where it is: see `with_shared`.
    with_keywords
        The shared object is a mapping, of keyword arguments for the function.
    combine
        ``combine(merged, value)`` merges the values of a chunk's items before they travel.
    is_numbered
        Users know its items by their indices.
    goes_on
        Its items find what those of other such calls, and of single ones, have left in the
        caller's program: what a task has loaded into a global variable is there for the next map.
        Otherwise they begin with the program as it was sent.
    settings
        What the script has set for its process, and the thread that makes this: it holds while
        chunks are run that bring none themselves.
    """

    function: Callable[..., Any]
    with_index: bool = False
    worker_init: Callable[[], Any] | None = None
    surroundings: dict[str, Any] = field(default_factory=dict)
    seed: int | str | None = None
    log_level: int = logging.WARNING
    timeout: float | None = None
    shared: Any = None
    with_keywords: bool = False
    combine: Callable[[Any, Any], Any] | None = None
    initializer: Callable[[], None] | None = None
    is_numbered: bool = False
    goes_on: bool = False
    settings: bytes = field(default_factory=settings.pack, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Before all else is read: it may depend on them.
        return {"settings": settings.Packed(self.settings), **_without_settings(vars(self))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def is_bare(self) -> bool:
        """Whether nothing but the item goes to the function, and nothing has to be done before."""
        return (
            self.timeout is None
            and self.seed is None
            and not (self.surroundings or self.with_index)
        )

    def with_shared(self, location: str) -> Call:
        """Return the call for a chunk, and have `shared.shared` find the object from now on."""
        value = shared.use(self.shared, location)
        if not self.with_keywords:
            return self
        return replace(self, function=functools.partial(self.function, **value))

    def run(self, index: int, item: Any) -> Any:
        """Run one item, with everything that goes before it."""
        if self.surroundings:
            with surroundings_of(self.surroundings):
                return replace(self, surroundings={}).run(index, item)
        if self.seed is not None:
            generators.seed_item(self.seed, index)
        else:
            generators.end()
        return self.function(index, item) if self.with_index else self.function(item)


def _without_settings(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "settings"}


def apply(item: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Any:
    """Call a function; the function of runs whose items are calls."""
    function, args, kwargs = item
    return function(*args, **kwargs)


@dataclass(slots=True)
class Executing:
    """What this process does now, as far as signals and its server need to know.

    An interrupt between items ends their chunk; one between chunks is ignored, as it was meant
    for a chunk that has just ended.

    Attributes
    ----------
    position
        The index of the item that is run, or prepared for, or -1; the time from which on the
        process is ended for it, in nanoseconds of the monotonic clock, or 0; and the index of the
        item that the last chunk consists of, or -1 if there are more. A worker shares them with
        its server, for which they survive the worker.
    baseline
        What is brought back after items.
    now
        Whether an item is run.
    interrupted, timed_out
        Whether what runs now was told to stop from outside, or as the item took too long.
    noted
        The last signal that came while no item was run.
    armed
        When the end of a process that does not come back was put off last.
    due
        When the time of the item is over. An alarm before is one that the task itself has set.
    watch
        What holds while a chunk is run.
    flush
        Prints what C code has held back.
    state
        Of the call of the last chunk.
    on_alarm
        Takes the alarms that tasks set for themselves.
    """

    position: MutableSequence[int] | memoryview
    baseline: Baseline | NoBaseline
    now: bool = False
    interrupted: bool = False
    timed_out: bool = False
    armed: float = -math.inf
    due: float = math.inf
    watch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    noted: int = 0
    flush: Callable[[], object] = lambda: None
    state: dict[str, Any] | None = None
    on_alarm: Callable[[int, FrameType | None], Any] | None = None


executing = Executing([-1, 0, -1], NoBaseline())


def bind(call: bytes) -> Callable[[bytes], bytes]:
    """Return the function that runs chunks of a serialised `Call`."""
    preparing = threading.Lock()  # a foreign executor may run chunks in threads

    def run(message: bytes) -> bytes:
        chunk = Received(message)
        state, result = _state_of(call, chunk.run), new_outcome()
        if not chunk.goes_on and "space" not in state:
            state["space"] = program.Space(is_fixed=True)
        is_ours = isinstance(executing.baseline, Baseline)
        with program.inside(state.get("space", program.POOL), is_ours):
            with preparing:
                if modules.use(chunk.places):
                    shared.forget()
                    _begin_anew()
                if state.keys() <= {"space"}:
                    executing.position[0], executing.interrupted = chunk.indices[0], False
                    prepared = _prepare(call, chunk.location)
                    if executing.interrupted:  # this chunk is given up; the next one tries again
                        executing.position[0] = -1
                        return pack_result(result)
                    state.update(prepared)
                elif chunk.goes_on and (executing.state is not state or "error" in state):
                    _read_again(call, state)
                executing.state = state if is_ours else None
                now = _hold_settings(state, chunk)
            executing.position[2] = _only_item(state, chunk)
            with executing.watch():  # which an initializer may have set just now
                run_items(_with_shared(now, chunk.location), chunk, result)
        _disarm()
        _flush()
        return pack_result(result)

    return run


def new_outcome() -> ChunkOutcome:
    """Return an outcome of this process without any items."""
    return ChunkOutcome(_hostname(), os.getpid())


_hostname = functools.cache(socket.gethostname)


_bind_once = functools.lru_cache(maxsize=8)(bind)
_binding = threading.Lock()  # a cache may compute twice what two threads ask for at once


def run_foreign(call: bytes, chunk: bytes, number: int = 0) -> ChunkOutcome | Lost:
    """Run a chunk in a worker of somebody else's executor.

    `number` tells attempts on the same chunk apart: dask takes calls that are alike for one.
    """
    with _binding:
        run = _bind_once(call)
    with calls.being_on_foreign():
        return unpack_result(run(chunk))


# A call that comes again in another run starts with its globals as they were sent, not as items
# of the last run have left them.
@functools.lru_cache(maxsize=8)
def _state_of(call: bytes, run: bytes) -> dict[str, Any]:
    return {}


def _prepare(data: bytes, location: str) -> dict[str, Any]:
    """Load the call and start the worker's part of it; an error is every item's outcome."""
    try:
        settings.be_worker(isinstance(executing.baseline, Baseline))
        shared.location.set(location)
        before = len(sys.modules)
        call: Call = serialize.loads(data)
        logging.getLogger().setLevel(call.log_level)
        generators.prepare(call.seed is not None, settings.Here.is_ours)
        if call.initializer is not None:
            begin = call.initializer
            begin()
            if call.goes_on:  # it came with the program as that was before
                call = serialize.loads(data)
                begin()
        is_new = call.initializer is not None or len(sys.modules) > before
        settings.be_ready(is_new)
        if call.worker_init is not None:
            call.with_shared(location)
            call.worker_init()
            settings.keep()
        if is_new or call.worker_init is not None or not executing.baseline.is_intact():
            _begin_anew()  # what this has set up is for all items
    except BaseException as exc:
        restore()
        return {"error": _pack_error(exc)}
    return {"call": call, "held": settings.Here.held}


def _read_again(data: bytes, state: dict[str, Any]) -> None:
    """Have what a call needs of the program be as it was sent: others share that, or have left it.

    What tasks have changed stays, unless other values have come for it meanwhile, and so does the
    function itself.
    """
    if "call" not in state:
        return
    state.pop("error", None)  # of the last time: what was wrong then may have passed
    try:
        serialize.loads(data)
    except BaseException as exc:
        state.update(error=_pack_error(exc))


def _hold_settings(state: dict[str, Any], chunk: Received) -> dict[str, Any]:
    """Have a call's settings be in force: those of another run may have been.

    A chunk may bring newer ones. What has been set here meanwhile by tasks of other runs is gone.
    Returns `state`, or what is wrong with the settings as every item's outcome.
    """
    if "held" not in state:
        return state
    try:
        if state["held"] is not settings.Here.held:
            settings.give_back(state["held"])
        settings.hold(chunk.settings or state["call"].settings)
        if state["held"] is not settings.Here.held:
            state["held"] = settings.keep()
    except BaseException as exc:  # what a library was told
        return {"error": _pack_error(exc)}
    executing.baseline.note_settings()
    return state


def _only_item(state: dict[str, Any], chunk: Received) -> int:
    """Return the index of a chunk's item if there is one, by which users know it; else -1."""
    is_numbered = "call" in state and state["call"].is_numbered
    return chunk.indices[0] if is_numbered and len(chunk.items) == 1 else -1


def _begin_anew() -> None:
    """Have this process brought back after each item to what it is now."""
    if isinstance(executing.baseline, Baseline):
        take_signals()
        executing.baseline, old = Baseline(), executing.baseline
        old.close()


def _with_shared(state: dict[str, Any], location: str) -> dict[str, Any]:
    """Return what to run a chunk with; that the object cannot be had is every item's outcome."""
    try:
        return state if "error" in state else {"call": state["call"].with_shared(location)}
    except BaseException as exc:
        return {"error": _pack_error(exc)}


def run_items(state: dict[str, Any], chunk: Received, result: ChunkOutcome) -> None:
    """Run items with the call, or the error, in `state`; add to `result` what becomes of them."""
    items, limit, answers = chunk.items, chunk.limit, result.answers
    result.begun = time.time()
    if "error" in state:
        _fail_all(state["error"], len(items), result)
        return
    call: Call = state["call"]
    function = call.function if call.is_bare and ALL_PLAIN.issuperset(map(type, items)) else None
    combiner = Combiner(call.combine, chunk.indices, answers) if call.combine else None
    executing.interrupted = executing.timed_out = False
    generators.end()
    brief = 0.0  # time of the items after which the process was not brought back
    end = time.perf_counter()
    for index, packed in zip(chunk.indices, items, strict=True):
        # to ask the clock takes longer than some items
        begin = end if brief and not combiner else time.perf_counter()
        executing.position[0] = index
        try:
            try:
                ok = executing.now = True
                answer = function(packed) if function else _run(call, index, packed, chunk.read)
                if type(answer) not in PLAIN:
                    answer = _packed(answer, index)
                executing.now = False
            except BaseException as exc:  # whatever a task raises is its outcome
                ok, answer = False, _failure(exc)
            end = time.perf_counter()
        except BaseException as exc:  # so is what comes of a signal that C code has held up
            ok, answer, end = False, _held_up(exc), time.perf_counter()
        if ok and executing.timed_out:
            ok, answer = False, _pack_error(TimeoutError("it went on when it was interrupted"))
        seconds = end - begin
        if seconds < BRIEF and brief < MANY_BRIEF and executing.baseline.is_intact():
            brief += seconds
        else:
            brief = 0.0
            _bring_back(result, in_part=not combiner and len(answers) + 1 == len(items))
        limit -= seconds
        if executing.interrupted:  # the run is over: no outcome for this item, none for the rest
            break
        answers.append(answer)
        result.seconds.append(seconds)
        if not ok:
            result.failed.add(len(answers) - 1)
        elif combiner and not _combine(combiner, result, answer):
            break
        if limit < 0 or chunk.is_broken:
            result.gave_back = len(answers) < len(items)
            break
    _end(combiner, result)


def _packed(answer: Any, index: int) -> bytes:
    packed: bytes = pack_value(answer, f"the result of item {index} (a {type(answer).__name__})")
    return packed


def _fail_all(error: bytes, count: int, result: ChunkOutcome) -> None:
    executing.position[0] = -1
    result.was_prepared = False
    result.answers[:] = [error] * count
    result.seconds.extend([0.0] * count)
    result.failed.update(range(count))


def _bring_back(result: ChunkOutcome, in_part: bool) -> None:
    """Have the process be as before the first item; see `restore`."""
    if os.getpid() != result.pid:
        _flush()  # a fork that came back from the task: this is not its work
        os._exit(0)
    restore(in_part)


def _combine(combiner: Combiner, result: ChunkOutcome, answer: Any) -> bool:
    """Merge an item's value, read back from what would travel, as the task may change its own.

    Returns whether to go on.
    """
    _disarm()  # the time is not the item's
    begin = time.perf_counter()
    try:
        value = unpack_value(answer)
    except BaseException:  # the caller will find out, too
        return not executing.interrupted
    try:
        combiner.add(value)
    except BaseException as exc:  # user code
        result.merge_failure = (combiner.start, len(result.answers), _pack_error(exc))
    result.seconds[-1] += time.perf_counter() - begin
    return not (executing.interrupted or result.merge_failure)


def _end(combiner: Combiner | None, result: ChunkOutcome) -> None:
    executing.position[0] = -1
    if combiner is None:
        return
    try:
        if result.merge_failure is None:
            combiner.end()
    except SerializeError as exc:
        result.merge_failure = (combiner.start, len(result.answers), _pack_error(exc))
    result.merged = combiner.ranges


def _run(call: Call, index: int, packed: Any, read: Callable[[Any], Any]) -> Any:
    """Run one item, which is to be read first and may have a time limit; return its value."""
    if call.timeout is not None:
        executing.timed_out = False
        _arm(call.timeout)
    return call.run(index, packed if type(packed) in PLAIN else read(packed))


def _failure(exc: BaseException) -> bytes:
    """Return the packed error of an item, or of an interrupt that comes while that is packed."""
    try:
        error = _pack_error(exc)
        executing.now = False
    except BaseException as other:
        executing.now = False
        error = _pack_error(other)
    return error


def _held_up(exc: BaseException) -> bytes:
    """Return the packed error of a signal whose handler has only run behind the item."""
    restore()  # the task's timer may go on
    return _failure(exc)


def _pack_error(exc: BaseException) -> bytes:
    return pack_error(exc, lambda: executing.timed_out)


def restore(in_part: bool = False) -> None:
    """Bring the process back to what it was before the first item.

    As far as it is seen `in_part`: behind the last item of a chunk the rest can wait until its
    result is on its way, but for what could come between.
    """
    for _ in range(3):
        try:
            if in_part and executing.baseline.is_intact():
                executing.baseline.restore_signals()
            else:
                executing.baseline.restore()
            break
        except BaseException:  # a signal handler that the task has left may raise here
            continue


def take_signals() -> None:
    """Have SIGINT and SIGALRM interrupt the item that is run, and nothing else.

    What an initializer has set for alarms gets those that tasks set.
    """
    handler = signal.getsignal(signal.SIGALRM)
    if callable(handler) and not is_ours(handler):
        executing.on_alarm = handler
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGALRM, _on_signal)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    is_own = signum == signal.SIGALRM and time.monotonic() < executing.due - EARLY
    if is_own and executing.on_alarm is not None:
        executing.on_alarm(signum, frame)
        return
    if is_own:  # the task's, without a handler
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    if executing.now:
        executing.interrupted = signum == signal.SIGINT
        executing.timed_out = signum == signal.SIGALRM
        # half a module would be left; the item, or the process, ends
        if libraries.is_importing(frame):
            return
        executing.now = False
        raise KeyboardInterrupt
    executing.noted = signum
    if signum == signal.SIGINT:
        executing.interrupted = True


def is_ours(handler: object) -> bool:
    """Return whether a handler of signals is that of this module."""
    return handler is _on_signal


def _arm(timeout: float) -> None:
    """Have the item that begins now interrupted, and the process ended if it does not heed that.

    The end comes from a thread that needs no interpreter, and tells on standard error where the
    process hangs. It is put off now and then only, as a new thread costs more than most items.
    """
    now = time.monotonic()
    last = timeout + GRACE + SLACK
    if now - executing.armed > SLACK:
        faulthandler.dump_traceback_later(last, exit=True, file=2)
        executing.armed = now
    executing.position[1] = int((executing.armed + timeout + GRACE) * 1e9)
    executing.due = now + timeout
    signal.setitimer(signal.ITIMER_REAL, timeout)


def _disarm() -> None:
    if executing.armed > 0:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        executing.armed, executing.position[1], executing.due = -math.inf, 0, math.inf


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a task may have closed or replaced it
            stream.flush()
    executing.flush()


@contextlib.contextmanager
def surroundings_of(wanted: dict[str, Any]) -> Iterator[None]:
    """Hold a working directory and environment variables while the body runs.

    ``$NAME`` in values is expanded here, on the worker. The old state comes back afterwards.

    Raises
    ------
    FileNotFoundError
        ``directory`` does not exist on this host.
    """
    if not wanted:
        yield
        return
    old_directory, old_environ, old_path = os.getcwd(), dict(os.environ), list(sys.path)  # noqa: PTH109
    try:
        if wanted.get("directory"):
            os.chdir(os.path.expandvars(wanted["directory"]))
        for name, value in wanted.get("environment", {}).items():
            os.environ[name] = os.path.expandvars(str(value))
        for key in ("prepend_to", "append_to"):
            for name, value in wanted.get(key, {}).items():
                parts = [os.path.expandvars(str(value)), os.environ.get(name, "")]
                ordered = parts if key == "prepend_to" else parts[::-1]
                os.environ[name] = os.pathsep.join(part for part in ordered if part)
        if "TZ" in wanted.get("environment", {}):
            time.tzset()
        if wanted.get("dot_in_path") and "." not in sys.path:
            sys.path.insert(0, ".")
        with modes_of(wanted.get("modes", {})):
            yield
    finally:
        os.chdir(old_directory)
        sys.path[:] = old_path
        set_environ(old_environ)
