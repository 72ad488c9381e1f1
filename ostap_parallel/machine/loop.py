"""One thread that waits for descriptors and for times, in place of a thread for each of them."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from ostap_parallel.logs import logger_of

logger = logger_of(__name__)

# Seconds of one wait at most: `epoll` counts milliseconds in 32 bits, 24 days.
LONGEST = 86400.0

IN, OUT, END = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR


class Timer:
    """A call that is due at a time, unless it is cancelled before."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action: Callable[[], object] | None = action

    def cancel(self) -> None:
        """Do not call it."""
        self.action = None


class Loop:
    """Calls what waits for descriptors, and for times.

    Handlers and timers are called with `lock` held, one at a time; who touches what they use from
    another thread holds it, too. What may take long, or calls other people's code, goes through
    `deliver`: it is called without the lock, in order.

    Attributes
    ----------
    lock
        Guards all that handlers use. A thread may take it again.
    """

    def __init__(self, name: str) -> None:
        self.lock = threading.RLock()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], object]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._soon: deque[Callable[[], object]] = deque()
        self._deliveries: deque[Callable[[], object]] = deque()
        # sockets, not numbers: who wakes a loop that has ended writes to nothing
        self._woken, self._waker = socket.socketpair()
        for end in self._woken, self._waker:
            end.setblocking(False)
        self._epoll.register(self._woken, IN)
        self._is_stopped = False
        self._wakes_at = float("inf")
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def watch(self, descriptor: int, handler: Callable[[int], object], events: int = IN) -> None:
        """Have `handler` called with the events of a descriptor."""
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def change(self, descriptor: int, events: int) -> None:
        """Wait for other events of a descriptor."""
        self._epoll.modify(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Wait for a descriptor no more; to be called before it is closed."""
        if self._handlers.pop(descriptor, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    def call_later(self, seconds: float, action: Callable[[], object]) -> Timer:
        """Have something called in so many seconds; with the lock held."""
        timer, due = Timer(action), time.monotonic() + seconds
        heapq.heappush(self._timers, (due, next(self._numbers), timer))
        if due < self._wakes_at:
            self._wake()
        return timer

    def call_soon(self, action: Callable[[], object]) -> None:
        """Have something called by the loop, from wherever: it takes no lock."""
        self._soon.append(action)
        self._wake()

    def deliver(self, action: Callable[[], object]) -> None:
        """Have something called without the lock, behind what was delivered before."""
        self._deliveries.append(action)
        if threading.current_thread() is not self._thread:
            self._wake()

    def is_inside(self) -> bool:
        """Return whether this is the thread of the loop."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """End the thread, after what is to be delivered."""
        self._is_stopped = True
        self._wake()
        if not self.is_inside():
            self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is about to wake; or it has ended
            self._waker.send(b".")

    def _run(self) -> None:
        while not self._is_stopped or self._deliveries or self._soon:
            self._wakes_at = self._timers[0][0] if self._timers else float("inf")
            left = self._wakes_at - time.monotonic()
            pending = self._soon or self._deliveries or self._is_stopped
            events = self._epoll.poll(0 if pending else min(max(0.0, left), LONGEST))
            with self.lock:
                self._handle(events)
                self._run_due()
            while self._deliveries:
                _call(self._deliveries.popleft())
        self._epoll.close()
        self._woken.close()
        self._waker.close()

    def _handle(self, events: list[tuple[int, int]]) -> None:
        woken = self._woken.fileno()
        for descriptor, mask in events:
            if descriptor == woken:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            elif handler := self._handlers.get(descriptor):
                try:
                    handler(mask)
                except BaseException:  # see `_call`
                    logger.exception("an error in the engine")
        while self._soon:
            _call(self._soon.popleft())

    def _run_due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, timer = heapq.heappop(self._timers)
            action, timer.action = timer.action, None
            if action is not None:
                _call(action)


def _call(action: Callable[[], object]) -> None:
    try:
        action()
    except BaseException:  # whatever it raises must not end what serves all others
        logger.exception("an error in the engine")
