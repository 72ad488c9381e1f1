"""The far end of a relay: starts what it is told to, and leads to ports of loopback.

It is sent as text, behind that of `mux`, and run by any Python from 3.6 on, see there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from ostap_parallel.worker.mux import (
    DATA,
    ERRORS,
    EXEC,
    GRACE,
    GREETING,
    LISTEN,
    LISTENING,
    REST,
    SIGNAL,
    STATUS,
    Mux,
    Stream,
    listen,
)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class Far:
    """The far end: starts what it is told to, until the near end has gone, or is silent."""

    def __init__(self, keepalive: float) -> None:
        self._keepalive = keepalive
        self._status = 0
        self._session = 0
        os.write(1, GREETING)
        self._mux = Mux(0, 1, 0)
        self._mux.on(EXEC, self._execute)
        self._mux.on(LISTEN, self._listen)
        self._signals, writer = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._mux.watched[self._signals] = self._notice

    def run(self) -> int:
        """Serve; return the exit status of the session."""
        mux = self._mux
        while mux.is_open and time.monotonic() - mux.heard < self._keepalive:
            mux.step(REST)
            self._settle()
        deadline = time.monotonic() + GRACE
        for stream in mux.streams.values():
            stream.ending.add(DATA)  # who reads from us sees the end
            stream.waiting[DATA] = bytearray()
        while self._running() and time.monotonic() < deadline:
            mux.step(0.1)
            self._settle()
        for stream in self._running():
            assert stream.process is not None
            with contextlib.suppress(OSError):
                os.killpg(stream.process.pid, signal.SIGKILL)
        return self._status

    def _running(self) -> list[Stream]:
        streams = self._mux.streams.values()
        return [one for one in streams if one.process is not None and one.process.poll() is None]

    def _notice(self) -> None:
        for number in os.read(self._signals, 512):
            if number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                self._mux.send(SIGNAL, 0, signal.Signals(number).name.encode())

    def _execute(self, number: int, data: bytes) -> None:
        order = json.loads(data.decode())
        stream = self._mux.streams[number] = Stream(number)
        errors = None if order["session"] else subprocess.PIPE
        if order["session"]:
            self._session = number
        try:  # in a session of its own: a batch system signals our whole group
            process = stream.process = subprocess.Popen(
                order["argv"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as exc:
            text = order["argv"][0] + ": " + str(exc.strerror) + "\n"
            self._mux.send(ERRORS, number, text.encode())
            self._mux.send(STATUS, number, b"127")
            del self._mux.streams[number]
            return
        assert process.stdin is not None
        assert process.stdout is not None
        stream.write_to(os.dup(process.stdin.fileno()), DATA)
        stream.read_from(os.dup(process.stdout.fileno()), DATA)
        if process.stderr is not None:
            stream.read_from(os.dup(process.stderr.fileno()), ERRORS)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def _settle(self) -> None:
        """Tell the status of what has ended, behind its output."""
        now = time.monotonic()
        for stream in list(self._mux.streams.values()):
            if stream.process is None or stream.process.poll() is None:
                continue
            if not stream.has_ended:
                stream.has_ended, stream.read_at = True, now
            if stream.sources and (stream.credit <= 0 or now - stream.read_at < REST):
                continue  # there is more; what it has left behind may keep that open, and silent
            status = stream.process.returncode
            status = status if status >= 0 else 128 - status
            if stream.number == self._session:
                self._status = status
            self._mux.send(STATUS, stream.number, str(status).encode())
            self._mux.forget(stream.number)

    def _listen(self, number: int, data: bytes) -> None:
        listener = listen(0)
        port = listener.getsockname()[1]

        def accept() -> None:
            with contextlib.suppress(OSError):
                self._mux.open_socket(listener.accept()[0], int(data))

        self._mux.watched[listener.fileno()] = accept
        self._mux.send(LISTENING, number, str(port).encode())


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # as ssh does; a job may have been started elsewhere
        os.chdir(os.path.expanduser("~"))  # noqa: PTH111
    os._exit(Far(float(sys.argv[1])).run())
