"""A login host, where a batch system's commands are: all of them over one ssh connection."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import threading
from collections.abc import Sequence

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError, SchedulerUnavailable
from ostap_parallel.schedulers.scheduler import Done
from ostap_parallel.supply.private import control_directory
from ostap_parallel.supply.relay import Relay
from ostap_parallel.supply.session import Session
from ostap_parallel.supply.site import Guard
from ostap_parallel.supply.ssh import judge_words, ssh_argv
from ostap_parallel.supply.ways import BEATS, Verdict

# Seconds to reach it.
PATIENCE = 60.0

_READY = "ostap-parallel login"


class Login:
    """A host whose commands are run through a relay; see `site.Site`.

    It is reached when a command is to be run, again if the connection has been lost. What runs
    there ends with that.
    """

    def __init__(self, host: HostConfig) -> None:
        self._host = host
        self._ways = contextlib.ExitStack()
        self._session: Session | None = None
        self._relay: Relay | None = None
        self._ended = threading.Event()
        self._changing = threading.RLock()

    def run(self, argv: Sequence[str], data: str = "", timeout: float = 60.0) -> Done:
        """Run a command of the scheduler's; a `Runner`."""
        relay = self._reach()
        try:
            done = relay.run(argv, data.encode(), timeout)
        except subprocess.TimeoutExpired:
            raise SchedulerUnavailable(argv[0], f"no answer in {timeout:g} s") from None
        if self._ended.is_set():
            raise SchedulerUnavailable(argv[0], self._words())
        return Done(done.status or 0, done.output.decode(errors="replace"), done.words)

    def program(self, argv: Sequence[str]) -> list[str]:
        """Return what runs a command there with our standard input and output."""
        return self._reach().command(argv)

    def guard(self, kind: str) -> Guard:
        """Return a process there that outlives the connection."""
        return Guard(self.program(["bash", "-p"]), kind, is_far=True)

    def close(self) -> None:
        """End the connection, also one that is being made."""
        if (session := self._session) is not None:
            session.close()  # who holds the lock may be waiting for it
        with self._changing:
            session, self._session = self._session, None
            if session is not None:
                session.close()
            self._ways.close()

    def _reach(self) -> Relay:
        """Return the relay to the host; raises HostError, or SchedulerUnavailable for a while."""
        with self._changing:
            if self._session is None or self._ended.is_set():
                self.close()
                self._open()
            assert self._relay is not None
            return self._relay

    def _open(self) -> None:
        host = self._host
        directory = self._ways.enter_context(control_directory())
        program = [*ssh_argv(host, directory / "control"), "--", host.name, "exec bash -l -s"]
        relay = self._relay = Relay(
            host.label, directory, program, keepalive=host.keepalive, judge=judge_words
        )
        ready, ended = threading.Event(), threading.Event()
        self._ended = ended

        def receive(line: str | None) -> None:
            if line is None:
                ended.set()
            if line in (None, _READY):
                ready.set()

        period = host.keepalive / BEATS
        session = self._session = Session(
            host.label, relay.argv(), receive, period=period, directory=directory
        )
        session.open()
        session.write(f"echo {shlex.quote(_READY)}\n")
        if ready.wait(PATIENCE) and not ended.is_set():
            return
        words = self._words()
        verdict: Verdict = "passing"
        if ended.is_set():
            verdict = relay.judge(session.exit_status, session.last_words)
        self.close()
        if verdict in ("dropped", "passing"):
            raise SchedulerUnavailable("ssh", words)
        raise HostError(host.label, "login", words)

    def _words(self) -> str:
        words = "" if self._session is None else self._session.last_words
        return f"{self._host.label}: {words or 'the connection was lost, or took too long'}"
