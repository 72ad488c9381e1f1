"""Commands on a worker: what runs one, reads its output, and ends it with all that it started.

A worker has a *keeper*, a fork of its own that starts the worker's commands, each in a session of
its own. The kernel makes the keeper the parent of whatever they leave behind, daemons too. When
the worker lets it go, or dies, the keeper ends all of that: by TERM, then by KILL.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ostap_parallel.worker import nested
from ostap_parallel.worker.control import receive, send, set_name
from ostap_parallel.worker.node import Messages
from ostap_parallel.worker.printed import Stream, Taken
from ostap_parallel.worker.reaper import Reaper, Started

# Seconds that a command gets to end by itself when it is told to, before it is killed.
GRACE = 1.0

# Seconds that what a command has started may outlive it, as a `tee` does at the end of a pipe.
LINGER = 0.2

# Seconds after which commands that were sent together are not to wait for one another any more.
TOGETHER = 0.05

# Seconds of one wait at most: `poll` counts milliseconds in 32 bits, 24 days.
LONGEST = 86400.0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A command to be run.

    Attributes
    ----------
    argv
        Program and arguments; no shell sees them.
    otherwise
        What is run in place of that where there is no such program.
    name
        Of the log records for its output.
    stdin
        What it reads; by default nothing.
    environment
        Variables that are added; ``$NAME`` in their values is expanded on the worker.
    variables
        More variables; what is in them is not expanded.
    directory
        Where it runs, by default where the worker does; ``~`` and ``$NAME`` are expanded.
    timeout
        Seconds after which it is ended.
    levels
        Of the records for standard output and standard error; ``None`` for no records.
    keep
        Bytes of each output that come back; beyond these the middle is left out.
    spool
        Leave nothing out: what is longer waits in a file on its machine, see `read_piece`.
    arguments
        For a node script, see `worker.node`, packed.
    """

    argv: tuple[str, ...]
    otherwise: tuple[str, ...] = ()
    name: str = ""
    stdin: bytes = b""
    environment: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    directory: str = ""
    timeout: float | None = None
    levels: tuple[int | None, int | None] = (None, None)
    keep: int = 1 << 20
    spool: bool = False
    arguments: bytes | None = None


@dataclass(kw_only=True)
class Ended:
    """How a command has ended.

    Attributes
    ----------
    status, signal
        Its exit status, or the signal that has ended it; neither if it could not be started.
    start, seconds
        When it began, in seconds of the epoch, and how long it ran.
    memory
        The most bytes that one of its processes had in memory.
    user, system
        Seconds of CPU time.
    read, written
        Bytes that its processes have read and written, from and to whatever.
    error
        Why it could not be started, or that its output could not be kept.
    answer
        What a node script has answered, packed.
    """

    start: float
    stdout: Taken
    stderr: Taken
    status: int | None = None
    signal: int | None = None
    seconds: float = 0.0
    timed_out: bool = False
    memory: int = 0
    user: float = 0.0
    system: float = 0.0
    read: int = 0
    written: int = 0
    error: str = ""
    answer: bytes = b""


def run(spec: Spec) -> Ended:
    """Run a command; if this is interrupted, end it."""
    (ended,) = _exchange([spec], lambda ended: None)
    return ended


def run_all(work: tuple[str, int, list[Spec]]) -> list[Ended]:
    """Run commands one after another; if this is interrupted, end the one that runs.

    Returns how they have ended that were run, and not told of before. When some time is over no
    more are begun; and of the one that runs then is told that all others are to be had back: who
    hears the name that is given gets the number that is, and how those before it have ended.
    """
    name, number, specs = work
    return _exchange(specs, lambda ended: nested.tell(name, (number, ended)))


def _exchange(specs: list[Spec], tell: Callable[[list[Ended]], object]) -> list[Ended]:
    """Have commands run; `tell` is called at most once, see `run_all`."""
    keeper = _keepers[0] if _keepers else _Keeper()
    _keepers[:] = [keeper]
    try:
        send(keeper.socket, specs)
        answer = receive(keeper.socket, [])
        if isinstance(answer, Sooner):
            tell(answer.ended)
            answer = receive(keeper.socket, [])
    except BaseException:
        _keepers.clear()
        keeper.dismiss()
        raise
    if isinstance(answer, list):
        return answer
    _keepers.clear()
    keeper.dismiss()
    raise RuntimeError(answer or "what runs this worker's commands was killed")


@dataclass(frozen=True)
class Sooner:
    """What a keeper says while a command takes long: how those before it have ended."""

    ended: list[Ended]


def read_piece(wanted: tuple[str, int, int]) -> bytes:
    """Return bytes of an output that is kept here: of a place, from where on, and how many.

    Of 0 bytes it is kept no more.
    """
    place, begin, size = wanted
    with Path(place).open("rb+", buffering=0) as file:
        if not size:
            file.truncate()
            return b""
        file.seek(begin)
        return file.read(size)


class _Keeper:
    """The process that runs the commands of this worker, as the worker sees it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        for end in self.socket, theirs:
            end.settimeout(None)  # whatever the script has as usual: commands may take long
        self.pid = os.fork()
        if not self.pid:
            self.socket.close()
            _keep(theirs)
        theirs.close()

    def dismiss(self) -> None:
        """Have it end what it runs, and itself; wait for that."""
        self.socket.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


_keepers: list[_Keeper] = []


def _keep(control: socket.socket) -> NoReturn:
    """Be the keeper."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        set_name("ppkeeper")
        _keep_from_commands(control)
        _serve(control, Reaper())
    except OSError:  # the worker has gone
        pass
    except BaseException:
        with contextlib.suppress(OSError):
            send(control, traceback.format_exc())
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(0)


def _keep_from_commands(control: socket.socket) -> None:
    """Have no descriptor of this process but its outputs be inherited."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), False)


def _serve(control: socket.socket, reaper: Reaper) -> None:
    """Run what commands come, until there are no more."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(reaper.woken, select.POLLIN)
    kept: list[Stream] = []
    while isinstance(specs := receive(control, []), list):
        kept = [stream for stream in kept if stream.is_wanted()]
        send(control, _run_together(specs, kept, (control, reaper, poll)))


def _run_together(
    specs: list[Spec], kept: list[Stream], means: tuple[socket.socket, Reaper, select.poll]
) -> list[Ended]:
    """Run commands one after another for a moment; return how they have ended that were run."""
    control, reaper, _ = means
    ended: list[Ended] = []
    together = time.monotonic() + TOGETHER

    def tell() -> None:
        send(control, Sooner(ended.copy()))
        ended.clear()

    for position, spec in enumerate(specs, 1):
        hurry = (together, tell) if position < len(specs) else None
        running = _Running(spec, *means, hurry)
        try:
            ended.append(running.run())
        finally:
            reaper.end_all(GRACE)
        kept += [stream for stream in running.streams if stream.is_wanted()]
        if time.monotonic() >= together:
            break
    return ended


class _Running:
    """One command, from its start to the end of all that it has started.

    Parameters
    ----------
    poll
        Waits for word from the worker, and from the reaper.
    hurry
        When to call what, if it still runs then.
    """

    def __init__(
        self,
        spec: Spec,
        control: socket.socket,
        reaper: Reaper,
        poll: select.poll,
        hurry: tuple[float, Callable[[], object]] | None = None,
    ) -> None:
        self._spec, self._control, self._reaper = spec, control, reaper
        self._poll, self._hurry = poll, hurry
        self._open: dict[int, Stream | Messages] = {}
        self.streams: list[Stream] = []
        self._timed_out = False
        self._error = ""

    def run(self) -> Ended:
        """Run it; return how it has ended."""
        spec, start, begin = self._spec, time.time(), time.monotonic()
        try:
            process = self._start()
        except (OSError, ValueError) as exc:  # text, too, that is none in this locale
            return _not_started(spec, start, exc)
        self.streams = [Stream(spec.name, n, spec.keep, spec.spool) for n in spec.levels]
        messages = Messages()
        self._open.update(zip(process.outputs, [*self.streams, messages], strict=False))
        for descriptor in process.outputs:
            self._poll.register(descriptor, select.POLLIN)
        try:
            self._watch(begin)
        finally:
            for descriptor in self._open:
                self._poll.unregister(descriptor)
            for descriptor in process.outputs:
                os.close(descriptor)
        usage, status = self._reaper.usage, self._reaper.status
        stdout, stderr = (stream.end() for stream in self.streams)
        return Ended(
            start=start,
            seconds=(self._reaper.ended_at or time.monotonic()) - begin,
            stdout=stdout,
            stderr=stderr,
            status=status if status is not None and status >= 0 else None,
            signal=-status if status is not None and status < 0 else None,
            timed_out=self._timed_out,
            error=self._error,
            answer=messages.answer,
            **usage,
        )

    def _start(self) -> Started:
        spec = self._spec
        expanded = {name: os.path.expandvars(text) for name, text in spec.environment.items()}
        how = (spec.stdin, expanded | dict(spec.variables), spec.directory, spec.arguments)
        try:
            return self._reaper.start(spec.argv, *how)
        except OSError:  # "." is no program, either
            if not spec.otherwise:
                raise
        return self._reaper.start(spec.otherwise, *how)

    def _watch(self, begin: float) -> None:
        """Read what it prints, until all is over or has been ended."""
        reaper, steps = self._reaper, [self._reaper.terminate, self._reaper.kill]
        deadline = begin + (self._spec.timeout or float("inf"))
        while not reaper.is_done() or self._open:
            if reaper.ended_at is not None and len(steps) == 2:
                deadline = min(deadline, reaper.ended_at + LINGER)
            now = time.monotonic()
            left = 0.0 if self._error and len(steps) == 2 else deadline - now
            if left > 0:
                left = min(left, self._hurry_in(now), LONGEST)
                self._take(self._poll.poll(left * 1000 + 1))
                continue
            if not steps:  # what holds its output open now is none of ours
                return
            if len(steps) == 2:
                self._timed_out = reaper.status is None and not self._error
            steps.pop(0)()
            deadline = time.monotonic() + GRACE

    def _hurry_in(self, now: float) -> float:
        """Return in how many seconds to tell that it still runs; tell it if it is time."""
        if self._hurry is None:
            return float("inf")
        due, tell = self._hurry
        if now >= due:
            self._hurry = None
            tell()
        return max(0.0, due - now) or float("inf")

    def _take(self, events: list[tuple[int, int]]) -> None:
        """Take what is there."""
        for descriptor, _ in events:
            if descriptor == self._reaper.woken:
                self._reaper.reap()
            elif descriptor == self._control.fileno():
                raise BrokenPipeError  # the worker lets us go: nothing else comes while one runs
            else:
                self._read(descriptor)

    def _read(self, descriptor: int) -> None:
        data = os.read(descriptor, 1 << 16)
        if not data:
            self._poll.unregister(descriptor)
            del self._open[descriptor]
            return
        try:
            self._open[descriptor].take(data)
        except OSError as exc:
            self._error = f"its output cannot be kept: {exc.strerror}"
            for stream in self.streams:
                stream.drop()


def _not_started(spec: Spec, start: float, error: OSError | ValueError) -> Ended:
    """Return what a shell would say."""
    what, why = getattr(error, "filename", None), getattr(error, "strerror", None)
    status: dict[type, int] = {FileNotFoundError: 127, PermissionError: 126}
    text = f"{what if isinstance(what, str) else spec.argv[0]}: {why or error}"
    stdout, stderr = (Stream(spec.name, level, spec.keep) for level in spec.levels)
    stderr.take(f"{text}\n".encode("utf-8", "surrogateescape"))
    return Ended(
        start=start,
        stdout=stdout.end(),
        stderr=stderr.end(),
        status=status.get(type(error)),
        error=text,
    )
