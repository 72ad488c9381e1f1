"""One server on one host: set up, started, tunnelled to, and taken down without a trace."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import queue
import random
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError
from ostap_parallel.supply.bundle import bundle
from ostap_parallel.supply.ssh import DROPPED, TRIES, Copier, Session, Tunnel, write_files
from ostap_parallel.worker.handshake import derive_key
from ostap_parallel.worker.serve import MARK

logger = logging.getLogger(__name__)

# The user's scripts, each sourced at the top level with nothing to read, and with what it prints
# kept apart from our lines. bash reads all of this as one command.
_PREPARE = "{{\nop_watch\n{sources}op_unwatch\n}}\n"
_SOURCE = 'op_file={file}; op_find {step}; source "$op_file" </dev/null >&2; op_found $?\n'

# One line: bash has read all of it before python reads what follows.
_SERVE = "op_serve {python} {mismatch}; exit\n"

# The step that has failed on a host which cannot take a shared object.
STEP = "shared"

# ssh's own exit status where the connection, not the command, has failed.
SSH_FAILED = 255


@dataclass
class HostStatus:
    """Where a host stands.

    Attributes
    ----------
    state
        ``"resting"``: ended because there was nothing to do; started again when there is.
    workers
        Number of its workers, 0 while it is not up.
    seconds
        How long it took to come up.
    lost
        How often it was lost. A lost host is started again, until it is up.
    error
        Why it is not up, with the step that failed, or why it was lost last.
    port
        The local port that leads to its server.
    about
        What the server told: ``host``, ``python``, ``executable``, ``pid``, ``ppft``, ``port``
        and ``cpus``, the number that the host grants.
    """

    name: str
    state: Literal["starting", "up", "failed", "lost", "resting", "closed"] = "starting"
    workers: int = 0
    seconds: float | None = None
    lost: int = 0
    error: HostError | None = None
    port: int | None = None
    about: dict[str, Any] | None = None

    def since(self, lost: int) -> HostStatus:
        """Return a copy that tells what has happened since it had been lost `lost` times."""
        times = self.lost - lost
        return replace(self, lost=times, error=self.error if times or not self.workers else None)


class HostServer:
    """A server on a host, for as long as the body of ``with`` runs.

    Parameters
    ----------
    secret
        What clients must prove to know; the server is told only the key made of it and its port.
    control
        Path for the connection's control socket, in a private directory.
    on_event
        Called, from a thread, with what the workers print and log, see `worker.output.Sink`.
    on_lost
        Called, from a thread, with this object and the error when the server ends before it is
        closed, or has not answered for ``host.keepalive`` seconds.
    port
        The local port that is to lead to the server, if it is free.
    tasks_per_worker
        Jobs after which a worker process is replaced; ``None`` for no limit.
    start_timeout
        Seconds until it must be up, the user's scripts included.
    """

    def __init__(
        self,
        host: HostConfig,
        secret: str,
        control: Path,
        *,
        on_event: Callable[[dict[str, Any]], None],
        on_lost: Callable[[HostServer, HostError], None],
        port: int | None = None,
        tasks_per_worker: int | None = None,
        start_timeout: float = 300,
    ) -> None:
        self.host = host
        self.about: dict[str, Any] = {}
        self.port = port or 0
        self._secret = secret
        self._tasks_per_worker = tasks_per_worker
        self._control = control
        self._on_event = on_event
        self._on_lost = on_lost
        self._start_timeout = start_timeout
        self._news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._session: Session | None = None
        self._ids = itertools.count(1)
        self._done: dict[int, threading.Event] = {}
        self._is_up = False
        self._ended = threading.Event()
        self._closing = threading.Event()
        self._beat = threading.Event()  # the answer to the last one
        self._beat.set()
        self._silent = 0.0  # seconds

    def __enter__(self) -> HostServer:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def hang_up(self) -> None:
        """Have the server end, without waiting until it has."""
        self._closing.set()
        if self._session is not None:
            self._session.hang_up()

    def close(self, patience: float = 3.0) -> None:
        """End the server and the connection; nothing remains on the host.

        One that does not end within `patience` seconds is left to find out by itself.
        """
        self.hang_up()
        if self._session is not None:
            self._session.close(patience)

    def ask(self, command: str, **details: str) -> threading.Event:
        """Have the server do something; what is returned is set when it has, or has ended.

        ``"ping"`` does nothing, but all events that the server sent before have arrived by
        then; ``"admit"`` tells the `key` of its clients. A server that is not up is not asked:
        bash would read it.
        """
        number, done = next(self._ids), threading.Event()
        if not self._is_up or self._session is None:
            done.set()
            return done
        self._done[number] = done
        try:
            self._session.write(json.dumps({"do": command, "id": number, **details}) + "\n")
        except HostError:
            done.set()
        return done

    def beat(self, period: float) -> None:
        """See whether the server answers; to be called every `period` seconds.

        What counts is how often it was asked, not the clock: our own process may have stood still.
        """
        self._silent = 0.0 if self._beat.is_set() else self._silent + period
        if self._silent < self.host.keepalive:
            self._beat = self.ask("ping") if self._beat.is_set() else self._beat
        elif self._is_up and not self._closing.is_set():
            reason = f"the server has not answered for {self.host.keepalive} s"
            self._on_lost(self, HostError(self.host.label, "run", reason))

    def has_ended(self, timeout: float) -> bool:
        """Wait until the connection has ended; return whether it has."""
        return self._ended.wait(timeout)

    def _start(self) -> None:
        self._deadline = time.monotonic() + self._start_timeout
        directory = self._connect()
        assert self._session is not None
        self._copy(directory)
        settings = {
            "ncpus": self.host.ncpus,
            "directory": directory,
            "timeout": self.host.keepalive,
            "tasks_per_worker": self._tasks_per_worker,
        }
        if sources := self._sources(directory):
            self._write(_PREPARE.format(sources=sources))
            self._expect("prepared")
        python = _quote_path(self.host.python)
        serve = _SERVE.format(python=python, mismatch=self.host.python_mismatch)
        self._write(f"{serve}{json.dumps(settings)}\n")
        self.about = self._expect("ready")
        # It ends with the session, at the latest.
        self.port = Tunnel(self._session, self.port).connect("127.0.0.1", self.about["port"])
        self._is_up = True
        self.ask("admit", key=derive_key(self._secret, self.port).hex())

    def _connect(self) -> str:
        """Open the connection, again if it is dropped; return the private directory there."""
        tmpdir = _quote_path(self.host.tmpdir) if self.host.tmpdir else '"${TMPDIR:-/tmp}"'
        script = Path(__file__).with_name("remote.bash").read_text()
        for attempt in range(TRIES):
            self._news, self._step = queue.SimpleQueue(), "connect"
            self._ended.clear()
            self._session = Session(self.host, self._control, self._receive)
            if self._closing.is_set():
                raise HostError(self.host.label, "connect", "closed while it was starting")
            self._session.open()
            try:
                self._write(f"op_mark={shlex.quote(MARK)} op_tmpdir={tmpdir}\n{script}")
                directory: str = self._expect("directory")
            except HostError as exc:
                dropped = DROPPED.search(self._session.last_words)
                if not dropped or attempt == TRIES - 1 or self._closing.is_set():
                    raise
                logger.info("%s; trying again", exc)
                self._session.close()
                # Many clients that retry together must not meet again.
                time.sleep(random.uniform(0.1, 0.4) * 1.6**attempt)
            else:
                return directory
        raise AssertionError("the loop above returns or raises")

    def _copy(self, directory: str) -> None:
        assert self._session is not None
        files = {"bundle.tgz": bundle(sys.version_info[:2])}
        if self.host.environment is not None:
            files["environment.sh"] = self.host.environment.encode() + b"\n"
        if self.host.script is not None:
            files["script.sh"] = self.host.script.read_bytes()
        with tempfile.TemporaryDirectory(dir=self._control.parent) as staging:
            write_files(Path(staging), files)
            left = max(1.0, self._deadline - time.monotonic())
            Copier(self._session).copy(Path(staging), directory, left)

    def _write(self, text: str) -> None:
        assert self._session is not None
        # What ends bash early is reported as the step that failed, not as a broken pipe here.
        with contextlib.suppress(HostError):
            self._session.write(text)

    def _sources(self, directory: str) -> str:
        """Return the bash text that runs the user's scripts."""
        sources = {
            "profile": self.host.profile,
            "environment": self.host.environment and f"{directory}/environment.sh",
            "script": self.host.script and f"{directory}/script.sh",
        }
        return "".join(
            _SOURCE.format(step=step, file=shlex.quote(file))
            for step, file in sources.items()
            if file
        )

    def _receive(self, line: str | None) -> None:
        """Sort what arrives: answers and set-up steps, events of workers, other people's text."""
        if line is None:
            self._end()
        elif not line.startswith(MARK):
            logging.getLogger(self.host.name).debug("%s", line)
        elif not line.startswith(f"{MARK}{{"):
            kind, _, rest = line.removeprefix(MARK).partition(" ")
            self._news.put((kind, rest))
            if kind == "over" and self._is_up:
                self._end()
        else:
            try:
                event = json.loads(line.removeprefix(MARK))
            except ValueError:  # the connection broke in the middle of it
                logging.getLogger(self.host.name).debug("%s", line)
                return
            if event["kind"] == "ready":
                self._news.put(("ready", event))
            elif event["kind"] == "done":
                if done := self._done.pop(event["id"], None):
                    done.set()
            else:
                self._on_event(event)

    def _end(self) -> None:
        self._is_up, was_up = False, self._is_up
        self._ended.set()
        self._news.put(("ended", ""))
        for done in list(self._done.values()):
            done.set()
        if was_up and not self._closing.is_set():
            assert self._session is not None
            reason = self._session.last_words or "the server has ended"
            self._on_lost(self, HostError(self.host.label, "run", reason))

    def _expect(self, wanted: str) -> Any:
        """Wait for one piece of news; anything else is the step that failed."""
        assert self._session is not None
        while True:
            left = self._deadline - time.monotonic()
            try:
                kind, rest = self._news.get(timeout=max(0.0, left))
            except queue.Empty:
                reason = f"not up after {self._start_timeout:g} s; {self._session.last_words}"
                raise HostError(self.host.label, self._step, reason) from None
            if kind == wanted:
                return rest
            if kind == "step":
                self._step = rest
            elif kind == "ended":
                raise self._failure()

    def _failure(self) -> HostError:
        """Return the error for a session that has ended: ssh passes on bash's exit status."""
        assert self._session is not None
        status, words = self._session.exit_status, self._session.last_words
        ended = f"ended with exit status {status}"
        if words and self._step != "connect" and status != SSH_FAILED:
            words = f"{words} ({ended})"
        return HostError(self.host.label, self._step, words or ended)


def _quote_path(path: str) -> str:
    """Return a path on the host as a word for its bash, ``~/`` at the beginning as the home."""
    if path.startswith("~/"):
        return f'"$HOME"/{shlex.quote(path[2:])}'
    return shlex.quote(path)
