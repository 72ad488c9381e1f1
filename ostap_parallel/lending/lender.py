"""What ``multiprocessing`` shares by inheritance, for workers that inherit nothing.

A forked child has the locks, queues, pipes and pieces of memory of its parent. Workers here are
not the caller's children; those on its machine *borrow* them. What has a descriptor is handed
over. Semaphores have none, and those of the fork context no name either: they stay at the caller,
where a thread for each thread of a worker gets and releases them, see `borrower`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import math
import os
import secrets
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from multiprocessing import reduction
from typing import Any

from ostap_parallel.lending.borrower import (
    KEPT,
    Borrowed,
    Loan,
    borrow,
    borrow_queue,
    reopen,
    uid_of,
    wake,
)

logger = logging.getLogger(__name__)

# Seconds after which a thread that waits on behalf of a worker looks whether that still does.
LOOK = 0.2
# Seconds that workers have for sending what they have put into queues.
PATIENCE = 10.0

_CLOSED = errno.EBADF, errno.EINVAL  # what `accept` says then

_lender: ContextVar[Lender | None] = ContextVar("lender", default=None)


class Lending:
    """The block of `Lender.lending`; each call goes through one."""

    __slots__ = ("_lender", "_mark")

    def __init__(self, lender: Lender) -> None:
        self._lender = lender

    def __enter__(self) -> None:
        self._mark = _lender.set(self._lender)

    def __exit__(self, *error: object) -> None:
        _lender.reset(self._mark)


class Lender:
    """Lends to workers on this machine what is pickled while it is `lending`, until `close`.

    To ``multiprocessing`` it is the process that is being started.
    """

    def __init__(self) -> None:
        self._name = ""
        self._things: list[Any] = []
        self._loans: dict[Any, Loan] = {}
        self._links: set[Any] = set()
        self._watchers: set[Any] = set()  # of these, those that have queues
        self._changed = threading.Condition()
        self._opened = contextlib.ExitStack()
        weakref.finalize(self, _close, os.getpid(), self._opened)

    def lending(self) -> Lending:
        """Have what is pickled in the block be lent."""
        return Lending(self)

    def lend(self, key: Any, make: Callable[[], Any]) -> Loan:
        """Return the loan of a key; what is lent is made for the first."""
        with self._changed:
            if key not in self._loans:
                self._open()
                self._things.append(make())
                self._loans[key] = Loan(self._name, len(self._things) - 1)
            return self._loans[key]

    def duplicate_for_child(self, descriptor: int) -> int:
        """Return what `DupFd` takes."""
        return descriptor

    def DupFd(self, descriptor: int) -> Loan:
        """Lend a descriptor, whatever becomes of it here."""
        about, flags = os.fstat(descriptor), fcntl.fcntl(descriptor, fcntl.F_GETFL)
        key = about.st_dev, about.st_ino, flags & os.O_ACCMODE
        return self.lend(key, lambda: self._dup(descriptor))

    def _dup(self, descriptor: int) -> int:
        copy = os.dup(descriptor)
        self._opened.callback(os.close, copy)
        return copy

    def _open(self) -> None:
        if self._name:
            return
        server = self._opened.enter_context(socket.socket(socket.AF_UNIX))
        server.settimeout(None)  # whatever the script has as usual
        name = f"ostap-parallel-lends-{os.getpid()}-{secrets.token_hex(8)}"
        server.bind(f"\0{name}")
        server.listen(128)
        _in_thread(_accept, weakref.ref(self), server)
        self._opened.callback(wake, server)
        self._name = name

    def serve(self, link: Any) -> None:
        """Answer a thread of a worker."""
        last, is_granted = -1, False
        with self._changed:
            if not self._name:  # closed just now
                link.close()
                return
            self._links.add(link)
        try:
            while True:
                number, question, verb, *args = json.loads(link.recv_bytes())
                thing = self._things[number]
                if verb == "undo":
                    if is_granted and question == last:
                        thing.release()
                    return
                if question != last:
                    last, is_granted = question, self._answer(link, thing, verb, args)
        except (OSError, EOFError, IndexError):  # it has gone, or all was taken back
            pass
        finally:
            with self._changed:
                self._links.discard(link)
                self._watchers.discard(link)
                self._changed.notify_all()
                link.close()

    def _answer(self, link: Any, thing: Any, verb: str, args: list[Any]) -> bool:
        """Do what a worker asks for; return whether that has acquired something."""
        value: int | None = None
        error: str | None = None
        match verb:
            case "take":
                reduction.send_handle(link, thing, 0)
                return False
            case "watch":
                with self._changed:
                    self._watchers.add(link)
            case "acquire":
                return _acquire(link, thing, *args)
            case "value":
                value = _value_of(thing)
            case "release":
                try:
                    thing.release()
                except ValueError as exc:
                    error = str(exc)
        link.send_bytes(json.dumps([value, error]).encode())
        return False

    def close(self) -> None:
        """Take all back, once workers have sent what they have put into queues."""
        with self._changed:
            for link in self._watchers:
                with contextlib.suppress(OSError):
                    link.send_bytes(b"end")
            self._changed.wait_for(lambda: not self._watchers, PATIENCE)
            for link in self._links:
                client = socket.socket(fileno=link.fileno())
                wake(client)
                client.detach()  # who serves it closes it
            self._opened.close()
            self._things.clear()
            self._loans.clear()
            self._name = ""


def _in_thread(function: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=function, args=args, name="lends", daemon=True).start()


def _accept(lends: weakref.ref[Lender], server: socket.socket) -> None:
    from multiprocessing.connection import Connection  # only where there is something to lend

    is_told = False
    while True:
        try:
            client, _ = server.accept()
            with client:
                if uid_of(client) == os.getuid() and (lender := lends()) is not None:
                    client.settimeout(None)
                    link = Connection(client.detach())
                    try:
                        _in_thread(lender.serve, link)
                    except RuntimeError:
                        link.close()
                        raise
                    finally:
                        del lender  # or it would never be forgotten
        except (OSError, RuntimeError) as exc:
            if isinstance(exc, OSError) and exc.errno in _CLOSED:
                return
            if not is_told:
                text = "a worker has to wait for a lock or the like: %s; see ulimit -n and -u"
                logger.warning(text, exc)
            is_told = True
            time.sleep(LOOK)  # who asks is still there when there is room again


def _close(pid: int, opened: contextlib.ExitStack) -> None:
    if os.getpid() == pid:  # to wake a fork's would end the other process's, too
        opened.close()


def _acquire(link: Any, semaphore: Any, block: bool, timeout: float | None) -> bool:
    """Get a semaphore for whoever has asked, as long as that waits for it."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        left = max(0.0, end - time.monotonic())
        is_got: bool = semaphore.acquire(block, min(left, LOOK))
        if link.poll():  # who waits says nothing: it has gone
            if is_got:
                semaphore.release()
            raise EOFError
        if is_got:
            return _hand_over(link, semaphore)
        if not block or left <= LOOK:
            link.send_bytes(json.dumps([False, None]).encode())
            return False


def _hand_over(link: Any, semaphore: Any) -> bool:
    """Tell who has asked that it has a semaphore; release it if that does not arrive."""
    is_kept = False
    try:
        link.send_bytes(json.dumps([True, None]).encode())
        is_kept = bool(link.recv_bytes() == KEPT)
    finally:
        if not is_kept:
            semaphore.release()
    return is_kept


def _value_of(semaphore: Any) -> int:
    if hasattr(semaphore, "get_value"):
        return int(semaphore.get_value())
    if is_free := semaphore.acquire(False):
        semaphore.release()
    return int(is_free)


# How they are reduced. Whoever has such objects has loaded the modules that they are of.

# `multiprocess` is the fork of `multiprocessing` that pathos uses: its objects are alike.
_PACKAGES = "multiprocessing", "multiprocess"
_INHERITED = {
    f"{package}.{name}": package
    for package in _PACKAGES
    for name in ("connection", "heap", "queues", "sharedctypes", "synchronize")
}

Way = Callable[[Any, Any], Any]


def way_of(kind: type) -> Way | None:
    """Return how objects of a type are reduced that children inherit; ``None`` for others."""
    if _is(kind, "managers", "BaseProxy", _PACKAGES[1:]):
        return _proxy
    if not any(base.__module__ in _INHERITED for base in kind.__mro__):
        return _inherited if issubclass(kind, socket.socket) else None
    if _is(kind, "synchronize", "SemLock"):
        return _semaphore
    return _queue if _is(kind, "queues", "Queue") else _inherited


def _is(kind: type, room: str, name: str, packages: Sequence[str] = _PACKAGES) -> bool:
    modules = (sys.modules.get(f"{package}.{room}") for package in packages)
    return any(issubclass(kind, getattr(module, name)) for module in modules if module)


def _module_for(obj: Any, name: str) -> Any:
    """Return a module of the package that an object, or its piece of shared memory, is of."""
    kind = type(getattr(obj, "_wrapper", obj))
    packages = (_INHERITED.get(base.__module__) for base in kind.__mro__)
    return sys.modules[f"{next(filter(None, packages), _PACKAGES[0])}.{name}"]


@contextlib.contextmanager
def _starting(obj: Any) -> Iterator[Any]:
    """Have ``multiprocessing`` reduce an object as for a child that is being started."""
    lender: Any = _lender.get()
    context = _module_for(obj, "context")
    if lender is None:
        context.assert_spawning(obj)
    with _told_of(context, lender):
        yield lender


@contextlib.contextmanager
def _told_of(context: Any, popen: Any) -> Iterator[None]:
    before = context.get_spawning_popen()
    context.set_spawning_popen(popen)
    try:
        yield
    finally:
        context.set_spawning_popen(before)


def _proxy(pickler: Any, proxy: Any) -> Any:
    """Reduce what a manager has, with the key that workers have of `multiprocessing` only."""
    with _told_of(sys.modules["multiprocess.context"], proxy):
        rebuild, (make, token, serializer, known) = proxy.__reduce__()
    if "authkey" in known:
        known["authkey"] = bytes(known["authkey"])
    return rebuild, (make, token, serializer, known)


def _inherited(pickler: Any, obj: Any) -> Any:
    with _starting(obj):
        forking = _module_for(obj, "reduction").ForkingPickler(io.BytesIO())
        reducer = forking.dispatch_table.get(type(obj))
        return obj.__reduce_ex__(5) if reducer is None else reducer(obj)


def shared_memory(pickler: Any, obj: Any) -> Any:
    """Reduce an object of ctypes, which may be one of ``multiprocessing.sharedctypes``."""
    if not hasattr(obj, "_wrapper"):
        return NotImplemented
    return _inherited(pickler, obj)


def _semaphore(pickler: Any, semaphore: Any) -> Any:
    kind = type(semaphore)
    is_recursive = _is(kind, "synchronize", "RLock")
    with _starting(semaphore) as lender:
        inner = vars(semaphore).get("_semlock")
        if isinstance(inner, Borrowed):
            return borrow, (kind, inner.loan, is_recursive)
        try:
            state = semaphore.__getstate__()
        except RuntimeError:  # of the fork context
            state = ()
    loan = lender.lend(id(semaphore), lambda: semaphore)  # which this keeps alive
    if state and state[-1] is not None:
        return reopen, (kind, state)
    return borrow, (kind, loan, is_recursive)


def _queue(pickler: Any, queue: Any) -> Any:
    with _starting(queue) as lender:
        state = queue.__getstate__()
    return borrow_queue, (type(queue), state, lender.lend(id(queue), lambda: queue))
