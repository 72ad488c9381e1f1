"""Many streams over the standard input and output of one program, whatever leads to a machine.

``relay.py near DIRECTORY KEEPALIVE PROGRAM...`` is used as ``ssh -M`` is: the program leads to
bash on the machine, and so do our own standard input and output then. By a socket in the directory
more can be had over the same program: other commands there (``relay.py exec SOCKET ARGV...``), and
ports, both ways. The far end is the same file, which bash is sent and has python3 run, so it makes
do with any Python 3.6 and the standard library: no f"{x=}", no walrus, nothing of this package.

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
import struct
import subprocess
import sys
import time
from collections.abc import Callable

# Begins what the far end says; what was there before is of start-up files.
GREETING = b"\x1eostap-parallel relay 1\n"

# Begins a line on our standard error that names a signal that the far end has got.
SIGNALLED = "\x1eostap-parallel signal "

# Our exit status where the program has failed, and not what it leads to.
FAILED = 254

# Bytes of a stream that may be on their way, so that none of them takes the room of others.
WINDOW = 1 << 20
PART = 1 << 16

# Seconds that what runs on the far end has to end by itself when the near one has gone; and for
# which output is waited for once a command has ended.
GRACE = 5.0
REST = 1.0

_HEAD = struct.Struct(">cII")  # the kind, the stream, and how many bytes follow
EXEC, CONNECT, LISTEN, LISTENING = b"E", b"T", b"L", b"B"
DATA, ERRORS, END, ACK, STATUS, KILL = b"D", b"R", b"F", b"A", b"S", b"K"
PING, SIGNAL = b"P", b"N"

_FAR_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class Stream:
    """One stream: what is read here goes there, and what comes from there is written here.

    Attributes
    ----------
    sources
        Descriptors to read from, with the kind that their bytes go by.
    sinks
        Descriptors to write to, with what waits to be written, by the same kinds.
    credit
        Bytes that may still be sent.
    on_end
        Called with the status when the other end has told it, and all has been written.
    """

    def __init__(self, number: int, on_end: Callable[[int], None] | None = None) -> None:
        self.number = number
        self.sources: dict[int, bytes] = {}
        self.sinks: dict[bytes, int] = {}
        self.waiting: dict[bytes, bytearray] = {}
        self.ending: set[bytes] = set()  # sinks that are closed when all is written
        self.credit = WINDOW
        self.owed = 0  # bytes taken that the other end has not been told of
        self.on_end = on_end
        self.status: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.has_ended = False
        self.read_at = 0.0

    def read_from(self, descriptor: int, kind: bytes) -> None:
        """Send what can be read."""
        self.sources[descriptor] = kind

    def write_to(self, descriptor: int, kind: bytes) -> None:
        """Write what comes."""
        os.set_blocking(descriptor, False)
        self.sinks[kind], self.waiting[kind] = descriptor, bytearray()

    def is_flushed(self) -> bool:
        """Return whether all that came has been written."""
        return not any(self.waiting.values())


class Mux:
    """Streams over a pair of descriptors, one end of it. Runs in one thread."""

    def __init__(self, reader: int, writer: int, first: int) -> None:
        self.streams: dict[int, Stream] = {}
        self.watched: dict[int, Callable[[], None]] = {}  # further descriptors to read from
        self.is_open = True
        self.heard = time.monotonic()
        self._reader, self._writer = reader, writer
        self._next = first  # the two ends number theirs oddly and evenly
        self._in, self._out = bytearray(), bytearray()
        os.set_blocking(writer, False)
        self._handlers: dict[bytes, Callable[[int, bytes], None]] = {
            DATA: self._take_data,
            ERRORS: lambda number, data: self._take(number, ERRORS, data),
            END: self._take_end,
            ACK: self._take_ack,
            STATUS: self._take_status,
            KILL: lambda number, data: self.forget(number),
            CONNECT: self._take_connect,
            PING: lambda number, data: None,
        }

    def on(self, kind: bytes, handler: Callable[[int, bytes], None]) -> None:
        """Have a handler called for messages of a kind."""
        self._handlers[kind] = handler

    def open(self, on_end: Callable[[int], None] | None = None) -> Stream:
        """Return a new stream."""
        self._next += 2
        stream = self.streams[self._next] = Stream(self._next, on_end)
        return stream

    def open_socket(self, connection: socket.socket, port: int) -> None:
        """Have a connection lead to a port of loopback at the other end."""
        self._join(self.open(), connection)
        self.send(CONNECT, self._next, str(port).encode())

    def send(self, kind: bytes, number: int, data: bytes = b"") -> None:
        """Send a message."""
        self._out += _HEAD.pack(kind, number, len(data)) + data

    def step(self, timeout: float) -> None:
        """Wait until something can be done, and do it."""
        poll = select.poll()
        wanted: dict[int, int] = {}
        readers: dict[int, tuple[Stream, bytes]] = {}
        writers: dict[int, tuple[Stream, bytes]] = {}
        if self.is_open:
            wanted[self._reader] = select.POLLIN
        if self._out and self.is_open:
            wanted[self._writer] = wanted.get(self._writer, 0) | select.POLLOUT
        for descriptor in self.watched:
            wanted[descriptor] = select.POLLIN
        for stream in self.streams.values():
            for descriptor, kind in stream.sources.items():
                if stream.credit > 0:
                    wanted[descriptor] = wanted.get(descriptor, 0) | select.POLLIN
                    readers[descriptor] = stream, kind
            for kind, descriptor in stream.sinks.items():
                if stream.waiting[kind]:
                    wanted[descriptor] = wanted.get(descriptor, 0) | select.POLLOUT
                    writers[descriptor] = stream, kind
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        for descriptor, events in poll.poll(timeout * 1000):
            broken = events & (select.POLLERR | select.POLLNVAL)
            if descriptor == self._writer and (events & select.POLLOUT or broken):
                self._flush()
            if descriptor in writers and (events & select.POLLOUT or broken):
                self._write(*writers[descriptor])
            if events & (select.POLLIN | select.POLLHUP) or broken:
                if descriptor == self._reader:
                    self._read()
                elif descriptor in self.watched:
                    self.watched[descriptor]()
                elif descriptor in readers:
                    self._pass_on(descriptor, *readers[descriptor])
        for stream in list(self.streams.values()):
            self._finish(stream)

    def is_sent(self) -> bool:
        """Return whether nothing waits to be sent, or cannot be any more."""
        return not self._out or not self.is_open

    def feed(self, data: bytes) -> None:
        """Take what has been read from the other end."""
        self._in += data
        self.heard = time.monotonic()
        while len(self._in) >= _HEAD.size:
            kind, number, size = _HEAD.unpack_from(self._in)
            if len(self._in) < _HEAD.size + size:
                break
            payload = bytes(self._in[_HEAD.size : _HEAD.size + size])
            del self._in[: _HEAD.size + size]
            self._handlers[kind](number, payload)

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(self._reader, 4 * PART)
        if data:
            self.feed(data)
        else:
            self.is_open = False

    def _flush(self) -> None:
        try:
            with memoryview(self._out) as view:
                count = os.write(self._writer, view[: 4 * PART])
            del self._out[:count]
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False

    def _pass_on(self, descriptor: int, stream: Stream, kind: bytes) -> None:
        if self.streams.get(stream.number) is not stream:  # its descriptor may be another's
            return
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(descriptor, min(PART, stream.credit))
        if data:
            stream.credit -= len(data)
            stream.read_at = time.monotonic()
            self.send(kind, stream.number, data)
            return
        if stream.sources.pop(descriptor, None) == DATA:
            self.send(END, stream.number)
        if stream.socket is None:
            os.close(descriptor)

    def _take_data(self, number: int, data: bytes) -> None:
        self._take(number, DATA, data)

    def _take(self, number: int, kind: bytes, data: bytes) -> None:
        stream = self.streams.get(number)
        if stream is not None and kind in stream.sinks:
            stream.waiting[kind] += data
            self._write(stream, kind)
        else:  # nobody wants it any more, but the other end may want to go on
            self._acknowledge(number, len(data))

    def _acknowledge(self, number: int, count: int) -> None:
        self.send(ACK, number, str(count).encode())

    def _write(self, stream: Stream, kind: bytes) -> None:
        if self.streams.get(stream.number) is not stream:
            return
        waiting = stream.waiting[kind]
        count = 0
        try:
            with memoryview(waiting) as view:
                count = os.write(stream.sinks[kind], view[:PART])
        except BlockingIOError:
            return
        except OSError:  # who should read it has gone
            count = len(waiting)
            stream.ending.add(kind)
        del waiting[:count]
        stream.owed += count
        if stream.owed >= WINDOW // 4:  # each small message may be held back by TCP for a while
            self._acknowledge(stream.number, stream.owed)
            stream.owed = 0

    def _take_end(self, number: int, data: bytes) -> None:
        if number in self.streams:
            self.streams[number].ending.add(DATA)

    def _take_ack(self, number: int, data: bytes) -> None:
        if number in self.streams:
            self.streams[number].credit += int(data)

    def _take_status(self, number: int, data: bytes) -> None:
        if number in self.streams:
            self.streams[number].status = int(data)

    def _take_connect(self, number: int, data: bytes) -> None:
        try:
            connection = socket.create_connection(("127.0.0.1", int(data)), timeout=GRACE)
        except OSError:
            self.send(KILL, number)
            return
        stream = self.streams[number] = Stream(number)
        self._join(stream, connection)

    def _join(self, stream: Stream, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.socket = connection
        stream.read_from(connection.fileno(), DATA)
        stream.write_to(connection.fileno(), DATA)

    def _finish(self, stream: Stream) -> None:
        """Close what has ended."""
        for kind in list(stream.ending):
            if kind in stream.sinks and not stream.waiting[kind]:
                descriptor = stream.sinks.pop(kind)
                if stream.socket is None:
                    os.close(descriptor)
                else:
                    with contextlib.suppress(OSError):
                        stream.socket.shutdown(socket.SHUT_WR)
        if stream.socket is not None:
            has_ended = not stream.sources and not stream.sinks
        else:
            has_ended = stream.status is not None and stream.is_flushed()
        if has_ended:
            self.forget(stream.number)

    def forget(self, number: int) -> None:
        """Close all of a stream."""
        stream = self.streams.pop(number, None)
        if stream is None:
            return
        if stream.socket is not None:
            stream.socket.close()
        else:
            for descriptor in {*stream.sources, *stream.sinks.values()}:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        if stream.process is not None and stream.process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(stream.process.pid, signal.SIGTERM)
        if stream.on_end is not None:
            stream.on_end(FAILED if stream.status is None else stream.status)


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
        for number in (*_FAR_SIGNALS, signal.SIGCHLD):
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


def listen(port: int) -> socket.socket:
    """Return a listener on a port of loopback, or on any if that is taken."""
    listener = socket.socket()
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return listener


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
        self._control.bind(os.path.join(directory, "relay"))  # noqa: PTH118
        self._control.listen(128)
        self._program = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        signal.signal(signal.SIGTERM, self._terminate)
        self._reader, self._writer = self._program.stdout.fileno(), self._program.stdin.fileno()

    def _terminate(self, *_: object) -> None:
        self._program.terminate()
        os._exit(FAILED)

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
                    self._program.terminate()
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
        for end in (self._program.terminate, self._program.kill):
            try:
                self._program.wait(GRACE + REST)
                break
            except subprocess.TimeoutExpired:
                end()
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
        for descriptor, kind in zip(descriptors[1:], (DATA, ERRORS)):  # noqa: B905
            stream.write_to(descriptor, kind)
        order = {"argv": argv, "session": session}
        self._mux.send(EXEC, stream.number, json.dumps(order).encode())
        return stream

    def _accept(self) -> None:
        client, _ = self._control.accept()
        try:
            data, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
            order = json.loads(data)
        except (OSError, ValueError):
            client.close()
            return
        if order["do"] == "exec":
            self._execute(client, order["argv"], list(descriptors))
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


def execute(path: str, argv: list[str]) -> int:
    """Run a command at the far end with our descriptors; return its exit status."""
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(path)
        order = json.dumps({"do": "exec", "argv": argv}).encode()
        socket.send_fds(control, [order], [0, 1, 2])
        for descriptor in (0, 1):
            os.close(descriptor)
        answer = b""
        while not answer.endswith(b"\n"):
            data = control.recv(64)
            if not data:
                return FAILED
            answer += data
        return int(answer)


def main(argv: list[str]) -> int:
    """Be one of the ends, or a command."""
    if argv[0] == "exec":
        return execute(argv[1], argv[2:])
    if argv[0] == "near":
        with open(os.path.join(argv[1], "far"), "rb") as file:  # noqa: PTH118, PTH123
            return Near(argv[1], float(argv[2]), argv[3:], file.read()).run()
    return Far(float(argv[1])).run()


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
