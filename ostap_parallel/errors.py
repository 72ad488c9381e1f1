"""Every error that this package raises on purpose.

All of them pickle: an error may travel from a worker, through a server, to the caller.
"""

from __future__ import annotations

import functools
import pickle
import sys
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool

# The cause of a task's exception: the traceback as text, with host and item.
from multiprocessing.pool import RemoteTraceback as RemoteTraceback  # type: ignore[attr-defined]
from typing import Any

# Chapters of the manual that messages name, for `ostap-parallel help`; tests/test_manual.py sees
# that they are there.
CHAPTERS = {
    "changed": "checkpoints.md#when-something-has-changed",
    "configured": "hosts.md#the-configured-list",
    "damaged": "checkpoints.md#when-the-file-is-damaged",
    "existing": "hosts.md#servers-that-run-already",
    "steps": "troubleshooting.md#steps-of-a-host",
    "keys": "configuration.md#keys",
    "large": "how-do-i.md#give-all-items-a-table-of-500-mb",
    "long": "errors.md#time-limits",
    "modules": "hosts.md#your-own-modules",
    "random": "manager.md#random-numbers",
    "safe": "configuration.md#safety",
    "unsent": "troubleshooting.md#what-cannot-be-sent",
    "wrong": "errors.md#a-host-that-is-wrong",
}


def see(chapter: str) -> str:
    """Return the end of a message that tells where the manual has more, by a key of `CHAPTERS`."""
    assert chapter in CHAPTERS
    return f" (more: ostap-parallel help {chapter})"


class OstapParallelError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(OstapParallelError, ValueError):
    """A setting is missing or malformed; the text names where it was read and what to do."""


class HostError(OstapParallelError, ConnectionError):
    """A host, its tunnel or its server is out of reach.

    Attributes
    ----------
    host
        The host as the user named it.
    step
        What was being done: ``connect``, ``tmpdir``, ``copy``, ``profile``, ``environment``,
        ``script``, ``python``, ``requires``, ``server``, ``tunnel``, ``start`` (all of it),
        ``shared`` or ``run``.
    reason
        The last words of ssh, of the script or of the server.
    """

    def __init__(self, host: str, step: str, reason: str) -> None:
        super().__init__(host, step, reason)  # all arguments, or it would not unpickle
        self.host, self.step, self.reason = host, step, reason

    def __str__(self) -> str:
        return f"{self.host}: {self.step}: {self.reason}"


class ServersUnavailable(OstapParallelError, ConnectionError, BrokenExecutor):
    """No host could be had and there are no local workers; one line per host.

    Attributes
    ----------
    errors
        One `HostError` per host, in the order of the server list.
    """

    def __init__(self, errors: tuple[HostError, ...]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        if not self.errors:
            text = "there is no local worker, and no server is configured: nothing can run"
            return text + see("configured")
        lines = ["no server is left and ncpus=0:", *(f"  {e}" for e in self.errors)]
        return "\n".join(lines) + see("steps")


class SerializeError(OstapParallelError, pickle.PicklingError):
    """A function, an item or a result cannot be sent to another process.

    Attributes
    ----------
    what
        Which object, e.g. ``"the function <lambda>"`` or ``"the result of item 7 (a generator)"``.
    reason
        What the serialiser said.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what, self.reason = what, reason

    def __str__(self) -> str:
        return f"{self.what} cannot be sent between processes: {self.reason}{see('unsent')}"

    @classmethod
    def of(cls, what: str, reason: str, cause: type[BaseException]) -> SerializeError:
        """Return one that is also of the built-in class of its cause, if that can be.

        The originals of pools and executors raise what pickle, or the object, has raised.
        """
        for kind in cause.__mro__:
            if kind in _ALSO:
                return _both(kind)(what, reason)
        return cls(what, reason)


# Of what pickle, and objects that are asked what they are made of, raise.
_ALSO = frozenset(
    {
        *(TypeError, AttributeError, ValueError, AssertionError),
        *(KeyError, IndexError, LookupError, NotImplementedError, RuntimeError),
    }
)


@functools.cache
def _both(kind: type[Exception]) -> type[SerializeError]:
    def reduce(self: SerializeError) -> tuple[Any, ...]:
        return SerializeError.of, (self.what, self.reason, kind), vars(self)

    names = {"__reduce__": reduce, "__module__": __name__}
    return type("SerializeError", (SerializeError, kind), names)


class ByteCodeError(SerializeError):
    """A function has come as byte code of another version of Python than this one."""


class DeclarationError(OstapParallelError):
    """C++ cannot be declared, here or on a worker.

    Attributes
    ----------
    what
        The file, the library, or the first line of the code.
    reason
        What ROOT or the system said, and what to do.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what, self.reason = what, reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class WorkerLost(OstapParallelError, BrokenProcessPool):
    """A worker or its host was lost before the result arrived, as often as was allowed.

    Attributes
    ----------
    item
        Index of the item that it was running, counted from 0.
    host
        Where it ran.
    reason
        How it ended, e.g. ``"worker 4711 was killed by SIGSEGV"``.
    """

    def __init__(self, item: int, host: str, reason: str) -> None:
        super().__init__(item, host, reason)
        self.item, self.host, self.reason = item, host, reason

    def __str__(self) -> str:
        return f"item {self.item} on {self.host}: {self.reason}"


class StartError(OstapParallelError, OSError, RuntimeError):
    """Local workers cannot be started: a limit of the system is too low, for example.

    Attributes
    ----------
    reason
        What the system has said, and the limit that it is about.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"local workers cannot be started: {self.reason}"


class InitializerError(OstapParallelError, BrokenProcessPool):
    """The initializer of an executor has raised in a worker: no job can run there.

    Attributes
    ----------
    reason
        What it raised.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the initializer raised {self.reason}"


class TaskTimeout(OstapParallelError, TimeoutError):
    """An item took longer than it may.

    Attributes
    ----------
    item
        Index of the item, counted from 0.
    host
        Where it ran.
    seconds
        What it was allowed.
    """

    def __init__(self, item: int, host: str, seconds: float) -> None:
        super().__init__(item, host, seconds)
        self.item, self.host, self.seconds = item, host, seconds

    def __str__(self) -> str:
        return f"item {self.item} on {self.host}: not done after {self.seconds:g} s"


class CommandFailed(OstapParallelError):
    """A command has not ended well.

    Attributes
    ----------
    command
        Its text.
    host
        Where it ran.
    reason
        How it has failed, e.g. ``"exit status 2"``.
    lines
        The last lines that it printed, of standard error if there are any.
    """

    def __init__(self, command: str, host: str, reason: str, lines: str = "") -> None:
        super().__init__(command, host, reason, lines)
        self.command, self.host, self.reason, self.lines = command, host, reason, lines

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        return f"{self.command}{where}: {self.reason}\n{self.lines}".rstrip()


class SchedulerUnavailable(OstapParallelError, ConnectionError):
    """A batch system did not answer, or could not do now what it was asked to do.

    Attributes
    ----------
    command
        What was run.
    reason
        Its words.
    """

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(command, reason)
        self.command, self.reason = command, reason

    def __str__(self) -> str:
        return f"{self.command}: {self.reason}"


class QueueFull(SchedulerUnavailable):
    """A batch system takes no more jobs for now."""


class JobRefused(OstapParallelError):
    """A batch system will never run a job as it is asked for.

    Attributes
    ----------
    command
        What was run, or the job.
    reason
        The scheduler's words.
    """

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(command, reason)
        self.command, self.reason = command, reason

    def __str__(self) -> str:
        return f"{self.command}: {self.reason}"


class CheckpointError(OstapParallelError):
    """A checkpoint cannot be used, or belongs to another function or to other items.

    Attributes
    ----------
    path
        The file.
    reason
        What is wrong, and what to do.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"checkpoint {self.path}: {self.reason}"


class RemoteError(OstapParallelError):
    """A task raised an exception that could not be sent back as itself.

    Attributes
    ----------
    name
        Qualified name of the exception's class.
    message
        Its text.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(name, message)
        self.name, self.message = name, message

    def __str__(self) -> str:
        return f"{self.name}: {self.message}" if self.message else self.name


def last_words(error: BaseException, count: int = 10) -> list[str]:
    """Return the last lines that a failed command wrote, where `subprocess` has captured them."""
    if hasattr(error, "cmd"):
        for written in getattr(error, "stderr", None), getattr(error, "output", None):
            text = written.decode(errors="backslashreplace") if type(written) is bytes else written
            if isinstance(text, str) and text.strip():
                return text.rstrip().splitlines()[-count:]
    return []


def add_note(error: BaseException, note: str) -> None:
    """Have the traceback of an error end with a note, or show it above where Python has none."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif not isinstance(error.__cause__, RemoteTraceback):  # which tells the item already
        cause = RemoteTraceback(f"\n{note}")
        cause.__cause__, error.__cause__ = error.__cause__, cause
