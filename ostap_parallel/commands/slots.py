"""Which command runs where, and when: hosts, their slots, and the queues in front of them."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ostap_parallel.commands.command import Command, Done
from ostap_parallel.engine.backend import AnyFuture, Backend
from ostap_parallel.engine.names import HERE, Absences, labels_of
from ostap_parallel.engine.retries import Attempts


@dataclass(eq=False)
class Seat:
    """Slots of a host, and the commands that have them, one after another.

    Attributes
    ----------
    number
        The lowest, from 1 on, that no other has.
    """

    label: str
    slots: int
    number: int
    jobs: dict[Job, None] = field(default_factory=dict)

    @property
    def first(self) -> Job | None:
        """The one that runs, as far as is known here; from any thread."""
        return next(iter(list(self.jobs)), None)


@dataclass(eq=False)
class Job:
    """A command on its way.

    Attributes
    ----------
    labels
        The hosts that may run it, as the backend calls them; ``None``: any.
    tries, lost
        How often it has begun, and how often of these it was lost.
    seat
        What it holds, from when it begins.
    begun
        When, by the clock that only goes forward.
    is_overdue
        It has taken too long, and is being ended.
    is_taken_back
        It has not begun on its host, which is lost.
    """

    command: Command
    number: int
    labels: frozenset[str] | None = None
    is_waiting: bool = False
    done: Done = field(init=False)
    attempts: Attempts = field(default_factory=Attempts)
    tries: int = 0
    lost: int = 0
    failed_on: set[str] = field(default_factory=set)
    label: str = ""
    seat: Seat | None = None
    begun: float = 0.0
    is_overdue: bool = False
    is_taken_back: bool = False
    future: AnyFuture | None = None
    _course: Generator[Any, Any, None] | None = None

    def __post_init__(self) -> None:
        self.done = Done(self.command, self.number)

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine."""
        return self.label in HERE

    @property
    def is_plain(self) -> bool:
        """Whether it may go to its host together with others."""
        command = self.command
        is_one = command.cores == 1 and command.transfer is None and command.arguments is None
        return is_one and not self.tries and command.is_light

    def waits_for(self, label: str | None) -> bool:
        """Return whether it waits for a host, or for any."""
        if self.labels is None or label is None:
            return self.is_waiting and self.labels is None and label is None
        return self.is_waiting and label in self.labels

    def begin(self, course: Generator[Any, Any, None]) -> None:
        """Begin with the steps that it takes."""
        self._course, self.begun, self.future = course, time.monotonic(), None
        self.is_overdue = False

    def step(self, value: Any) -> Any:
        """Return the next step, after what came of the last one; StopIteration at the end."""
        assert self._course is not None
        if isinstance(value, BaseException):
            return self._course.throw(value)
        return self._course.send(value)

    def stop(self) -> None:
        """Leave the other steps out."""
        self.future = None
        if self._course is not None:
            self._course.close()


class Load:
    """The slots that are taken on each host, by all that run commands on a backend.

    They are counted for each of these: what one has leaves with it, whatever it has come to.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: dict[object, Counter[str]] = {}
        self.listeners: set[Callable[[], object]] = set()

    def take(self, owner: object, label: str, slots: int, capacity: int) -> bool:
        """Take slots of a host; return whether there were as many."""
        with self._lock:
            if self._count(label) + slots > capacity:
                return False
            self._used.setdefault(owner, Counter())[label] += slots
            return True

    def give(self, owner: object, label: str, slots: int) -> None:
        """Give slots back."""
        with self._lock:
            self._used[owner][label] -= slots
        self._tell(owner)

    def leave(self, owner: object) -> None:
        """Give all back that one has."""
        with self._lock:
            self._used.pop(owner, None)
        self._tell(owner)

    def free(self, label: str, capacity: int) -> int:
        """Return how many are left."""
        with self._lock:
            return capacity - self._count(label)

    def _count(self, label: str) -> int:
        return sum(used[label] for used in self._used.values())

    def _tell(self, owner: object) -> None:
        """Tell all that listen but the one who gives."""
        for listener in list(self.listeners):
            if getattr(listener, "__self__", None) is not owner:
                listener()


_loads: weakref.WeakKeyDictionary[Any, Load] = weakref.WeakKeyDictionary()


def load_of(backend: Backend) -> Load:
    """Return the load of a backend's hosts."""
    return _loads.setdefault(backend, Load())


class Queues:
    """Commands that wait: those for any host, and those that are pinned to some."""

    def __init__(self, backend: Backend, max_per_node: int | None, owner: object) -> None:
        self._backend, self._most, self._owner = backend, max_per_node, owner
        self.load = load_of(backend)
        self._absences = Absences(backend)
        self._any: deque[Job] = deque()
        self._pinned: dict[str, deque[Job]] = {}
        self.waiting = 0
        self.capacities: Mapping[str, int] = {}
        self.look()

    def look(self) -> None:
        """See which hosts are up, and how many slots each has."""
        most = self._most or float("inf")
        workers = self._backend.workers.items()
        self.capacities = {label: int(min(most, n)) for label, n in workers if n}

    @property
    def unpinned(self) -> int:
        """How many wait, at most, that any host may run."""
        return len(self._any)

    def labels(self, names: Iterable[str]) -> frozenset[str]:
        """Return what the backend calls the hosts; names that it does not know stay."""
        return labels_of(names, self._backend)

    def put(self, job: Job, first: bool = False) -> None:
        """Have a command wait, behind all others or in front of them."""
        job.is_waiting = True
        self.waiting += 1
        queues = [self._pinned.setdefault(label, deque()) for label in job.labels or ()]
        for queue in queues if job.labels is not None else [self._any]:
            (queue.appendleft if first else queue.append)(job)

    def next(self, number: int, most: int) -> Seat | None:
        """Take the next command that can begin now, and those that go with it.

        Parameters
        ----------
        number
            Of the seat that they get.
        most
            How many there are at most.
        """
        free = {label: self.load.free(label, n) for label, n in self.capacities.items()}
        while free:
            label = max(free, key=free.__getitem__)
            if free.pop(label) <= 0:
                return None
            job = self._oldest(label)
            if job is None:
                continue
            slots = min(job.command.cores, self.capacities[label])
            if self.load.take(self._owner, label, slots, self.capacities[label]):
                seat = Seat(label, slots, number)
                self._take(job, seat)
                while job.is_plain and len(seat.jobs) < most:
                    job = self._oldest(label)
                    if job is None or not job.is_plain:
                        break
                    self._take(job, seat)
                return seat
        return None

    def drop(self) -> list[Job]:
        """Take all."""
        queues = [self._any, *self._pinned.values()]
        jobs = {job: None for queue in queues for job in queue if job.is_waiting}
        for job in jobs:
            self._leave(job)
        self._any.clear()
        self._pinned.clear()
        return sorted(jobs, key=lambda job: job.number)

    def hopeless(self) -> list[tuple[Job, str]]:
        """Take the commands for which no host can be had, each with the reason."""
        reasons = self._absences.reasons()
        usable = {label for label, reason in reasons.items() if not reason}
        usable |= self._backend.workers.keys()
        found: dict[Job, str] = {}
        for label, queue in list(self._pinned.items()):
            if label not in usable:
                for job in [job for job in queue if job.is_waiting]:
                    assert job.labels is not None
                    if not job.labels & usable:
                        reason = reasons.get(label) or f"{label} is not among the hosts"
                        found[job] = reason
                        self._leave(job)
                del self._pinned[label]
        if not usable:
            text = "\n".join(filter(None, reasons.values())) or "there is no host"
            found |= {job: text for job in self.drop()}
        return list(found.items())

    def _oldest(self, label: str) -> Job | None:
        heads = []
        for queue, where in ((self._any, None), (self._pinned.get(label), label)):
            while queue and not queue[0].waits_for(where):
                queue.popleft()  # it was taken, and may wait elsewhere now
            if queue:
                heads.append(queue[0])
        return min(heads, key=lambda job: job.number, default=None)

    def _take(self, job: Job, seat: Seat) -> None:
        self._leave(job)
        job.label, job.seat = seat.label, seat
        seat.jobs[job] = None

    def _leave(self, job: Job) -> None:
        job.is_waiting = False
        self.waiting -= 1
