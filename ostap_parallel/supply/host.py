"""One server on one host: set up, started, reached, and taken down without a trace."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import random
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ostap_parallel import libraries
from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError
from ostap_parallel.logs import logger_of
from ostap_parallel.machine.endpoint import Endpoint
from ostap_parallel.machine.handshake import derive_key
from ostap_parallel.machine.serve import MARK
from ostap_parallel.machine.templates import modules_of
from ostap_parallel.supply.bundle import NAME, bundle
from ostap_parallel.supply.session import Session
from ostap_parallel.supply.source import Grant, Server, TryLater, Watch
from ostap_parallel.supply.steps import open_qrsh, open_srun
from ostap_parallel.supply.ways import BEATS, LOOPBACK, SPARE_LINES, TRIES, Way

logger = logger_of(__name__)

# The user's scripts, each sourced at the top level with nothing to read, and with what it prints
# kept apart from our lines. bash reads all of this as one command.
_PREPARE = "{{\nop_watch\n{sources}op_unwatch\n}}\n"
_SOURCE = 'op_file={file}; op_find {step}; source "$op_file" </dev/null >&2; op_found $?\n'

# One line: bash has read all of it before python reads what follows.
_SERVE = "op_serve {python} {mismatch} {nice} {requires}; exit\n"

# Seconds without a word from bash after which we look whether the way is good, and then until
# what bash should read counts as lost.
QUIET = 5.0
LOST_WORDS = 10.0

# What is said where there is no room just now.
_FULL = re.compile(
    "No space left on device|Wrote only .* bytes|[Qq]uota exceeded|Cannot allocate memory"
    "|Resource temporarily unavailable"
)

OpenWay = Callable[[HostConfig], AbstractContextManager[Way]]


class HostSource:
    """A host on which we start a server: a source of workers, see `source.Source`.

    Parameters
    ----------
    secret
        What clients must prove to know; a server is told only the key made of it and its port.
    tasks_per_worker
        Jobs after which a worker process is replaced; ``None`` for no limit.
    open_way
        Makes the way to the host, anew for each start; if it is not given, as the configuration
        says.
    start_timeout
        Seconds until a server must be up, from when it has its turn, the user's scripts included;
        ``None``: what the host's configuration says.
    """

    may_rest = True
    is_spare = False

    def __init__(
        self,
        host: HostConfig,
        secret: str,
        *,
        tasks_per_worker: int | None = None,
        open_way: OpenWay | None = None,
        start_timeout: float | None = None,
    ) -> None:
        self.host = host
        self.label = host.label
        self.keepalive: float | None = float(host.keepalive)
        self.secret = secret
        self.tasks_per_worker = tasks_per_worker
        self.open_way = open_way or _WAYS[host.way]
        self.start_timeout = start_timeout or host.start_timeout
        self.port = 0  # here, of the last server: the next one gets it if it is free
        # Now: servers are started by threads, and libraries need not bear several.
        self.sessions = libraries.sessions(host.preload)

    def server(self, watch: Watch) -> HostServer:
        """Return a server that is about to be started."""
        return HostServer(self, watch)


def _open_ssh(host: HostConfig) -> AbstractContextManager[Way]:
    # Now, not before: it needs pathos. A bare host does not have that, and pools that tasks make
    # for themselves there have local workers only.
    from ostap_parallel.supply.ssh import open_ssh

    return open_ssh(host)


_WAYS: dict[str, OpenWay] = {"ssh": _open_ssh, "srun": open_srun, "qrsh": open_qrsh}


class HostServer(Server):
    """A server on a host, from `start` to `close`."""

    def __init__(self, source: HostSource, watch: Watch) -> None:
        self.source, self.host = source, source.host
        self.about: dict[str, Any] = {}
        self._watch = watch
        self._news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._way: Way | None = None
        self._ways = contextlib.ExitStack()
        self._session: Session | None = None
        self._step = "connect"
        self._deadline = float("inf")
        self._is_queued = False
        self._ids = itertools.count(1)
        self._done: dict[int, threading.Event] = {}
        self._is_up = False
        self._ended = threading.Event()
        self._closing = threading.Event()
        self._beat = threading.Event()  # the answer to the last one
        self._beat.set()
        self._silent = 0.0  # seconds

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
        self._ways.close()

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

    def forward(self, port: int, to: str = LOOPBACK) -> int:
        """Return a port here that leads to a port of loopback there; raises HostError."""
        if self._way is None or not self._is_up:
            raise HostError(self.host.label, "tunnel", "it is not up")
        return self._way.forward(port, to=to)[1]

    def withdraw(self, port: int) -> None:
        """Have a port here lead nowhere."""
        if self._way is not None:
            self._way.withdraw(port)

    def backward(self, port: int) -> int:
        """Return a port of loopback there that leads to a port here; raises HostError."""
        if self._way is None or not self._is_up:
            raise HostError(self.host.label, "tunnel", "it is not up")
        return self._way.backward(port)

    def beat(self, period: float) -> None:
        """See whether the server answers; to be called every `period` seconds.

        What counts is how often it was asked, not the clock: our own process may have stood still.
        """
        self._silent = 0.0 if self._beat.is_set() else self._silent + period
        if self._silent < self.host.keepalive:
            self._beat = self.ask("ping") if self._beat.is_set() else self._beat
        elif self._is_up and not self._closing.is_set():
            reason = f"the server has not answered for {self.host.keepalive} s"
            self._watch.ended(HostError(self.host.label, "run", reason))

    def has_ended(self, timeout: float) -> bool:
        """Wait until the connection has ended; return whether it has."""
        return self._ended.wait(timeout)

    def start(self) -> Grant:
        """Start it; raises HostError, `TryLater` if that may be different later."""
        try:
            return self._start()
        except HostError as exc:
            full = exc.step in ("tmpdir", "copy", "python") and _FULL.search(exc.reason)
            if full and not isinstance(exc, TryLater):
                raise TryLater(exc.host, exc.step, exc.reason) from exc
            raise

    def _start(self) -> Grant:
        with self._watch.slot():
            self._deadline = time.monotonic() + self.source.start_timeout
            # while the way is slow: whoever needs it waits for it
            threading.Thread(target=make_bundle, name="bundle", daemon=True).start()
            directory = self._connect()
            assert self._way is not None
            left = max(1.0, self._deadline - time.monotonic())
            self._watch.step("copy")
            self._way.copy(self._files(), directory, left)
        settings = {
            "ncpus": self.host.ncpus,
            "directory": directory,
            "timeout": self.host.keepalive,
            "tasks_per_worker": self.source.tasks_per_worker,
            "preload": modules_of(self.host.preload),
            "fresh": self.host.start == "spawn",
            "sessions": self.source.sessions,
        }
        if sources := self._sources(directory):
            self._write(_PREPARE.format(sources=sources))
            self._expect("prepared")
        serve = serve_line(self.host)
        self._write(f"{serve}{json.dumps(settings)}\n")
        self.about = self._expect("ready")
        self._watch.step("tunnel")
        address = self._way.forward(self.about["port"], self.source.port)
        self.source.port = address[1]
        key = derive_key(self.source.secret, address[1])
        self._is_up = True
        self.ask("admit", key=key.hex())
        return Grant(Endpoint(address, key), self.host.ncpus, about=self.about)

    def _connect(self) -> str:
        """Open the connection, again if it is dropped; return the private directory there."""
        tmpdir = _quote_path(self.host.tmpdir) if self.host.tmpdir else '"${TMPDIR:-/tmp}"'
        script = Path(__file__).with_name("remote.bash").read_text()
        text = f"{SPARE_LINES}op_mark={shlex.quote(MARK)} op_tmpdir={tmpdir}\n{script}"
        for attempt in range(TRIES):
            self._open()
            try:
                self._write(text)
                return self._greeting()
            except HostError as exc:
                assert self._session is not None
                assert self._way is not None
                words = self._session.last_words
                verdict = self._way.judge(self._session.exit_status, words)
                if not self._ended.is_set() or self._step != "connect" or self._closing.is_set():
                    raise
                if verdict == "passing" or (verdict == "dropped" and attempt == TRIES - 1):
                    raise TryLater(exc.host, exc.step, exc.reason) from exc
                if verdict != "dropped":
                    raise
                logger.info("%s; trying again", exc)
                self._session.close()
                # Many clients that retry together must not meet again.
                time.sleep(random.uniform(0.1, 0.4) * 1.6**attempt)
        raise AssertionError("the loop above returns or raises")

    def _open(self) -> None:
        if self._closing.is_set():
            raise HostError(self.host.label, "connect", "closed while it was starting")
        self._news, self._step = queue.SimpleQueue(), "connect"
        self._watch.step("connect")
        self._ended.clear()
        self._ways.close()
        self._way = self._ways.enter_context(self.open_way())
        self._session = Session(
            self.host.label,
            self._way.argv(),
            self._receive,
            self._overhear,
            self.host.keepalive / BEATS,
            self._way.directory,
        )
        if self._closing.is_set():
            raise HostError(self.host.label, "connect", "closed while it was starting")
        self._session.open()

    def open_way(self) -> AbstractContextManager[Way]:
        """Return the way to the host."""
        return self.source.open_way(self.host)

    def why_ended(self) -> str:
        """Return why the session has ended that was up."""
        assert self._session is not None
        return self._session.last_words or "the server has ended"

    def _greeting(self) -> str:
        """Wait for the directory there; notice if what bash was sent has gone elsewhere."""
        assert self._way is not None
        directory: str | None = None
        while (directory := self._expect("directory", QUIET)) is None:
            if self._is_queued or self._step != "connect" or not self._way.answers():
                continue
            # A program with nothing to read has come and gone, on the same way.
            directory = self._expect("directory", LOST_WORDS)
            if directory is None and self._step == "connect" and not self._is_queued:
                reason = (
                    "it does not begin to read what it is sent: a start-up file there (~/.bashrc, "
                    "~/.profile, $BASH_ENV or the like) reads standard input, which it must leave "
                    "alone where that is no terminal; or it takes longer than any other time"
                )
                raise HostError(self.host.label, "connect", reason)
            if directory is not None:
                break
        return directory

    def _files(self) -> dict[str, bytes]:
        """Return what the host is sent."""
        files = {NAME: bundle(sys.version_info[:2])}
        if self.host.environment is not None:
            files["environment.sh"] = self.host.environment.encode() + b"\n"
        if self.host.script is not None:
            files["script.sh"] = self.host.script.read_bytes()
        return files

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

    def _overhear(self, line: str) -> None:
        """Log what comes on standard error; it may also say that the host has to be waited for."""
        assert self._way is not None
        if reason := self._way.queued(line):
            self._news.put(("queued", reason))
        logger_of(self.host.name).info("%s", line)

    def _receive(self, line: str | None) -> None:
        """Sort what arrives: answers and set-up steps, events of workers, other people's text."""
        if line is None:
            self._end()
        elif not line.startswith(MARK):
            logger_of(self.host.name).debug("%s", line)
        elif not line.startswith(f"{MARK}{{"):
            kind, _, rest = line.removeprefix(MARK).partition(" ")
            self._news.put((kind, rest))
            if kind == "over" and self._is_up:
                self._end()
        else:
            try:
                event = json.loads(line.removeprefix(MARK))
            except ValueError:  # the connection broke in the middle of it
                logger_of(self.host.name).debug("%s", line)
                return
            if event["kind"] == "ready":
                self._news.put(("ready", event))
            elif event["kind"] == "done":
                if done := self._done.pop(event["id"], None):
                    done.set()
            else:
                self._watch.event(event)

    def _end(self) -> None:
        self._is_up, was_up = False, self._is_up
        self._ended.set()
        self._news.put(("ended", ""))
        for done in list(self._done.values()):
            done.set()
        if was_up and not self._closing.is_set():
            self._watch.ended(HostError(self.host.label, "run", self.why_ended()))

    def _expect(self, wanted: str, patience: float | None = None) -> Any:
        """Wait for one piece of news; anything else is the step that failed.

        Return ``None`` if there was none for `patience` seconds.
        """
        assert self._session is not None
        while True:
            left = max(0.0, self._deadline - time.monotonic())
            try:
                limit = left if patience is None else min(left, patience)
                kind, rest = self._news.get(timeout=min(limit, threading.TIMEOUT_MAX))
            except queue.Empty:
                if patience is not None and patience < left:
                    return None
                words = self._session.last_words
                reason = f"not up after {self.source.start_timeout:g} s; {words}"
                raise TryLater(self.host.label, self._step, reason) from None
            if kind == "queued":
                self._is_queued, self._deadline = True, float("inf")
                self._watch.queued(rest)
                continue
            if self._is_queued:
                self._is_queued = False
                self._deadline = time.monotonic() + self.source.start_timeout
                self._watch.granted()
            if kind == wanted:
                return rest
            if kind == "step":
                self._step = rest
                self._watch.step(rest)
            elif kind == "ended":
                raise self._failure()

    def _failure(self) -> HostError:
        """Return the error for a session that has ended, with the exit status of bash."""
        assert self._session is not None
        assert self._way is not None
        status, words = self._session.exit_status, self._session.last_words
        ended = "ended" if status is None else f"ended with exit status {status}"
        if words and self._step != "connect" and self._way.judge(status, words) == "ended":
            words = f"{words} ({ended})"
        return HostError(self.host.label, self._step, words or ended)


def make_bundle() -> None:
    """Have ready what all hosts are sent; if that fails, it does so again for who needs it."""
    with contextlib.suppress(Exception):
        bundle(sys.version_info[:2])


def serve_line(host: HostConfig) -> str:
    """Return the line for bash that starts the server."""
    return _SERVE.format(
        python=_quote_path(host.python),
        mismatch=host.python_mismatch,
        nice=host.nice or 0,
        requires=shlex.quote(" ".join(host.requires)),
    )


def _quote_path(path: str) -> str:
    """Return a path on the host as a word for its bash, ``~/`` at the beginning as the home."""
    if path.startswith("~/"):
        return f'"$HOME"/{shlex.quote(path[2:])}'
    return shlex.quote(path)
