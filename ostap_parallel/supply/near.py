"""The near end of a relay: a process that leads to the far one over a program, as ``ssh -M`` does.

Standard input and output are those of bash there. By a socket in a private directory more can be
had over the same program: commands, and ports both ways.

Nothing but the script is sent before the far end has greeted: what leads there may still wait in a
queue, and some programs hang that are given more than they can keep meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ostap_parallel.worker.mux import (
    DATA,
    ERRORS,
    EXEC,
    FAILED,
    GRACE,
    GREETING,
    KILL,
    LISTEN,
    LISTENING,
    PART,
    PING,
    REST,
    SIGNAL,
    SIGNALLED,
    Mux,
    Stream,
    listen,
)

_DEATH_SIGNAL = 1  # of prctl: what a process gets when its parent has ended


class Near:
    """The near end: leads from our standard input and output, and from a socket, to the far end.

    Parameters
    ----------
    text
        What has bash run the far end.
    """

    def __init__(self, directory: str, keepalive: float, argv: list[str], text: bytes) -> None:
        self._keepalive = keepalive
        self._text = text
        self._name = argv[0]
        self._status: int | None = None
        self._asked: dict[int, socket.socket] = {}  # who waits for a port there
        self._control = socket.socket(socket.AF_UNIX)
        self._control.bind(f"{directory}/relay")
        self._control.listen(128)
        self._program = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # srun is two processes
            preexec_fn=_bound(),
        )
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        signal.signal(signal.SIGTERM, self._terminate)
        self._reader, self._writer = self._program.stdout.fileno(), self._program.stdin.fileno()

    def _terminate(self, *_: object) -> None:
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._program.wait(REST)
        self._signal(signal.SIGKILL)  # qrsh in a queue may not mind the first one for long
        os._exit(FAILED)

    def _signal(self, number: int) -> None:
        """Send a signal to the program, and to what it has started."""
        with contextlib.suppress(OSError):
            os.killpg(self._program.pid, number)

    def run(self) -> int:
        """Lead there and back until one of the ends has gone; return the exit status."""
        rest = self._greet()
        if rest is None:
            return self._end()
        mux = self._mux = Mux(self._reader, self._writer, 1)
        mux.on(LISTENING, self._tell_port)
        mux.on(SIGNAL, lambda number, data: self._tell_signal(data.decode()))
        mux.watched[self._control.fileno()] = self._accept
        self._start(["bash", "-s"], [0, 1], self._take_status, session=True)
        mux.feed(rest)
        period = self._keepalive / 3
        beat = time.monotonic() + period
        while mux.is_open and self._status is None:
            mux.step(max(0.0, beat - time.monotonic()))
            if time.monotonic() >= beat:
                beat = time.monotonic() + period
                mux.send(PING, 0)
        deadline = time.monotonic() + GRACE
        while any(not one.is_flushed() for one in mux.streams.values()):
            if time.monotonic() > deadline:
                break
            mux.step(0.1)
        return self._end()

    def _greet(self) -> bytes | None:
        """Start the far end; return what came behind its greeting, ``None`` if that did not."""
        try:
            os.write(self._writer, self._text)
        except OSError:
            return None
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        poll.register(0, 0)  # only whether who we work for has gone
        before = b""
        while GREETING not in before:
            for descriptor, _ in poll.poll():
                if descriptor == 0:
                    self._signal(signal.SIGTERM)
                    return None
            data = os.read(self._reader, PART)
            if not data:
                sys.stderr.buffer.write(before)
                return None
            before += data
        noise, _, rest = before.partition(GREETING)
        sys.stderr.buffer.write(noise)
        sys.stderr.flush()
        return rest

    def _end(self) -> int:
        """Have the program end; return our exit status."""
        for pipe in (self._program.stdin, self._program.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._program.wait(GRACE + REST)
                break
            except subprocess.TimeoutExpired:
                self._signal(number)
        status = self._program.wait()
        if self._status is None:
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            sys.stderr.write(f"{self._name} has ended: {how}\n")
        return FAILED if self._status is None else self._status

    def _take_status(self, status: int) -> None:
        self._status = status

    def _start(
        self,
        argv: list[str],
        descriptors: list[int],
        on_end: Callable[[int], None],
        session: bool = False,
    ) -> Stream:
        stream = self._mux.open(on_end)
        stream.read_from(descriptors[0], DATA)
        for descriptor, kind in zip(descriptors[1:], (DATA, ERRORS), strict=False):
            stream.write_to(descriptor, kind)
        order = {"argv": argv, "session": session}
        self._mux.send(EXEC, stream.number, json.dumps(order).encode())
        return stream

    def _accept(self) -> None:
        client, _ = self._control.accept()
        client.settimeout(GRACE)  # all streams wait meanwhile
        descriptors: list[int] = []
        try:
            data, descriptors, _, _ = socket.recv_fds(client, PART, 3)
            while not data.endswith(b"\n"):  # it may come in parts
                more = client.recv(PART)
                if not more:
                    raise ValueError("it has broken off")
                data += more
            order = json.loads(data)
        except (OSError, ValueError):
            for descriptor in descriptors:
                os.close(descriptor)
            client.close()
            return
        client.settimeout(None)
        if order["do"] == "exec":
            self._execute(client, order["argv"], descriptors)
        elif order["do"] == "forward":
            with client:
                client.sendall(b"%d\n" % self._forward(order["port"], order["wanted"]))
        else:
            stream = self._mux.open()
            self._asked[stream.number] = client
            self._mux.send(LISTEN, stream.number, str(order["port"]).encode())

    def _execute(self, client: socket.socket, argv: list[str], descriptors: list[int]) -> None:
        def end(status: int) -> None:
            self._mux.watched.pop(client.fileno(), None)
            with client, contextlib.suppress(OSError):
                client.sendall(b"%d\n" % status)

        def leave() -> None:  # whoever wanted it has gone
            if not client.recv(1):
                self._mux.send(KILL, stream.number)
                self._mux.forget(stream.number)

        stream = self._start(argv, descriptors, end)
        self._mux.watched[client.fileno()] = leave

    def _forward(self, port: int, wanted: int) -> int:
        listener = listen(wanted)

        def accept() -> None:
            with contextlib.suppress(OSError):
                self._mux.open_socket(listener.accept()[0], port)

        self._mux.watched[listener.fileno()] = accept
        found: int = listener.getsockname()[1]
        return found

    def _tell_port(self, number: int, data: bytes) -> None:
        self._mux.streams.pop(number, None)
        with self._asked.pop(number) as client, contextlib.suppress(OSError):
            client.sendall(data + b"\n")

    def _tell_signal(self, name: str) -> None:
        sys.stderr.write(SIGNALLED + name + "\n")
        sys.stderr.flush()


def _bound() -> Callable[[], object] | None:
    """Return what has a child of ours end when we do, however that is; ``None`` where none can.

    Of srun and qrsh, which wait in a queue, no end of standard input is noticed.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        prctl = ctypes.CDLL(None).prctl  # of Linux only
        return lambda: prctl(_DEATH_SIGNAL, signal.SIGTERM)
    return None


def execute(path: str, argv: list[str]) -> int:
    """Run a command at the far end with our descriptors; return its exit status."""
    with socket.socket(socket.AF_UNIX) as control:
        order(control, path, argv, [0, 1, 2])
        for descriptor in (0, 1):
            os.close(descriptor)
        return status_of(control)


def order(control: socket.socket, path: str, argv: list[str], descriptors: list[int]) -> None:
    """Have a near end, which has a socket at `path`, run a command at the far one."""
    control.connect(path)
    data = json.dumps({"do": "exec", "argv": argv}).encode() + b"\n"
    sent = socket.send_fds(control, [data], descriptors)
    if sent < len(data):  # to send nothing fails where the command has ended already
        control.sendall(data[sent:])


def status_of(control: socket.socket) -> int:
    """Wait for the exit status of a command; what has broken off has ours."""
    answer = b""
    while not answer.endswith(b"\n"):
        data = control.recv(64)
        if not data:
            return FAILED
        answer += data
    return int(answer)


def main(argv: list[str]) -> int:
    """Be the near end (DIRECTORY KEEPALIVE PROGRAM...), or run a command (SOCKET ARGV...)."""
    if argv[0] == "exec":
        return execute(argv[1], argv[2:])
    text = Path(argv[0], "far").read_bytes()
    return Near(argv[0], float(argv[1]), argv[2:], text).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
