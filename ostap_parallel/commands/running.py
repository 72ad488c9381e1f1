"""Commands on local cores and on hosts: as many at a time as these take, and what became of each.

from ostap_parallel.commands import Command, run

for done in run([Command(["gzip", path]) for path in paths], servers="h1 h2"):
    done.check()
"""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostap_parallel.commands import joblog as joblogs
from ostap_parallel.commands.command import Command, Done
from ostap_parallel.commands.feed import Feed
from ostap_parallel.commands.halting import Halt
from ostap_parallel.commands.outputs import Outputs
from ostap_parallel.commands.slots import Job, Queues
from ostap_parallel.commands.template import Filled, Template, cross
from ostap_parallel.engine.backend import AnyFuture, Backend, result_of
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.engine.names import HERE, bare_name
from ostap_parallel.engine.retries import Limits
from ostap_parallel.errors import CommandFailed, ConfigError
from ostap_parallel.faces.executor import Executor, Settings
from ostap_parallel.runs.run import PAUSE
from ostap_parallel.worker.chunk import Lost, pack_chunk, pack_value, traced, unpack_answer
from ostap_parallel.worker.command import Ended, read_piece
from ostap_parallel.worker.command import run as run_command
from ostap_parallel.worker.execute import Call

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Command",
    "CommandFailed",
    "Done",
    "Template",
    "commands_of",
    "run",
    "run_as_completed",
]

# Bytes of each output that are kept in memory, and of each piece in which a longer one travels.
KEEP = 16 << 20
PIECE = 4 << 20

# Seconds that commands get to end when a run is stopped.
STOP_PATIENCE = 4.0

Levels = tuple[int | None, int | None]


def run(commands: Iterable[Command | Sequence[str] | str], **settings: Any) -> list[Done]:
    """Run commands and return what became of each, in their order; see `run_as_completed`."""
    return sorted(run_as_completed(commands, **settings), key=lambda done: done.number)


def run_as_completed(
    commands: Iterable[Command | Sequence[str] | str],
    *,
    servers: str | int | Iterable[str | int] = (),
    ncpus: int | str | None = None,
    max_per_node: int | None = None,
    results: Path | str | None = None,
    joblog: Path | str | None = None,
    resume: bool | str = False,
    halt: Halt | str = "never",
    keep: int = KEEP,
    overflow: Path | str | None = None,
    levels: Levels = (logging.DEBUG, logging.WARNING),
    executor: Any = None,
    **settings: Unpack[Settings],
) -> Generator[Done, None, None]:
    """Run commands and yield what became of each as they end.

    Leaving the iterator, or Ctrl-C, ends what runs, with all that it has started.

    Parameters
    ----------
    servers
        Hosts, as of `WorkManager`; those that commands of a list are pinned to come to them.
            ``":"`` is this machine, which is used by default unless all commands are pinned.
    ncpus
        Slots on this machine.
    max_per_node
        How many run at a time on each host; by default as many as it has CPUs.
    results
        A directory for what they print: ``<number>/stdout`` and ``<number>/stderr``, all of it.
    joblog, resume
        A file with a line for each that has ended, as GNU parallel's. With ``resume=True`` those
        that are in it are not run again; with ``"failed"`` those that have failed are.
    halt
        When to stop early, see `Halt`.
    keep
        Bytes of each output that are kept, without `results`; the middle of longer ones is not.
    overflow
        A directory for outputs that are longer, which are kept whole then.
    levels
        Of the records `<host>.<name>` for the lines of standard output and standard error.
    executor
        An `Executor`, or manager's, to run on, in place of one for this run alone.

    Raises
    ------
    ConfigError
        A setting is wrong, or the job log is of other commands.
    """
    if max_per_node is not None and max_per_node < 1:
        raise ConfigError(f"max_per_node must be at least 1, not {max_per_node!r}")
    listed = _listed(commands)
    given = listed if isinstance(commands, Sequence) else commands
    halt = halt if isinstance(halt, Halt) else Halt(halt)
    log = Path(joblog) if joblog is not None else None
    if resume and log is None:
        raise ConfigError("resume needs a joblog")
    past = joblogs.read(log) if log is not None and resume else {}
    with contextlib.ExitStack() as stack:
        if executor is None:
            pinned = (host for command in listed for host in sorted(command.pinned))
            anywhere = not listed or not all(command.pinned for command in listed)
            own: dict[str, Any] = {"ncpus": ncpus, "max_per_node": max_per_node, **settings}
            executor = stack.enter_context(open_executor(servers, pinned, anywhere, **own))
        backend = backend_of(executor)
        if not backend.abilities.interrupt:
            raise TypeError(f"commands need workers of ours, not {backend.name}")
        outputs = Outputs(keep, results, overflow)
        dispatcher = Dispatcher(backend, max_per_node, outputs, levels)
        stack.callback(dispatcher.close)
        if isinstance(commands, Feed):
            commands.wake = dispatcher.wake
        file = stack.enter_context(joblogs.writer(log, bool(resume))) if log is not None else None
        for done in dispatcher.run(_unless_past(given, past, resume)):
            if file is not None and not done.is_skipped:
                file.write(done.entry().line())
                file.flush()
            yield done
            if halt.count(done):
                if halt.is_now:
                    return
                dispatcher.stop_feeding()


def _listed(commands: Iterable[Command | Sequence[str] | str]) -> list[Command]:
    """Return the commands if they are known already."""
    if isinstance(commands, str | Command):
        raise TypeError("a list of commands is wanted, not one")
    return list(map(as_command, commands)) if isinstance(commands, Sequence) else []


def as_command(command: Command | Filled | Sequence[str] | str) -> Command:
    """Return a command for what stands for one."""
    return command if isinstance(command, Command) else Command(command)


def commands_of(
    template: str, *inputs: Iterable[str], zipped: bool = False, **settings: Any
) -> Iterator[Command]:
    """Yield a command for each value of the inputs, or for each combination of them.

    With `zipped` the first values of all inputs go together, then the second ones and so on. See
    `Template` for its places; `settings` are those of each `Command`.
    """
    filled = Template(template)
    values = zip(*inputs, strict=False) if zipped else cross(inputs)
    for number, chosen in enumerate(values, 1):
        yield Command(filled.fill(chosen, number), **settings)


def open_executor(
    servers: str | int | Iterable[str | int],
    pinned: Iterable[str] = (),
    anywhere: bool = True,
    *,
    ncpus: int | str | None = None,
    max_per_node: int | None = None,
    **settings: Any,
) -> Executor:
    """Return an executor with slots for commands; see `run_as_completed`.

    Parameters
    ----------
    pinned
        Hosts that commands are pinned to.
    anywhere
        Whether there are commands that are not.
    """
    if isinstance(servers, str):
        servers = servers.replace(",", " ").split()
    wanted = [servers] if isinstance(servers, int) else list(servers)
    entries = [server for server in wanted if server != ":"]
    known = {bare_name(str(server)) for server in entries}
    is_here = len(entries) < len(wanted) or (anywhere and not wanted)
    for host in pinned:
        if host in HERE:
            is_here = True
        elif bare_name(host) not in known:
            known.add(bare_name(host))
            entries.append(host)
    if ncpus is None:
        ncpus = (max_per_node or "autodetect") if is_here or not entries else 0
    if max_per_node is not None:
        settings.setdefault("ncpus_per_host", max_per_node)
    return Executor(ncpus, entries, **settings)


def _unless_past(
    commands: Iterable[Any], past: dict[int, joblogs.Entry], resume: bool | str
) -> Iterator[Job | Done | None]:
    """Yield a job for each command that is to be run, else what the job log tells of it.

    Nothing stands for a pause.
    """
    number = 0
    for given in commands:
        if given is PAUSE:
            yield None
            continue
        number, command = number + 1, as_command(given)
        entry = past.get(number)
        if entry is not None and entry.command != str(command):
            text = f"the job log is of other commands: number {number} was {entry.command!r} and "
            raise ConfigError(f"{text}is {str(command)!r} now")
        if entry is None or (resume == "failed" and not entry.succeeded):
            yield Job(command, number)
        else:
            yield Done.of_entry(command, entry)


class Dispatcher:
    """Runs commands on a backend: as many as its hosts have slots for."""

    def __init__(
        self, backend: Backend, max_per_node: int | None, outputs: Outputs, levels: Levels
    ) -> None:
        self._backend, self._outputs, self._levels = backend, outputs, levels
        self._queues = Queues(backend, max_per_node)
        self._running: dict[Job, None] = {}
        self._news: queue.SimpleQueue[tuple[Job, AnyFuture] | None] = queue.SimpleQueue()
        self._source: Iterator[Job | Done | None] = iter(())
        self._is_read = self._is_paused = False
        level = logging.getLogger().level
        self._submit = backend.open(Call(run_command, log_level=level))
        self._fetch = backend.open(Call(read_piece, log_level=level))
        self._stop_listening = backend.listen(self.wake)
        self._queues.load.listeners.add(self.wake)

    def run(self, source: Iterator[Job | Done | None]) -> Iterator[Done]:
        """Run what comes from a source; yield what becomes of it, and what has already."""
        self._source = source
        while True:
            yield from self._read()
            for job, reason in self._queues.hopeless():
                job.done.error = reason
                yield job.done
            yield from self._begin_all()
            if not self._running and not self._queues.waiting and self._is_read:
                return
            if self._running or self._queues.waiting or self._is_paused:
                yield from self._hear(self._news.get())

    def wake(self) -> None:
        """Have `run` look again, from any thread."""
        self._news.put(None)

    def stop_feeding(self) -> None:
        """Begin no more commands; what runs goes on."""
        self._is_read = True
        self._source = iter(())
        self._queues.drop()

    def close(self) -> None:
        """End what runs."""
        self._stop_listening()
        self._queues.load.listeners.discard(self.wake)
        futures = [job.future for job in self._running if job.future is not None]
        self._backend.give_up(futures)
        if futures:
            wait(futures, STOP_PATIENCE)
        for job in list(self._running):
            self._free(job)

    def _read(self) -> Iterator[Done]:
        """Take from the source what can be begun soon."""
        enough = 2 * sum(self._queues.capacities().values()) + 1
        self._is_paused = False
        while not self._is_read and self._queues.unpinned < enough:
            try:
                job = next(self._source)
            except StopIteration:
                self._is_read = True
                return
            if job is None:  # `wake` tells when there is more
                self._is_paused = True
                return
            if isinstance(job, Done):
                yield job
            else:
                names = job.command.pinned
                job.labels = self._queues.labels(names) if names else None
                self._queues.put(job)

    def _begin_all(self) -> Iterator[Done]:
        if self._queues.waiting and not self._running:
            with contextlib.suppress(ConnectionError):  # `hopeless` tells the reasons
                self._backend.window()  # which wakes hosts that rest
        while (job := self._queues.next()) is not None:
            self._running[job] = None
            try:
                self._begin(job)
            except OSError as exc:
                self._free(job)
                if not isinstance(exc, ConnectionError):  # else the host has just gone
                    job.done.error = f"its input cannot be read: {exc}"
                    yield job.done
                else:
                    self._queues.put(job)
                    return

    def _begin(self, job: Job) -> None:
        command = job.command
        log = logging.getLogger(f"{job.label}.{command.label}")
        out, err = (level if level and log.isEnabledFor(level) else None for level in self._levels)
        outputs = self._outputs
        spec = command.spec(job.label, command.input(), (out, err), outputs.keep, outputs.is_whole)
        job.tries += 1
        chunk = pack_chunk([job.number], [pack_value(spec, f"command {job.number}")])
        self._listen(job, self._submit(chunk, hosts=frozenset([job.label])))

    def _listen(self, job: Job, future: AnyFuture) -> None:
        job.future = future
        future.add_done_callback(lambda future: self._news.put((job, future)))

    def _free(self, job: Job) -> None:
        self._running.pop(job, None)
        self._queues.load.give(job.label, job.slots)
        job.future = None
        if job.file is not None:
            job.file.close()
            job.file = None

    # -- what comes back

    def _hear(self, news: tuple[Job, AnyFuture] | None) -> Iterator[Done]:
        if news is None:
            return
        job, future = news
        value = self._value(job, future)
        if isinstance(value, Lost):
            self._free(job)
            job.attempts.count(value)
            if job.attempts.may_go_on(Limits()):
                self._queues.put(job)
                return
            job.done.host, job.done.error, job.done.attempts = job.label, value.reason, job.tries
            yield job.done
            return
        if isinstance(value, BaseException):
            job.done.error = f"{type(value).__name__}: {value}"
            job.pieces.clear()
        try:
            if isinstance(value, Ended):
                self._take(job, value)
            elif isinstance(value, bytes):
                self._take_piece(job, value)
            if job.pieces:
                self._fetch_next(job)
                return
        except OSError as exc:
            job.done.error = f"its output cannot be written: {exc}"
        self._free(job)
        yield from self._end(job)

    @staticmethod
    def _value(job: Job, future: AnyFuture) -> Any:
        """Return what came back: an outcome, a piece of output, an error, or that it is lost."""
        result = result_of(future, job.label)
        if isinstance(result, Lost):
            return result
        value, error, text = unpack_answer(result, 0, f"command {job.number}")
        return value if error is None else traced(error, result, text)

    def _take(self, job: Job, ended: Ended) -> None:
        """Take how a command has ended."""
        done = job.done
        for name in (
            "status",
            "signal",
            "start",
            "seconds",
            "error",
            "timed_out",
            "memory",
            "answer",
        ):
            setattr(done, name, getattr(ended, name))
        done.user, done.system, done.read = ended.user, ended.system, ended.read
        done.written, done.host, done.attempts = ended.written, job.label, job.tries
        done.sizes = (ended.stdout.size, ended.stderr.size)
        job.pieces = self._outputs.put(done, ended.stdout, ended.stderr)

    def _fetch_next(self, job: Job) -> None:
        """Ask for the next piece of an output; with none left, have it kept there no more."""
        path, place, size = job.pieces[0]
        if job.file is None:
            job.file, job.position = path.open("wb"), 0
        left = min(PIECE, size - job.position)
        item = pack_value((place, job.position, left), f"command {job.number}")
        self._listen(job, self._fetch(pack_chunk([0], [item]), hosts=frozenset([job.label])))

    def _take_piece(self, job: Job, piece: bytes) -> None:
        path, _, size = job.pieces[0]
        assert job.file is not None
        if job.position >= size:  # that it is kept no more
            job.file.close()
            job.file = None
            job.pieces.pop(0)
        elif not piece:
            job.pieces.clear()
            raise OSError(f"{path}: the rest of it was lost")
        else:
            job.file.write(piece)
            job.position += len(piece)

    def _end(self, job: Job) -> Iterator[Done]:
        """Yield what has become of a command, unless it is to run again."""
        job.pieces.clear()
        if job.done.succeeded or job.tries > job.command.retries:
            yield job.done
            return
        job.failed_on.add(job.label)
        allowed = self._queues.labels(job.command.pinned) or self._queues.capacities().keys()
        job.labels = frozenset(allowed - job.failed_on) or frozenset(allowed) or None
        job.done = Done(job.command, job.number)
        self._queues.put(job)
