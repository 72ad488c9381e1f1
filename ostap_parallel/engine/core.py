"""The caller's side of the engine: a queue, local workers, and links to those of hosts."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from ostap_parallel import libraries
from ostap_parallel.engine.greetings import Greetings
from ostap_parallel.engine.link import Link, connect
from ostap_parallel.engine.nesting import Nesting
from ostap_parallel.errors import HostError, StartError
from ostap_parallel.machine.cpus import usable_cpus
from ostap_parallel.machine.crew import Crew
from ostap_parallel.machine.endpoint import Endpoint
from ostap_parallel.machine.handle import Handle
from ostap_parallel.machine.jobs import Job, Queue, deferring_interrupts
from ostap_parallel.machine.loop import Loop
from ostap_parallel.machine.output import OutputReader
from ostap_parallel.supply.source import Leave
from ostap_parallel.supply.supervisor import EventHandler, Supervisor
from ostap_parallel.worker.shared import Store

LOCAL = "local"

SHUT_DOWN = "the executor has been shut down"
AT_EXIT = "cannot schedule new futures after interpreter shutdown"


def check_open(closed: threading.Event, finalizer: Any) -> None:
    """Raise RuntimeError if an engine has been closed, or ended with the program."""
    if closed.is_set() or not finalizer.alive:
        raise RuntimeError(SHUT_DOWN if threading.main_thread().is_alive() else AT_EXIT)


def let_daemons_go() -> None:
    """If the program ends, have its daemon threads end silently: what they wait for fails now.

    The interpreter ends them in a moment, without a word, wherever they are.
    """
    if threading.main_thread().is_alive():
        return
    before = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:
        if args.thread is None or not args.thread.daemon:
            before(args)

    threading.excepthook = tell


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Have what the system refuses in the block tell of the limit that it is about."""
    try:
        yield
    except StartError:
        raise
    except (OSError, RuntimeError) as exc:
        reason = str(exc)
        if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            reason += f"; it may have {limit} files open, and each worker takes ten (ulimit -n)"
        elif isinstance(exc, RuntimeError) or exc.errno == errno.EAGAIN:
            limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            if limit != resource.RLIM_INFINITY:
                reason += f"; its user may have {limit} processes and threads (ulimit -u)"
        raise StartError(reason) from exc


class Core:
    """Does jobs on local workers and on those of hosts, which come and go.

    Parameters
    ----------
    ncpus
        Local workers; ``"autodetect"``: as many as affinity and control groups grant.
    on_event
        Receives what local workers print and log.
    greetings
        The first jobs of local workers.

    Attributes
    ----------
    on_lost, on_useless
        Called, from a thread, when the connection to a host has broken, or when the host cannot
        take what its jobs need.
    explanation
        Called then with its label; returns what finds out why, see `supply.source.Server`.
    """

    def __init__(
        self,
        ncpus: int | str,
        on_event: EventHandler,
        *,
        tasks_per_worker: int | None = None,
        preload: Collection[str] = (),
        fresh: bool = False,
        greetings: Greetings | None = None,
    ) -> None:
        self.on_lost: Callable[[HostError], object] = lambda error: None
        self.on_useless: Callable[[HostError], object] = lambda error: None
        self.explanation: Callable[[str], Callable[[], str] | None] = lambda label: None
        self._pid = os.getpid()
        self._last_work = time.monotonic()
        self._is_empty = self.is_closed = False
        self._limits: dict[str, int] = {}  # jobs at once, by label
        self._libraries = libraries.present().keys()  # when workers started
        with starting(), contextlib.ExitStack() as undoing:
            self.store = Store()
            self.loop = Loop("engine")
            undoing.callback(self.loop.stop)
            self.queue = Queue(self.loop)
            self.nesting = Nesting(self.queue, self.loop)
            self.queue.on_end = self.nesting.close
            self._output = OutputReader(lambda event: on_event(LOCAL, event))
            undoing.callback(self._output.close)
            self._crew = Crew(
                LOCAL,
                self.queue,
                self.loop,
                self._output,
                on_empty=self._notice_empty,
                tasks_per_worker=tasks_per_worker,
                preload=preload,
                fresh=fresh,
                greeting=partial(greetings.make, self.nesting.ask) if greetings else None,
            )
            self.queue.machines.append(self._crew)
            undoing.pop_all()
        try:
            self.set_ncpus(ncpus)
        except BaseException:
            self.close()
            raise

    @property
    def ncpus(self) -> int:
        """Number of local workers."""
        return self._crew.count()

    def set_ncpus(self, ncpus: int | str = "autodetect") -> None:
        """Have this many local workers; raises `StartError` if that is impossible."""
        wanted = usable_cpus() if ncpus == "autodetect" else int(ncpus)
        self._check_process()
        if wanted < 0:
            raise ValueError(f"ncpus must be 'autodetect' or an integer from 0 on, not {ncpus!r}")
        with starting():
            self._crew.resize(wanted)
        self._is_empty = False

    def look(self) -> None:
        """Have local workers know what libraries this process has imported since they started."""
        if self._libraries != (now := libraries.present().keys()):
            self._libraries = now
            self._crew.look()

    def processes(self) -> list[Handle]:
        """Return the processes of the local workers."""
        self._check_process()
        return self._crew.processes()

    def attach(
        self, label: str, endpoint: Endpoint, limit: int | None = None, is_shared: bool = False
    ) -> int:
        """Connect to a server; return the number of its workers.

        One that is shared may have other clients, whose jobs its workers do, too.
        Raises `HostError` if it does not answer, has another version or another secret.
        """
        connected = connect(label, endpoint)
        with self.loop.lock:
            if self.is_closed:
                connected[0].close()
                raise HostError(label, "server", "closed while it was starting")
            link = Link(
                label,
                self.queue,
                self.loop,
                connected,
                limit=limit,
                is_shared=is_shared,
                on_lost=lambda error: self.on_lost(error),
                on_useless=lambda error: self.on_useless(error),
                explanation=lambda: self.explanation(label),
            )
            link.limit = self._limits.get(label)
            self.queue.machines.append(link)
            self.queue.dispatch()
            return link.count()

    def limited(self, workers: dict[str, int]) -> dict[str, int]:
        """Return how many workers of each machine are used, of so many."""
        return {label: min(n, self._limits.get(label, n)) for label, n in workers.items()}

    def limit(self, label: str, count: int | None) -> None:
        """Have a machine do so many jobs at once at most; ``None``: one for each worker."""
        with deferring_interrupts(), self.loop.lock:
            self._limits.pop(label, None)
            if count is not None:
                self._limits[label] = count
            for machine in self.queue.machines:
                if machine.label == label:
                    machine.limit = count
            self.queue.dispatch()

    def detach(self, label: str) -> None:
        """Close the connection to a host; the jobs that it had end as `Lost`."""
        with deferring_interrupts(), self.loop.lock:
            for link in self.links():
                if link.label == label:
                    self.queue.machines.remove(link)
                    link.close(f"{label} was given up")

    def answer_to(self, supervisor: Supervisor) -> None:
        """Have a supervisor look after what becomes of hosts."""
        self.on_lost = supervisor.connection_lost
        self.on_useless = supervisor.give_up
        self.explanation = supervisor.explanation

    def retire(self, label: str, leave: Leave) -> None:
        """Give a host no more jobs, and let it go once it has done those that it has.

        What is not done in time is lost. Another server of that name may come meanwhile.
        """
        with self.loop.lock:
            links = [link for link in self.links() if link.label == label]
            for link in links:
                link.limit = 0
        for link in links:
            while link.running and link in self.queue.machines and time.monotonic() < leave.until:
                time.sleep(0.02)
            with self.loop.lock:
                if link not in self.queue.machines:
                    continue
                self.queue.machines.remove(link)
                early = link.since + 0.1 * (time.monotonic() - link.since)
                link.channel.close()  # what the server says of its end is not why
            reason = (link.running and leave.explain()) or leave.reason
            with self.loop.lock:
                link.close(reason, early if leave.blame else 0.0)

    def longest(self, label: str) -> float:
        """Return the seconds that the longest job of a host has taken so far."""
        now = time.monotonic()
        with self.loop.lock:
            links = [link for link in self.links() if link.label == label]
            running = [now - job.begun for link in links for job in link.running.values()]
            return max([*(link.longest for link in links), *running], default=0.0)

    def idle(self, label: str) -> float:
        """Return for how long a host has had nothing to do."""
        with self.loop.lock:
            links = [link for link in self.links() if link.label == label]
            if not links or any(link.running for link in links):
                return 0.0
            return time.monotonic() - max(link.worked for link in links)

    def is_short(self) -> bool:
        """Return whether jobs wait for workers."""
        with self.loop.lock:
            return bool(self.queue)

    def links(self) -> list[Link]:
        """Return the links to hosts."""
        return [machine for machine in self.queue.machines if isinstance(machine, Link)]

    def round_trip(self) -> float:
        """Return the seconds that a message to the farthest host and its answer take."""
        return max((link.round_trip for link in self.links()), default=0.0)

    def add(self, job: Job) -> None:
        """Queue a job; raises RuntimeError after `close`, and in a fork."""
        self._check_process()
        self._last_work = time.monotonic()
        self.queue.add(job)
        if self._is_empty and len(self.queue.machines) == 1:
            self.give_up_waiting("no worker is left")

    def set_constant(self, name: str, packed: bytes) -> None:
        """Give all tasks a serialised value by a name; raises TypeError if it has one."""
        self._check_process()
        self.nesting.set_constant(name, packed)

    def is_of_fork(self) -> bool:
        """Return whether this is a fork: it has none of the threads, and locks held for ever."""
        return self._pid != os.getpid()

    def _check_process(self) -> None:
        if self.is_of_fork():
            raise RuntimeError("workers serve the process that started them, not its forks")

    def interrupt(self, jobs: Collection[Job] | None = None, grace: float = 2.0) -> None:
        """Give up jobs, all by default, here and on hosts."""
        self.queue.interrupt(jobs, grace)
        self.nesting.wake()

    def give_up_waiting(self, reason: str) -> None:
        """Give up the jobs that no worker has begun."""
        with deferring_interrupts(), self.loop.lock:
            self.queue.give_up_waiting(reason)

    def hand_on_output(self) -> None:
        """Show what local workers have printed so far."""
        self._output.hand_on()

    def is_inside(self) -> bool:
        """Return whether this is a thread that ends with the engine."""
        return self.loop.is_inside() or self._output.is_inside()

    def is_idle(self) -> bool:
        """Return whether there is nothing to do."""
        with self.loop.lock:
            return not self.queue and not any(self.queue.running())

    def seconds_idle(self) -> float:
        """Return for how long there has been nothing to do."""
        if not self.is_idle():
            self._last_work = time.monotonic()
        return time.monotonic() - self._last_work

    def _notice_empty(self) -> None:
        self._is_empty = True
        if not self.links():
            self.give_up_waiting("no worker is left")

    def close(self) -> None:
        """End all workers, close all links and give up all jobs."""
        if self._pid != os.getpid() or self.is_closed:
            return
        with self.loop.lock:
            self.is_closed = self.queue.is_closed = True
            self.queue.give_up_waiting("the server was closed")
            for link in self.links():
                self.queue.machines.remove(link)
                link.close("the server was closed")
            self._crew.close()
            self.nesting.wake()
        with contextlib.suppress(OSError):
            self._output.close()
        self.store.clear()
        self.loop.stop()
