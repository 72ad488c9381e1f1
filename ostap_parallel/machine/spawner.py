"""Starting workers through their control."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from ostap_parallel import libraries
from ostap_parallel.logs import logger_of
from ostap_parallel.machine import templates
from ostap_parallel.machine.cpus import thread_limits
from ostap_parallel.machine.local import Worker
from ostap_parallel.machine.loop import Loop
from ostap_parallel.machine.output import OutputReader
from ostap_parallel.worker import control
from ostap_parallel.worker.processes import describe_status, interpreter_options

logger = logger_of(__name__)

# Workers that are being started at once: what is handed to the template is held by the system.
STARTING = 16


class Spawner:
    """Starts workers through a template process, which is started when it is first needed.

    Parameters
    ----------
    preload
        Modules that the template imports.
    fresh
        Have each worker be a new interpreter.
    host
        Begins the names of the workers, if they are not the caller's own.
    sessions
        What the template is to have of libraries, besides what this process has of them.
    """

    def __init__(
        self,
        loop: Loop,
        output: OutputReader,
        preload: Collection[str] = (),
        fresh: bool = False,
        host: str = "",
        sessions: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._loop, self._output, self._host = loop, output, host
        self._preload, self._fresh = list(preload), fresh
        # now, and not in another thread: libraries need not bear several
        self._sessions = {} if fresh else {**libraries.sessions(preload), **sessions}
        self._harmful: set[str] = set()  # libraries that have ended a template
        self._template: templates.Template | None = None
        self._may_wait = False  # for another owner, when this one is done
        self._workers: dict[int, Worker] = {}  # by pid: those that have not ended
        self._starting: dict[int, Worker] = {}  # by number: those that the template was asked for
        self._queue: list[Worker] = []
        self._is_ready = False  # it has imported what it is to, and reads
        self._importing = ""  # the module that it imports

    def start(self, worker: Worker) -> None:
        """Have a worker started; it learns of that. Raises OSError if no template can be."""
        if self._template is None:
            self._start_template()
        self._queue.append(worker)
        self._ask()

    def _start_template(self) -> None:
        wanted = self._sessions.keys() - self._harmful
        sessions = {name: self._sessions[name] for name in wanted}
        self._importing = ""
        self._may_wait = not self._host and templates.may_wait(self._preload, sessions)
        waiting = templates.take(sessions) if self._may_wait else None
        if waiting is None:
            modules = [] if self._fresh else templates.modules_of(self._preload)
            waiting = templates.start(modules, sessions, self._fresh), False
        self._template, self._is_ready = waiting
        for descriptor, kind in zip(self._template.printed, ("stdout", "stderr"), strict=True):
            self._output.add(descriptor, kind, self._template.process.pid)
        self._loop.watch(self._template.control.fileno(), self._hear)

    def look(self) -> bool:
        """Have the template import what libraries this process has imported since; tell if any."""
        new = libraries.present().keys() - self._sessions.keys()
        if not new or self._fresh:
            return False
        self._sessions |= {name: one for name, one in libraries.sessions().items() if name in new}
        template = self._template
        if template is None:
            return False
        template.sessions = dict(self._sessions)
        with contextlib.suppress(OSError):  # it has just ended: the next one imports it
            control.send(template.control, {"prepare": template.sessions})
            self._is_ready = False
            self._may_wait = not self._host and templates.may_wait(self._preload, self._sessions)
        return not self._is_ready

    def _ask(self) -> None:
        """Ask the template for workers, a few at a time."""
        while self._queue and self._is_ready and len(self._starting) < STARTING:
            worker = self._queue.pop(0)
            wanted = {"number": worker.number, "tasks": worker.tasks, **self._news()}
            self._starting[worker.number] = worker
            try:
                assert self._template is not None
                control.send(self._template.control, wanted, worker.theirs)
            except OSError:  # it has just ended, or hangs: either is about to be heard
                self._kill()
                return
            finally:
                worker.close_theirs()
            self._loop.call_later(templates.PATIENCE, partial(self._check, worker))

    def _news(self) -> dict[str, object]:
        """Return what the template has not been told yet of what holds for all workers."""
        now: dict[str, object] = {
            "host": self._host,
            "path": templates.module_path(),
            "directory": templates.directory(),
            "environment": {**os.environ, **thread_limits(os.environ)},
            "options": interpreter_options(),
        }
        assert self._template is not None
        told, self._template.told = self._template.told, now
        return {name: value for name, value in now.items() if told.get(name) != value}

    def _check(self, worker: Worker) -> None:
        """End a template that has not started a worker in time: it was stopped, or hangs."""
        if self._starting.get(worker.number) is worker:
            self._kill()

    def _kill(self) -> None:
        if self._template is not None:
            self._template.process.kill()

    def forget(self, worker: Worker) -> None:
        """Do not start a worker that is not wanted any more."""
        if worker in self._queue:
            self._queue.remove(worker)

    def _hear(self, mask: int) -> None:
        assert self._template is not None
        try:
            message = control.receive(self._template.control, [])
        except OSError:
            message = None
        match message:
            case ("started", number, pid):
                worker = self._starting.pop(number)
                self._workers[pid] = worker
                worker.has_started(pid)
            case ("failed", number, reason):
                self._starting.pop(number).cannot_start(reason)
            case ("ended", pid, status):
                if pid in self._workers:
                    self._workers.pop(pid).has_ended(status)
            case ("importing", name):
                self._importing = name
            case ("ready", threaded, failed):
                self._is_ready = True
                self._may_wait = self._may_wait and not threaded
                self._loop.deliver(partial(_warn, threaded, failed))
            case _:
                self._lose_template()
        self._ask()

    def _lose_template(self) -> None:
        """Go on without the template, which has ended; the next worker starts another one."""
        starting, self._starting = self._starting, {}
        queue, self._queue = self._queue, []
        self._workers.clear()  # how they end is not told any more
        was_ready, self._is_ready = self._is_ready, False
        process = None if self._template is None else self._template.process
        if process is not None:  # what its modules have started
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        self._leave_template(templates.Template.end)
        if not was_ready:
            self._harmful.add(self._importing)
        culprit = "" if was_ready or self._importing not in self._preload else self._importing
        reason = "the process that starts workers has ended"
        if culprit and process is not None:
            ending = describe_status(process.returncode)
            reason += f": it {ending} as it imported {culprit}, a module of preload"
            self._preload.remove(culprit)
            text = "preload: %s; workers do without %s"
            self._loop.deliver(partial(logger.warning, text, reason, culprit))
        for worker in (*starting.values(), *queue):
            worker.cannot_start(reason, counts=not was_ready and not culprit)

    def _leave_template(self, end: Callable[[templates.Template], object]) -> None:
        template, self._template = self._template, None
        if template is None:
            return
        self._loop.forget(template.control.fileno())
        printed = template.printed
        end(template)
        for descriptor in printed:
            self._output.read(descriptor)
            self._output.end_chunk([descriptor])
            self._output.remove(descriptor)

    def own_processes(self) -> list[int]:
        """Return the pid of the template, if there is one."""
        return [] if self._template is None else [self._template.process.pid]

    def is_orphan(self, worker: Worker) -> bool:
        """Return whether nobody tells how a worker ends."""
        return worker.pid not in self._workers

    def close(self) -> None:
        """End the template, and all workers with it; or have it wait for the next owner.

        The workers have been killed before.
        """
        may_wait = self._may_wait and self._is_ready and not self._starting
        self._queue.clear()
        self._starting.clear()
        self._leave_template(templates.park if may_wait else templates.Template.end)


def _warn(threaded: list[str], failed: list[tuple[str, str]]) -> None:
    for name, reason in failed:
        logger.warning("preload: %s cannot be imported: %s", name, reason)
    if threaded:
        names = ", ".join(threaded)
        text = "preload: importing %s has started a thread: each worker is a new interpreter"
        logger.warning(text, names)
