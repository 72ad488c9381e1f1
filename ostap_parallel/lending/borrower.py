"""What a worker has of ``multiprocessing``'s objects that belong to the caller, see `lender`.

They are of the same classes as there, and made of the same things: pipes and pieces of memory are
the caller's own, by their descriptors; a semaphore without a name is asked for at the caller.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass
from multiprocessing import reduction, util
from typing import Any
from weakref import WeakSet

_CREDENTIALS = struct.Struct("=3i")  # pid, uid, gid

_numbers = itertools.count()  # of questions


class Here:
    """Whether this process is on the caller's machine."""

    is_near = True


def check_near(what: str) -> None:
    """Raise RuntimeError on another machine."""
    if not Here.is_near:
        raise RuntimeError(
            f"a multiprocessing {what} is there for workers on the machine of the program only, "
            "not on this host: one of a multiprocessing.Manager() that hosts can reach can be sent"
        )


# Says that what was acquired has arrived: otherwise it is released if the link ends.
KEPT = b"kept"


def wake(connection: socket.socket) -> None:
    """Wake who waits at a socket: closing alone does not."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def uid_of(connection: socket.socket) -> int:
    """Return the user at the other end of a connection."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1])


@dataclass(frozen=True)
class Loan:
    """What a process lends: the name of its socket, and the number there."""

    name: str
    number: int

    def ask(self, verb: str, *args: Any) -> Any:
        """Return the answer to a question, which is about this thread's share in it.

        Where Ctrl-C, or the time limit of an item, comes in between, nothing was acquired, and
        what was to be released is.
        """
        number = next(_numbers)
        message = json.dumps([self.number, number, verb, *args]).encode()
        try:
            link = self._link()
            link.send_bytes(message)
            answer, error = json.loads(link.recv_bytes())
            if verb == "acquire" and answer:
                link.send_bytes(KEPT)
            if error is None:
                return answer
        except (OSError, EOFError) as exc:
            self._hang_up()
            raise RuntimeError("the pool that this belongs to has ended") from exc
        except BaseException:  # nobody knows how far it has come: what is sent twice counts once
            with contextlib.suppress(OSError):
                undo = json.dumps([self.number, number, "undo"]).encode()
                self._link().send_bytes(undo if verb == "acquire" else message)
            self._hang_up()
            raise
        raise ValueError(error)

    def detach(self) -> int:
        """Return a descriptor of one's own."""
        check_near("pipe or piece of shared memory")
        with self.connect() as link:
            link.send_bytes(json.dumps([self.number, next(_numbers), "take"]).encode())
            return int(reduction.recv_handle(link))

    def connect(self) -> Any:
        """Return a connection to whom this belongs."""
        from multiprocessing.connection import Connection

        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(None)  # whatever the script has as usual
            client.connect(f"\0{self.name}")
            if uid_of(client) != os.getuid():  # who takes the name when its owner has gone
                raise ConnectionRefusedError(f"{self.name} is another user's")
            return Connection(client.detach())

    def _link(self) -> Any:
        """Return this thread's connection for this; a fork has others."""
        key = os.getpid(), self
        if key not in _links.of:
            _links.of[key] = self.connect()
        return _links.of[key]

    def _hang_up(self) -> None:
        if (link := _links.of.pop((os.getpid(), self), None)) is not None:
            link.close()


class _Links(threading.local):
    def __init__(self) -> None:
        self.of: dict[tuple[int, Loan], Any] = {}


_links = _Links()


class Borrowed:
    """A semaphore at the caller, as the classes of ``multiprocessing.synchronize`` use theirs."""

    maxvalue = "unknown"

    def __init__(self, loan: Loan, is_recursive: bool) -> None:
        self.loan = loan
        self._is_recursive = is_recursive
        self._held = 0
        self._owner = 0  # the thread that was the last to get it
        util.register_after_fork(self, Borrowed._begin_anew)

    def _begin_anew(self) -> None:
        self._held = 0  # the parent has it

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Get it, as a thread of the caller would."""
        if not (self._is_recursive and self._is_mine()):
            if not self.loan.ask("acquire", block, timeout):
                return False
            self._owner = threading.get_ident()
        self._held += 1
        return True

    def release(self) -> None:
        """Give it back."""
        if self._is_recursive and not self._is_mine():
            raise AssertionError("attempt to release recursive lock not owned by thread")
        if not self._is_recursive or self._held == 1:
            try:
                self.loan.ask("release")
            except ValueError:  # it was not to be released
                raise
            except BaseException:
                self._held -= 1
                raise
        self._held -= 1

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def _is_mine(self) -> bool:
        return self._held > 0 and self._owner == threading.get_ident()

    def _count(self) -> int:
        return self._held

    def _get_value(self) -> int:
        return int(self.loan.ask("value"))

    def _is_zero(self) -> bool:
        return self._get_value() == 0


def borrow(cls: Any, loan: Loan, is_recursive: bool) -> Any:
    """Make a lock or semaphore that is the caller's."""
    check_near(cls.__name__)
    made, inner = cls.__new__(cls), Borrowed(loan, is_recursive)
    vars(made).update(_semlock=inner, acquire=inner.acquire, release=inner.release)
    return made


def reopen(cls: Any, state: Any) -> Any:
    """Make a lock or semaphore that has a name on this machine."""
    check_near(cls.__name__)
    made = cls.__new__(cls)
    made.__setstate__(state)
    return made


# Queues send what they are given from a thread: it must not end before.

_queues: WeakSet[Any] = WeakSet()
_flushing = threading.Lock()
_watched: set[tuple[int, str]] = set()  # by processes and who lends


def borrow_queue(cls: Any, state: Any, loan: Loan) -> Any:
    """Make a queue that is the caller's."""
    queue = cls.__new__(cls)
    queue.__setstate__(state)
    _queues.add(queue)
    if (key := (os.getpid(), loan.name)) not in _watched:
        _watched.add(key)
        link = loan.connect()
        link.send_bytes(json.dumps([loan.number, next(_numbers), "watch"]).encode())
        link.recv_bytes()  # from now on the caller waits for this process
        threading.Thread(target=_watch, args=(link,), name="queues", daemon=True).start()
    return queue


def _watch(link: Any) -> None:
    """Send what queues hold when the caller says that this process is about to end."""
    with contextlib.suppress(OSError, EOFError), link:
        link.recv_bytes()
        flush()


def flush() -> None:
    """Wait until all that was put into queues has been sent: no more can be put into them."""
    with _flushing:  # who comes second waits, too
        for queue in list(_queues):
            queue.close()
            queue.join_thread()
