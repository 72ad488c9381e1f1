"""A program with bash at its other end, and lines going both ways."""

from __future__ import annotations

import collections
import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ostap_parallel.errors import HostError
from ostap_parallel.logs import logger_of
from ostap_parallel.supply.processes import close_apart, exit_status, lines_of, start_apart

logger = logger_of(__name__)

# Seconds until the last words are there, once the program has ended. A ProxyCommand of ssh's that
# hangs keeps the pipe open; it may also be a master that others share, and is ssh's to end.
LAST_WORDS = 2.0


def _ignore(line: str) -> None:
    """Do nothing."""


class Session:
    """What reaches bash on a machine: ssh, srun or the like, tied to the life of this process.

    Parameters
    ----------
    label
        The machine, as errors name it.
    argv
        The program. Its other end reads bash text on standard input.
    on_line
        Called with each line that arrives on standard output, from a thread; with ``None`` when
        the connection has ended. If it raises, that line is lost.
    on_words
        Called with each line of standard error, from another thread.
    period
        Seconds after which a server there is told that we live.
    directory
        What the program needs; it is removed when the session has ended, however we have.
    """

    def __init__(
        self,
        label: str,
        argv: Sequence[str],
        on_line: Callable[[str | None], None],
        on_words: Callable[[str], None] = _ignore,
        period: float = 15.0,
        directory: Path | None = None,
    ) -> None:
        self.label = label
        self._argv = argv
        self._on_line = on_line
        self._on_words = on_words
        self._period = period
        self._directory = directory
        self._last_words: collections.deque[str] = collections.deque(maxlen=20)
        self._write_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._noticed = False
        self._owner = os.getpid()  # a fork may not end it

    def open(self) -> None:
        """Start the program; the lines that arrive tell whether it connects."""
        with self._write_lock:
            if self._closed:
                raise HostError(self.label, "connect", "closed while it was starting")
            try:
                process = self._start()
            except OSError as exc:
                reason = f"{self._argv[0]} or bash cannot be started: {exc}"
                if self._argv[0] == "ssh":
                    reason += "; is an OpenSSH client installed?"
                raise HostError(self.label, "connect", reason) from exc
        errors = threading.Thread(target=self._read_errors, args=[process.stderr], daemon=True)
        lines = threading.Thread(target=self._read_lines, args=[process, errors], daemon=True)
        self._threads = [errors, lines]
        for thread in self._threads:
            thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the program, and what it reads from; see lifeline.bash."""
        script = Path(__file__).with_name("lifeline.bash")
        lifeline = self._lifeline = start_apart(
            # -p: no BASH_ENV, may print
            ["bash", "-p", "--", str(script), str(self._period), str(self._directory or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert lifeline.stdin is not None
        assert lifeline.stdout is not None
        try:
            process = self._process = start_apart(
                self._argv,
                restore=True,
                stdin=lifeline.stdout,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        finally:
            close_apart(lifeline.stdout)
        with contextlib.suppress(OSError):
            lifeline.stdin.write(b"%d\n" % process.pid)
            lifeline.stdin.flush()
        return process

    @property
    def last_words(self) -> str:
        """The last lines of the program's and the remote scripts' standard error."""
        return "\n".join(self._last_words)

    @property
    def exit_status(self) -> int | None:
        """The exit status of the program; ``None`` while it runs, or if it cannot be known."""
        return None if self._process is None else exit_status(self._process)

    def write(self, text: str) -> None:
        """Send text to the other end; raises HostError if the connection is gone."""
        with self._write_lock:
            if self._lifeline is None or self._lifeline.stdin is None or self._closed:
                raise HostError(self.label, "run", "the connection is closed")
            try:
                self._lifeline.stdin.write(text.encode())
                self._lifeline.stdin.flush()
            except OSError as exc:
                reason = self.last_words or f"the connection was lost: {exc}"
                raise HostError(self.label, "run", reason) from exc

    def hang_up(self) -> None:
        """End standard input: the other end sees that, cleans up and ends the session."""
        if self._owner != os.getpid():
            return
        with self._write_lock:
            self._closed = True
            if self._lifeline is not None and self._lifeline.stdin is not None:
                close_apart(self._lifeline.stdin)

    def close(self, patience: float = 3.0) -> None:
        """End the session; after `patience` seconds end the program, as the other end sees."""
        if self._owner != os.getpid():
            return
        self.hang_up()
        process, lifeline = self._process, self._lifeline
        if process is not None:
            for end in (process.terminate, process.kill):
                try:
                    process.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    end()
            process.wait()
        if lifeline is not None:  # it has read the end of all and has nobody left to tell
            lifeline.kill()
            lifeline.wait()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(LAST_WORDS)

    def _read_errors(self, stream: IO[bytes]) -> None:
        try:
            for raw in stream:
                for line in lines_of(raw):
                    self._last_words.append(line)
                    with self._guarded():
                        self._on_words(line)
        finally:
            close_apart(stream)

    def _read_lines(self, process: subprocess.Popen[bytes], errors: threading.Thread) -> None:
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                with self._guarded():
                    self._on_line(raw.decode("utf-8", "backslashreplace").rstrip("\n"))
        finally:
            close_apart(process.stdout)
        errors.join(LAST_WORDS)  # so that the last words are complete
        process.wait()
        with self._guarded():
            self._on_line(None)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Go on reading whatever a callback of the user's raises; say so once."""
        try:
            yield
        except Exception:
            notice, self._noticed = not self._noticed, True
            if notice:
                with contextlib.suppress(Exception):  # a log handler may be what raises
                    text = "%s: a line that came from there is lost; more may be"
                    logger.warning(text, self.label, exc_info=True)
