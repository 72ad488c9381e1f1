"""Commands on local cores and on hosts: as many at a time as these take, and what became of each.

from ostap_parallel.commands import Command, run

for done in run([Command(["gzip", path]) for path in paths], servers="h1 h2"):
    done.check()
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostap_parallel.commands import joblog as joblogs
from ostap_parallel.commands.command import Command, Done
from ostap_parallel.commands.course import Levels
from ostap_parallel.commands.dispatcher import AHEAD, Dispatcher
from ostap_parallel.commands.halting import Halt
from ostap_parallel.commands.outputs import Outputs
from ostap_parallel.commands.pace import Pace
from ostap_parallel.commands.slots import Job
from ostap_parallel.commands.template import Filled, Template, cross
from ostap_parallel.commands.transfer import Transfer
from ostap_parallel.engine.backend import Backend
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.engine.names import HERE, bare_name
from ostap_parallel.errors import CommandFailed, ConfigError
from ostap_parallel.faces.executor import Executor, Settings
from ostap_parallel.runs.reading import Reader
from ostap_parallel.runs.run import PAUSE
from ostap_parallel.runs.snapshot import telling_of
from ostap_parallel.runs.stream import ending_at_exit

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Command",
    "CommandFailed",
    "Done",
    "Template",
    "Transfer",
    "commands_of",
    "run",
    "run_as_completed",
]

# Bytes of each output that are kept in memory.
KEEP = 16 << 20

# Commands that a thread reads before it waits for whoever takes them: one by one costs more.
AT_ONCE = 16


def run(commands: Iterable[Command | Sequence[str] | str], **settings: Any) -> list[Done]:
    """Run commands and return what became of each, in their order; see `run_as_completed`."""
    return sorted(run_as_completed(commands, **settings), key=lambda done: done.number)


@ending_at_exit
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
    delay: float = 0.0,
    percent: float | None = None,
    keep: int = KEEP,
    overflow: Callable[[], Path] | Path | str | None = None,
    levels: Levels = (logging.DEBUG, logging.WARNING),
    title: str = "commands",
    total: int | None = None,
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
        that are in it are not run again; with ``"failed"`` those that have failed are; with
            ``"append"`` all run, and their lines come behind those that are there.
    halt
        When to stop early, see `Halt`.
    delay
        Seconds between two that begin.
    percent
        How long each may take, in percent of the median of those that have ended well; a second
        is never too long.
    keep
        Bytes of each output that are kept, without `results`; the middle of longer ones is not.
    overflow
        A directory for outputs that are longer, which are kept whole then; or what makes it.
    levels
        Of the records `<host>.<name>` for the lines of standard output and standard error.
    title, total
        How ``ostap-parallel top`` names it, and how many there are, if that is known.
    executor
        An `Executor`, or manager's, to run on, in place of one for this run alone.

    Raises
    ------
    ConfigError
        A setting is wrong, or the job log is of other commands.
    """
    if max_per_node is not None and max_per_node < 1:
        raise ConfigError(f"max_per_node must be at least 1, not {max_per_node!r}")
    listed: Any = _listed(commands)
    halt = halt if isinstance(halt, Halt) else Halt(halt)
    pace = Pace(delay, percent, one_by_one=halt.is_set)
    outputs = Outputs(keep, results, overflow)
    log, past = _past(joblog, resume)
    with contextlib.ExitStack() as stack:
        if executor is None:
            own: dict[str, Any] = {"ncpus": ncpus, "max_per_node": max_per_node, **settings}
            executor = stack.enter_context(_open_for(listed, servers, **own))
        backend = _backend_of(executor)
        dispatcher = Dispatcher(backend, max_per_node, outputs, levels, pace)
        dispatcher.close_with(stack)
        given, ahead = listed, float("inf")
        if isinstance(commands, Sequence):
            total = len(listed)
        else:
            given, ahead = stack.enter_context(_reading(commands, dispatcher.wake)), AHEAD
        note = stack.enter_context(joblogs.writer(log, bool(resume))) if log is not None else None
        told = stack.enter_context(telling_of(dispatcher, title, total))
        for done in dispatcher.run(_unless_past(given, past, resume), ahead):
            told.advance(1, int(not done.succeeded))
            if note is not None and not done.is_skipped:
                note(done.entry())
            yield done
            if halt.count(done):
                if halt.is_now:
                    return
                dispatcher.stop_feeding()


def _open_for(commands: Sequence[Command], servers: Any, **settings: Any) -> Executor:
    """Return an executor with slots for commands, those that they are pinned to among them."""
    pinned = [sorted(command.pinned) for command in commands]
    anywhere = not pinned or not all(pinned)
    return open_executor(servers, itertools.chain(*pinned), anywhere, **settings)


def _backend_of(executor: Any) -> Backend:
    """Return what computes for an executor; raises TypeError if it can run no commands."""
    backend = backend_of(executor)
    if not backend.abilities.interrupt:
        raise TypeError(f"commands need workers of ours, not {backend.name}")
    return backend


def _listed(commands: Iterable[Command | Sequence[str] | str]) -> list[Command]:
    """Return the commands if they are known already."""
    if isinstance(commands, str | Command):
        raise TypeError("a list of commands is wanted, not one")
    return list(map(as_command, commands)) if isinstance(commands, Sequence) else []


@contextlib.contextmanager
def _reading(commands: Iterable[Any], wake: Callable[[], object]) -> Iterator[Iterator[Any]]:
    """Have a thread read commands; what comes is them, and `PAUSE` where nothing is there now."""
    reader = Reader(commands, wake)

    def read() -> Iterator[Any]:
        count = 1
        while found := list(reader.take(count)):
            yield from found
            are_light = all(getattr(command, "is_light", True) for command in found)
            count = AT_ONCE if are_light else 1

    try:
        yield read()
    finally:
        reader.close()


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
    settings.setdefault("python_mismatch", "allow")  # no function travels by value
    return Executor(ncpus, entries, **settings)


def _past(
    joblog: Path | str | None, resume: bool | str
) -> tuple[Path | None, dict[int, joblogs.Entry]]:
    """Return the job log, and what of it is not to be run again, perhaps."""
    if joblog is None:
        if resume:
            raise ConfigError("resume needs a joblog")
        return None, {}
    log = Path(joblog)
    past = joblogs.read(log) if resume else {}  # also where it is only added to: it may be none
    return log, {} if resume == "append" else past


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
