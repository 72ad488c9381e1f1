"""One OpenSSH connection per host; copying and forwarding go through it.

The user's own ssh decides about user, port, key, jump host and Kerberos: what works as
``ssh host true`` works here. The first session on the connection runs ``bash -s``, so whatever
the login shell is, every command is bash text on standard input and never meets another shell.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pathos  # noqa: F401 - all of it first: another thread may be importing it
from pathos.connection import PipeException
from pathos.secure import Copier as PathosCopier
from pathos.secure import Tunnel as PathosTunnel
from pathos.secure import TunnelException

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError
from ostap_parallel.supply.private import control_directory, private_directory
from ostap_parallel.supply.processes import run_apart, start_apart
from ostap_parallel.supply.ways import BEATS, LOOPBACK, TRIES, Verdict, unpack, write_files

# What ssh says where a server or a gateway drops connections because too many come at once
# (MaxStartups in sshd_config): those are worth another try.
DROPPED = re.compile(
    r"kex_exchange_identification|ssh_exchange_identification|banner exchange"
    r"|Connection (closed|reset) by|Broken pipe|timeout: invalid message"
)

# What it says where a host is down or cannot be reached just now.
PASSING = re.compile(
    r"[Cc]onnection refused|timed out|No route to host|Network is unreachable|Host is down"
    r"|Temporary failure in name resolution|not responding"
)

# ssh's own exit status where the connection, not the command, has failed.
SSH_FAILED = 255

# The first OpenSSH in whose configuration these may stand. An older one refuses them.
_SESSION_OPTIONS = "-oSessionType=default", "-oStdinNull=no", "-oForkAfterAuthentication=no"
_SESSION_OPTIONS_SINCE = (8, 7)


@functools.cache
def ssh_version() -> tuple[int, int]:
    """Return the version of OpenSSH here; (0, 0) if that cannot be told."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = run_apart(["ssh", "-V"], timeout=10)
        if found := re.search(rb"OpenSSH_(\d+)\.(\d+)", done.errors + done.output):
            return int(found[1]), int(found[2])
    return 0, 0


def ssh_argv(host: HostConfig, control: Path) -> list[str]:
    """Return ``ssh`` and its options for a connection that shares `control`; no destination.

    What we rely on stands first, then the user's options, then defaults: ssh takes the first.
    """
    argv = ["ssh", "-T", "-x", f"-oControlPath={control}", "-oControlPersist=no"]
    argv += ["-oBatchMode=yes", "-oRemoteCommand=none", "-oPermitLocalCommand=no"]
    argv += ["-oControlMaster=yes", "-oClearAllForwardings=yes"]
    if ssh_version() >= _SESSION_OPTIONS_SINCE:
        argv += _SESSION_OPTIONS
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


@contextmanager
def open_ssh(host: HostConfig) -> Iterator[Ssh]:
    """Make a way to a host whose control socket is in a private directory."""
    with control_directory() as directory:
        yield Ssh(host, directory / "control")


class Ssh:
    """The way through OpenSSH: one connection, which copies and forwards share; see `ways.Way`.

    Parameters
    ----------
    control
        Path for the connection's control socket, in a private directory.
    """

    def __init__(self, host: HostConfig, control: Path) -> None:
        self.host = host
        self.control = control
        self.directory = control.parent
        self.label = host.label
        self._tunnels: dict[int, Tunnel] = {}

    def argv(self) -> list[str]:
        """Return the command of the session, which opens the connection."""
        return [*ssh_argv(self.host, self.control), "--", self.host.name, "exec bash -s"]

    def command(self, *options: str) -> list[str]:
        """Return an ssh command that uses this connection or fails.

        Without ProxyCommand ssh would open a connection of its own where the server refuses
        another session (MaxSessions), without a word. The user's configuration has nothing to
        add to a connection that is there, but forwards of its own.
        """
        shared = ["-F", "none", "-S", str(self.control), "-oControlMaster=no", "-T"]
        shared += ["-oProxyCommand=false", "-oBatchMode=yes", "-oLogLevel=ERROR"]
        return ["ssh", *shared, *options, "--", self.host.name]

    def copy(self, files: Mapping[str, bytes], directory: str, timeout: float) -> None:
        """Write files into a directory there."""
        with private_directory("copy-", self.control.parent) as staging:
            write_files(staging, files)
            Copier(self).copy(staging, directory, timeout)

    def forward(self, port: int, wanted: int = 0, to: str = LOOPBACK) -> tuple[str, int]:
        """Return an address here that leads to a port of loopback there."""
        tunnel = Tunnel(self, wanted)
        local = tunnel.connect(to, port)
        self._tunnels[local] = tunnel
        return tunnel.address, local

    def withdraw(self, port: int) -> None:
        """Have a port here lead nowhere."""
        if port in self._tunnels:
            self._tunnels.pop(port).disconnect()

    def backward(self, port: int) -> int:
        """Return a port of loopback there that leads to a port here."""
        forward = f"127.0.0.1:0:127.0.0.1:{port}"
        done = run_apart(self.command("-O", "forward", "-R", forward), timeout=30)
        words = done.words
        if not (number := re.search(rb"\d+", done.output)):
            raise TunnelError(self.label, "tunnel", words or "ssh -O forward -R failed")
        return int(number[0])

    def judge(self, status: int | None, words: str) -> Verdict:
        """Say what ssh means; what it is told by bash it passes on as its exit status."""
        if status not in (SSH_FAILED, None):
            return "ended"
        verdict = judge_words(words)
        return "ended" if status is None and verdict == "failed" else verdict

    def queued(self, line: str) -> str:
        """ssh does not queue."""
        return ""

    def answers(self) -> bool:
        """Return whether bash, with nothing to read, comes and goes there."""
        try:
            return run_apart([*self.command(), "exec bash -s"], timeout=5).status in (0, None)
        except (OSError, subprocess.TimeoutExpired):
            return False


def judge_words(words: str) -> Verdict:
    """Say what the last words of an ssh mean that has failed."""
    if DROPPED.search(words):
        return "dropped"
    return "passing" if PASSING.search(words) else "failed"


class CopyError(HostError, PipeException):  # type: ignore[misc]
    """Files could not be copied."""


class TunnelError(HostError, TunnelException):  # type: ignore[misc]
    """A port could not be forwarded."""


class Copier(PathosCopier):  # type: ignore[misc]
    """pathos' copier, which sends local files through a session's connection.

    It does not use scp: with a start-up file that prints, which many have, scp fails; bash does
    not. It knows whether it succeeded, and no local shell sees its words. Its source is a file, or
    a directory for all that is in it; its destination is a directory there, which may be written
    as ``host:directory``. `options` are some of ssh's.
    """

    verbose = False

    def __init__(self, way: Ssh) -> None:
        self._way = way
        self._process: subprocess.Popen[bytes] | None = None
        self.timeout: float | None = None
        super().__init__("copier", launcher="ssh", stdin=subprocess.DEVNULL)

    def copy(self, source: Path, destination: str, timeout: float | None = None) -> None:
        """Copy all that is in `source` into the remote directory; raises HostError."""
        self.timeout = timeout
        self.config(source=str(source), destination=destination, background=False)
        self.launch()

    def config(self, **kwds: Any) -> dict[str, Any]:
        """(Re)configure the copier; `launcher` cannot be another one."""
        if kwds.get("launcher", self.launcher) != "ssh":
            raise KeyError("launcher")
        settings: dict[str, Any] = super().config(**kwds)
        directory = str(self.destination).removeprefix(f"{self._way.host.name}:")
        self._argv = [*self._way.command(*shlex.split(self.options)), "exec bash -s"]
        self._script = unpack(directory).encode()
        self.message = shlex.join(["ssh", str(self.source), str(self.destination)])
        return settings

    __call__ = config

    def kill(self) -> None:
        """End a copy that runs in the background."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._process, self._pid = None, 0

    def _execute(self) -> None:
        data = self._script + _archive(Path(self.source))
        if self.background:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(data)
                stdin.seek(0)
                self._process = start_apart(
                    self._argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            self._pid, self._stdout = self._process.pid, self._process.stdout
            return
        label = self._way.label
        try:
            done = run_apart(self._argv, data, self.timeout)
        except subprocess.TimeoutExpired as exc:
            raise CopyError(label, "copy", f"not done after {self.timeout:.0f} s") from exc
        self._response, self._stdout = done.output, io.BytesIO(done.output)
        words = done.words
        if done.status or (done.status is None and words):
            reason = words or f"copying ended with exit status {done.status}"
            raise CopyError(label, "copy", reason)


def _archive(source: Path) -> bytes:
    """Return a file, or all that is in a directory, as an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(source.iterdir()) if source.is_dir() else [source]:
            archive.add(path, arcname=path.name, filter=_disown)
    return buffer.getvalue()


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

    Attributes
    ----------
    address
        Of loopback, where its local port is.
    """

    verbose = False
    address = "127.0.0.1"

    def __init__(self, way: Ssh, port: int = 0) -> None:
        self._way = way
        self._wanted = port
        super().__init__("tunnel")

    def __repr__(self) -> str:
        if not self.connected:
            return f"Tunnel('{self.name}')"
        return f"Tunnel('{self._forwarded()} {self._way.host.name}')"

    def connect(self, host: str, port: int | None = None, through: str | None = None) -> int:
        """Forward a free local port to `port` of `host` as the session's machine sees it.

        `through` can only be that machine.
        """
        label = self._way.label
        if port is None:
            raise TunnelError(label, "tunnel", f"which port of {host}?")
        if through not in (None, label, self._way.host.name):
            raise TunnelError(label, "tunnel", f"it leads through {label}, not through {through}")
        self.disconnect()
        refusal: HostError | None = None
        # With "AddressFamily inet6" ssh does not listen on the first one.
        for self.address in ("127.0.0.1", "::1"):
            for _ in range(TRIES):
                local, self._wanted = self._wanted or free_port(), 0
                try:
                    self._connect(local, host, port)
                except HostError as exc:
                    refusal = refusal or exc  # another process may have taken the port meanwhile
                    continue
                self.connected = True
                return local
        assert refusal is not None
        raise refusal

    def disconnect(self) -> None:
        """Take the forward back."""
        if self.connected:
            with contextlib.suppress(HostError):
                self._control("cancel")
            self.connected = False
            self._lport: int | None = None
            self._rport: int | None = None
            self._host: str | None = None

    def _connect(
        self, localport: int, remotehost: str, remoteport: int, through: str | None = None
    ) -> None:
        self._lport, self._host, self._rport = localport, remotehost, remoteport
        self._control("forward")

    def _forwarded(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self._lport}:{self._host}:{self._rport}"

    def _control(self, what: str) -> None:
        done = run_apart(self._way.command("-O", what, "-L", self._forwarded()), timeout=30)
        words = done.words
        if done.status or (done.status is None and words):
            raise TunnelError(self._way.label, "tunnel", words or f"ssh -O {what} failed")


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
