"""One OpenSSH connection per host; copying and forwarding go through it.

The user's own ssh decides about user, port, key, jump host and Kerberos: what works as
``ssh host true`` works here. The first session on the connection runs ``bash -s``, so whatever
the login shell is, every command is bash text on standard input and never meets another shell.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import io
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pathos.secure import Copier as PathosCopier
from pathos.secure import Tunnel as PathosTunnel

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError

logger = logging.getLogger(__name__)

# What ssh says where a server or a gateway drops connections because too many come at once
# (MaxStartups in sshd_config): those are worth another try.
DROPPED = re.compile(
    r"kex_exchange_identification|ssh_exchange_identification|banner exchange"
    r"|Connection (closed|reset) by|Broken pipe|timeout: invalid message"
)
TRIES = 8

# In the time that makes a silent host a lost one, each side can be heard this often.
BEATS = 3

# Seconds until ssh's last words are there, once it has ended. A ProxyCommand that hangs keeps the
# pipe open; it may also be a master that others share, and is ssh's to end.
LAST_WORDS = 2.0

_DIRECTORY_PREFIX = "ostap-parallel-"


@contextmanager
def control_directory() -> Iterator[Path]:
    """Make a private directory for control sockets; remove it, and those of dead processes."""
    # A socket's path may have some 100 bytes, and ssh adds 17 of its own while it binds. In it
    # ssh gives a meaning to %, $, quotes and white space.
    parent = tempfile.gettempdir()
    if len(parent) > 40 or not re.fullmatch("[A-Za-z0-9_./+-]*", parent):
        parent = "/tmp"
    _remove_stale(Path(parent))
    mine = f"{_DIRECTORY_PREFIX}{os.getpid()}-"
    with (
        tempfile.TemporaryDirectory(prefix=mine, dir=parent, ignore_cleanup_errors=True) as path,
        _opened(path) as directory,
    ):
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(directory, fcntl.LOCK_SH)
        yield Path(path)


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f"{_DIRECTORY_PREFIX}*-*"):
        pid = path.name.removeprefix(_DIRECTORY_PREFIX).split("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdigit() and path.lstat().st_uid == os.getuid():
                try:
                    os.kill(int(pid), 0)
                except ProcessLookupError:
                    # A container that shares this directory has other processes: one that
                    # lives there holds its lock.
                    with _opened(path) as directory:
                        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _opened(directory: str | Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def ssh_argv(host: HostConfig, control: Path) -> list[str]:
    """Return ``ssh`` and its options for a connection that shares `control`; no destination.

    What we rely on stands first, then the user's options, then defaults: ssh takes the first.
    """
    argv = ["ssh", "-T", "-x", f"-oControlPath={control}", "-oControlPersist=no"]
    argv += ["-oBatchMode=yes", "-oRemoteCommand=none", "-oPermitLocalCommand=no"]
    argv += ["-oControlMaster=yes", "-oClearAllForwardings=yes"]
    if host.user is not None:
        argv.append(f"-l{host.user}")
    if host.port is not None:
        argv.append(f"-p{host.port}")
    argv += host.ssh_options
    if host.ssh_config is not None:
        argv.append(f"-F{host.ssh_config}")  # of these ssh takes the last
    interval = max(1, host.keepalive // BEATS)
    argv += [f"-oServerAliveInterval={interval}", f"-oServerAliveCountMax={BEATS}"]
    return [*argv, "-oConnectTimeout=10", "-oLogLevel=ERROR"]


class Session:
    """The connection to one host, with bash at its other end.

    Parameters
    ----------
    on_line
        Called with each line that arrives on standard output, from a thread; with ``None`` when
        the connection has ended.
    """

    def __init__(
        self, host: HostConfig, control: Path, on_line: Callable[[str | None], None]
    ) -> None:
        self.host = host
        self.control = control
        self._on_line = on_line
        self._last_words: collections.deque[str] = collections.deque(maxlen=20)
        self._write_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._closed = False

    def open(self) -> None:
        """Start ssh; the lines that arrive tell whether it connects."""
        argv = ssh_argv(self.host, self.control)
        self._last_words.clear()
        with self._write_lock:
            if self._closed:
                raise HostError(self.host.label, "connect", "closed while it was starting")
            try:
                self._lifeline = self._start_lifeline()
                assert self._lifeline.stdout is not None
                with self._lifeline.stdout as stdin:
                    self._process = subprocess.Popen(
                        [*argv, "--", self.host.name, "exec bash -s"],
                        stdin=stdin,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        start_new_session=True,  # Ctrl-C in the terminal is for us to handle
                    )
            except OSError as exc:
                reason = f"ssh or bash cannot be started: {exc}; is an OpenSSH client installed?"
                raise HostError(self.host.label, "connect", reason) from exc
        assert self._process.stderr is not None
        assert self._process.stdout is not None
        errors = threading.Thread(
            target=self._relay_errors, args=[self._process.stderr], daemon=True
        )
        lines = threading.Thread(
            target=self._read_lines, args=[self._process, errors], daemon=True
        )
        self._threads = [errors, lines]
        for thread in self._threads:
            thread.start()

    def _start_lifeline(self) -> subprocess.Popen[bytes]:
        """Start what ssh reads from; see lifeline.bash."""
        script = Path(__file__).with_name("lifeline.bash")
        return subprocess.Popen(  # -p: without BASH_ENV, which may print
            ["bash", "-p", "--", str(script), str(self.host.keepalive / BEATS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def last_words(self) -> str:
        """The last lines of ssh's and the remote scripts' standard error."""
        return "\n".join(self._last_words)

    @property
    def exit_status(self) -> int | None:
        """The exit status of ssh, once it has ended."""
        return None if self._process is None else self._process.poll()

    def write(self, text: str) -> None:
        """Send text to the other end; raises HostError if the connection is gone."""
        with self._write_lock:
            if self._lifeline is None or self._lifeline.stdin is None or self._closed:
                raise HostError(self.host.label, "run", "the connection is closed")
            try:
                self._lifeline.stdin.write(text.encode())
                self._lifeline.stdin.flush()
            except OSError as exc:
                reason = self.last_words or f"the connection was lost: {exc}"
                raise HostError(self.host.label, "run", reason) from exc

    def hang_up(self) -> None:
        """End standard input: the other end sees that, cleans up and ends the session."""
        with self._write_lock:
            self._closed = True
            if self._lifeline is not None and self._lifeline.stdin is not None:
                with contextlib.suppress(OSError):
                    self._lifeline.stdin.close()

    def close(self, patience: float = 3.0) -> None:
        """End the session; after `patience` seconds end ssh, which the other end sees likewise."""
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
        if process is None:
            return
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(LAST_WORDS)
        self.control.unlink(missing_ok=True)  # where ssh had no time to

    def command(self, *options: str) -> list[str]:
        """Return an ssh command that uses this connection or fails.

        Without ProxyCommand ssh would open a connection of its own where the server refuses
        another session (MaxSessions), without a word. The user's configuration has nothing to
        add to a connection that is there, but forwards of its own.
        """
        shared = ["-F", "none", "-S", str(self.control), "-oControlMaster=no", "-T"]
        shared += ["-oProxyCommand=false", "-oBatchMode=yes", "-oLogLevel=ERROR"]
        return ["ssh", *shared, *options, "--", self.host.name]

    def _relay_errors(self, stream: IO[bytes]) -> None:
        log = logging.getLogger(self.host.name)
        with stream:
            for raw in stream:
                if line := raw.decode("utf-8", "backslashreplace").rstrip():
                    self._last_words.append(line)
                    log.info("%s", line)

    def _read_lines(self, process: subprocess.Popen[bytes], errors: threading.Thread) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for raw in lines:
                self._on_line(raw.decode("utf-8", "backslashreplace").rstrip("\n"))
        errors.join(LAST_WORDS)  # so that the last words are complete
        process.wait()
        self._on_line(None)


class Copier(PathosCopier):  # type: ignore[misc]
    """pathos' copier, which sends a local directory's files through a session's connection.

    It does not use scp: with a start-up file that prints, which many have, scp fails; bash does
    not. It knows whether it succeeded, and no local shell sees its words.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        super().__init__("copier", stdin=subprocess.DEVNULL)

    def copy(self, source: Path, destination: str, timeout: float | None = None) -> None:
        """Copy all that is in `source` into the remote directory; raises HostError."""
        self._timeout = timeout
        self(
            launcher=shlex.join(self._session.command()),
            options="",
            source=shlex.quote(str(source)),
            destination=shlex.quote(destination),
        )
        self.launch()

    def _execute(self) -> None:
        *command, source, destination = shlex.split(self.message)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in sorted(Path(source).iterdir()):
                archive.add(path, arcname=path.name, filter=_disown)
        script = f"exec tar -x -f - -C {shlex.quote(destination)}\n"
        command.append("exec bash -s")
        data = script.encode() + buffer.getvalue()
        try:
            done = subprocess.run(
                command,
                input=data,
                capture_output=True,
                timeout=self._timeout,
                start_new_session=True,  # Ctrl-C, as above
            )
        except subprocess.TimeoutExpired as exc:
            reason = f"not done after {self._timeout:.0f} s"
            raise HostError(self._session.host.label, "copy", reason) from exc
        self._response = done.stdout
        if done.returncode != 0:
            words = done.stderr.decode("utf-8", "backslashreplace").strip()
            reason = words or f"copying ended with exit status {done.returncode}"
            raise HostError(self._session.host.label, "copy", reason)


def _disown(member: tarfile.TarInfo) -> tarfile.TarInfo:
    # There root would make it ours, or fail where, as in a container, our number is not known.
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


class Tunnel(PathosTunnel):  # type: ignore[misc]
    """pathos' tunnel, as a forward of a session's connection to the host's own loopback.

    It is up when `connect` returns, needs no process of its own, and is gone after
    `disconnect`, at the latest when the session ends.

    Parameters
    ----------
    port
        The local port to take if it is free; 0: any.
    """

    verbose = False

    def __init__(self, session: Session, port: int = 0) -> None:
        self._session = session
        self._wanted = port
        super().__init__("tunnel")

    def connect(self, host: str, port: int, through: str | None = None) -> int:
        """Forward a free local port to `port` of `host` as the session's machine sees it."""
        for _ in range(TRIES):
            local, self._wanted = self._wanted or free_port(), 0
            try:
                self._connect(local, host, port, through=through)
            except HostError as exc:
                refusal = exc  # another process may have taken the port meanwhile
                continue
            self.connected = True
            return local
        raise refusal

    def disconnect(self) -> None:
        """Take the forward back."""
        if self.connected:
            with contextlib.suppress(HostError):
                self._control("cancel")
            self.connected = False

    def _connect(
        self, localport: int, remotehost: str, remoteport: int, through: str | None = None
    ) -> None:
        self._lport, self._host, self._rport = localport, remotehost, remoteport
        self._control("forward")

    def _control(self, what: str) -> None:
        forward = f"127.0.0.1:{self._lport}:{self._host}:{self._rport}"
        done = subprocess.run(
            self._session.command("-O", what, "-L", forward),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=30,
            start_new_session=True,
        )
        if done.returncode != 0:
            words = done.stderr.decode("utf-8", "backslashreplace").strip()
            raise HostError(self._session.host.label, "tunnel", words or f"ssh -O {what} failed")


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files that only we can read."""
    for name, data in files.items():
        path = directory / name
        path.touch(mode=0o600)
        path.write_bytes(data)
