"""LOFAR's recipes: programs that schedule jobs on hosts and wait for them."""

from __future__ import annotations

import configparser
import contextlib
import json
import logging
import os
import shlex
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ostap_parallel.commands.command import Command, Done
from ostap_parallel.commands.running import open_executor, run_as_completed
from ostap_parallel.engine.names import HERE
from ostap_parallel.objects import serialize
from ostap_parallel.pipeline.base import METHODS
from ostap_parallel.pipeline.exceptions import PipelineQuit
from ostap_parallel.pipeline.state import State, key_of
from ostap_parallel.worker.node import NO_PORT
from ostap_parallel.worker.reaper import PYTHON

# What a job that has not run has for a status.
NOT_RUN = 123456

# Jobs at a time on a host where there is no limit, and bytes of arguments on a command line.
MOST_JOBS = 64
MOST_BYTES = 100_000

# Variables that jobs on hosts get from here, if they are set.
SENT = ("LOFARROOT", "LOFARENV", "QUEUE_PREFIX")


class ComputeJob:
    """A job for a host.

    Parameters
    ----------
    host
        Where it is to run.
    command
        What runs there, as for a shell, without its arguments. ``python`` at its beginning is the
        interpreter of our workers.
    arguments
        Objects for the node script; as text they are on its command line.
    resources
        ``{"cores": N}``: how many slots it takes; libraries in it take as many threads.

    Attributes
    ----------
    results
        ``returncode``, negative for a signal; ``job_duration`` in seconds, as text;
        ``monitor_stats``, what it used; and the outputs of its node script.
    """

    def __init__(
        self,
        host: str,
        command: str,
        arguments: Sequence[Any] = (),
        resources: Mapping[str, Any] = {},
    ) -> None:
        self.id = 0
        self.host, self.command = host, command
        self.arguments, self.resources = list(arguments), dict(resources)
        self.results: dict[str, Any] = {"returncode": NOT_RUN}

    def as_command(self, number: int, is_local: bool) -> Command:
        """Return the command for it."""
        self.id = number
        words = [str(number), self.host, NO_PORT, *map(str, self.arguments)]
        if sum(map(len, words)) > MOST_BYTES:
            del words[3:]  # they are to be had as objects
        program, _, rest = self.command.strip().partition(" ")
        if program in ("python", "python3"):
            program = f'"${PYTHON}"'
        cores = max(1, int(self.resources.get("cores", 1)))
        environment = {name: os.environ[name] for name in SENT if name in os.environ}
        if "cores" in self.resources:
            environment["OMP_NUM_THREADS"] = str(cores)
        arguments = tuple(self.arguments)
        return Command(
            f"{program} {rest} {shlex.join(words)}",
            host="local" if is_local else self.host,
            environment=environment,
            cores=cores,
            name=self.name,
            arguments=serialize.pack(arguments, f"the arguments of job {number}"),
        )

    @property
    def identity(self) -> tuple[Any, ...]:
        """What makes it the same job when its recipe is run again."""
        return self.id, self.host, self.command, self.arguments, self.resources

    @property
    def name(self) -> str:
        """The name of its script, or program."""
        words = shlex.split(self.command)
        if len(words) > 1 and words[0] in ("python", "python3"):
            words = words[1:]
        return Path(words[0]).stem if words else "job"

    def take(self, done: Done) -> None:
        """Take what became of it."""
        if done.signal is not None:
            self.results["returncode"] = -done.signal
        else:
            self.results["returncode"] = 1 if done.status is None else done.status
        self.results["job_duration"] = str(done.seconds)
        self.results["monitor_stats"] = {
            "memory": done.memory,
            "cpu": done.user + done.system,
            "read_bytes": done.read,
            "write_bytes": done.written,
        }
        if done.answer:
            self.results.update(serialize.loads(done.answer))


class RemoteCommandRecipeMixIn:
    """Lets a recipe run jobs on hosts.

    Attributes
    ----------
    servers
        Entries for hosts that need more than their name, as ``user@host*8``.
    settings
        Settings of `Executor` for all of them.
    """

    name: str
    logger: logging.Logger
    error: threading.Event
    config: configparser.ConfigParser
    outputs: Any
    state: State | None
    scope: tuple[Any, ...]
    next_turn: Callable[[str], int]
    servers: Sequence[str] = ()
    settings: Mapping[str, Any] = {}

    def _schedule_jobs(
        self, jobs: Iterable[ComputeJob], max_per_node: int | None = None
    ) -> dict[int, ComputeJob]:
        """Run jobs and wait for them; return them by their numbers.

        One that fails sets `error`, and the others go on.

        Parameters
        ----------
        max_per_node
            How many run at a time on each host; default: that of ``[remote]``, or as many as there
            are.

        Raises
        ------
        PipelineQuit
            By Ctrl-C or SIGTERM, which have ended the jobs.
        """
        pool = dict(enumerate(jobs))
        if not pool:
            return pool
        if not max_per_node and self.config.has_option("remote", "max_per_node"):
            max_per_node = self.config.getint("remote", "max_per_node")
        if max_per_node:
            self.logger.info("Limiting to %d simultaneous jobs/node", max_per_node)
        method = METHODS.get(self.config.get("remote", "method", fallback="ssh"), "ssh")
        turn, commands = self.next_turn("jobs"), []
        left: dict[int, ComputeJob] = {}
        for number, job in pool.items():
            is_local = method == "local" or job.host in HERE
            command = job.as_command(number, is_local)
            if self._is_finished(job, turn):
                continue
            commands.append(command)
            left[len(left)] = job
            way = "as a process" if is_local else f"with {method}"
            self.logger.debug("Dispatching command to %s %s", job.host, way)
        try:
            if left:
                busiest = max(Counter(job.host for job in left.values()).values())
                with _ending_by_sigterm():
                    self._run(commands, left, max_per_node or min(MOST_JOBS, busiest), turn)
        except KeyboardInterrupt:
            self.logger.warning("Processing interrupted: shutting down")
            self.error.set()
            raise PipelineQuit("it was interrupted") from None
        finally:
            self._report(pool)
        return pool

    def _is_finished(self, job: ComputeJob, turn: int) -> bool:
        """Return whether a job was finished another time; if so, it has its results."""
        state = getattr(self, "state", None)
        found = state and state.get(key_of("job", self.scope, turn, *job.identity))
        if found:
            job.results.update(found)
            self.logger.debug("Job %d on %s is finished already", job.id, job.host)
        return bool(found)

    def _report(self, pool: Mapping[int, ComputeJob]) -> None:
        """Have what became of jobs in the outputs, and as a table in the log."""
        rows = [*json.loads(self.outputs.get("return_json", "[]")), *map(_report, pool.values())]
        self.outputs.update({"return_json": json.dumps(rows)})  # it needs no field
        for line in table(list(map(_report, pool.values()))):
            self.logger.info("%s", line)

    def _run(
        self, commands: list[Command], pool: Mapping[int, ComputeJob], max_per_node: int, turn: int
    ) -> None:
        settings = dict(self.settings)
        if METHODS.get(self.config.get("remote", "method", fallback="ssh")) == "srun":
            settings.setdefault("way", "srun")
        needed = max(command.cores for command in commands)
        opened = open_executor(
            self.servers,
            [command.host for command in commands if command.host],
            anywhere=False,
            max_per_node=max(max_per_node, needed),
            on_event=self._hear,
            **settings,
        )
        with opened as executor:
            self.logger.info("Waiting for compute threads...")
            levels = (logging.DEBUG, logging.WARNING)
            limits: dict[str, Any] = {"max_per_node": max_per_node, "title": self.name}
            results = run_as_completed(commands, executor=executor, levels=levels, **limits)
            with contextlib.closing(results):
                for done in results:
                    self._note(pool[done.number - 1], done, turn)
            executor.backend.flush()

    def _note(self, job: ComputeJob, done: Done, turn: int) -> None:
        job.take(done)
        state = getattr(self, "state", None)
        if done.succeeded and state is not None:
            state.put(key_of("job", self.scope, turn, *job.identity), job.results)
        if not done.succeeded:
            text = "Remote process %s %s failed on %s: %s"
            self.logger.error(text, job.command, job.arguments, job.host, done.reason())
            self.error.set()

    def _hear(self, host: str, event: Mapping[str, Any]) -> None:
        """Log a record of a node script, or a line that a job has printed."""
        if event["kind"] != "log":
            self.logger.warning("%s: %s", host, event["text"])
            return
        record = logging.makeLogRecord(dict(event["record"]))
        if not record.name.startswith("node."):
            record.name = f"node.{host}.{record.name}"
        # Not by a logger of its name, whose level is nobody's.
        if self.logger.isEnabledFor(record.levelno):
            self.logger.handle(record)


def _report(job: ComputeJob) -> dict[str, Any]:
    """Return what is told of a job."""
    results = job.results
    found = {"job_id": job.id, "job_host": job.host, "returncode": results["returncode"]}
    found["duration"] = results.get("job_duration")
    return {**found, **results.get("monitor_stats", {})}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a report as lines: what became of each job, and what it used."""
    form = "{:>4}  {:<20}  {:>6}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}".format
    lines = [form("job", "host", "status", "seconds", "cpu", "MiB", "read", "written")]
    for row in rows:
        seconds = f"{float(row['duration'] or 0):.2f}"
        sizes = (f"{row.get(key, 0) / (1 << 20):.1f}" for key in ("memory", *_BYTES))
        cpu = f"{row.get('cpu', 0):.2f}"
        lines.append(form(row["job_id"], row["job_host"], row["returncode"], seconds, cpu, *sizes))
    return lines


_BYTES = ("read_bytes", "write_bytes")


@contextlib.contextmanager
def _ending_by_sigterm() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does, in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
