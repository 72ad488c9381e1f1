"""Private OpenSSH servers on loopback, for tests, the demo and benchmarks.

Each host is a real ``sshd`` with keys, ``known_hosts`` and an ``ssh_config`` of its own in one
directory; nothing in ``~/.ssh`` or ``/etc/ssh`` is read or written::

    with open_hosts(2, tmp_path) as hosts:
        subprocess.run(["ssh", "-F", hosts.ssh_config, "h1", "true"], check=True)

As root on Linux a host has its own mount and host name spaces: a private home, ``/tmp`` and
``/dev/shm``, an account with the wanted login shell, a name of its own, and a bare ``python3``
(the interpreter beneath the caller's virtual environment) first on PATH. Otherwise it shares all
this with the machine, `Host.private` is False, and only TMPDIR, HOME and PATH are set for its
sessions.

A private host may also have a network of its own, at the far end of a cable that can be cut.
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL

from cable import Cable, CableUnavailable, open_cable

PATIENCE = 60.0  # seconds until a server must be up, or gone
POLL = 0.02  # seconds between two looks

PORT = 2222  # of a host with a network of its own; known_hosts writes 22 in another way
CAP_NET_ADMIN = 12  # capabilities(7)

# Where a host's directory appears inside its mount namespace. It must exist everywhere (FHS), and
# may not lie in /tmp, which is replaced.
MOUNT_POINTS = "/srv", "/media", "/mnt", "/opt"

# What a private host has of its own.
HIDDEN = "/tmp", "/dev/shm"

# $1 is the host's directory, $2 where it shall appear, $3 the host's name, $4 the size of its /tmp
# or nothing; the rest is run. The first mount makes all sources of the later ones reachable
# wherever the directory lies; /tmp and /dev/shm come last because they may hide that place.
ENTER = """
set -e
mount --bind "$1" "$2"
for name in passwd shadow hosts; do
    if [ -e "/etc/$name" ]; then mount --bind "$2/etc/$name" "/etc/$name"; fi
done
if [ "$4" ]; then mount -t tmpfs -o "size=$4" tmp /tmp; else mount --bind "$2/tmp" /tmp; fi
if [ -d /dev/shm ]; then mount -t tmpfs shm /dev/shm; fi
hostname "$3"
cd /
shift 4
exec "$@"
"""

SSHD_CONFIG = """\
{extra}
ListenAddress {address}
Port {port}
HostKey "{etc}/host_key"
AuthorizedKeysFile "{etc}/authorized_keys"
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UseDNS no
PrintMotd no
PrintLastLog no
Subsystem sftp internal-sftp
SetEnv {environment}
"""

SSH_CONFIG_HOST = """\
Host {name}
  HostName {address}
  Port {port}
"""

SSH_CONFIG_ALL = """\
Host *
  User {user}
  IdentityFile "{root}/user_key"
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile "{root}/known_hosts"
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  KexAlgorithms curve25519-sha256
  LogLevel ERROR
"""


class SshdUnavailable(RuntimeError):
    """No private OpenSSH server can be started here; the text says what is missing."""


class NotPrivate(SshdUnavailable):
    """Servers can be had, but an option needs name spaces, for which the rights are missing."""


@dataclass(frozen=True)
class HostOptions:
    """What one host is like.

    Attributes
    ----------
    login_shell
        Of the account; ``None`` is ``/bin/sh`` where the host is private, else the user's own.
        Any other value needs a private host.
    rc
        Text for the start-up file that the shell reads: ``.bashrc``, ``.cshrc`` or ``.profile``.
    extra
        Lines for ``sshd_config``; they win over the defaults, which are those of sshd.
    path
        PATH of the sessions; ``None`` is `Host.bin`, then ``/usr/bin:/bin``.
    env
        More variables for the sessions.
    python
        What ``python3`` in `Host.bin` links to; ``None`` leaves it out.
    tmp_size
        Of its /tmp, such as ``"8M"``; ``None`` is no limit. Needs a private host.
    network
        Whether it has a network of its own, which `Host.cut` cuts: its loopback, and a cable to
        this machine; it reaches no other host. Needs a private host.
    delay
        Seconds that each packet takes on the cable, in both directions; it implies `network`.
    """

    login_shell: str | None = None
    rc: str = ""
    extra: str = ""
    path: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    python: str | None = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    tmp_size: str | None = None
    network: bool = False
    delay: float = 0.0

    @property
    def has_network(self) -> bool:
        """Return whether the host is at the end of a cable."""
        return self.network or self.delay > 0


DEFAULT = HostOptions()


class Host:
    """One private ``sshd``. Made by `open_hosts`.

    Attributes
    ----------
    name, address, port
        The name in the ``ssh_config``, and where it listens.
    private
        Whether it has its own /tmp, home and account.
    tmp, home, bin
        Its /tmp (or TMPDIR), its home, and the first directory of its PATH, as seen from outside.
    """

    def __init__(
        self, name: str, place: Cable | str, folder: Path, options: HostOptions, mount: str | None
    ) -> None:
        self.name, self.options = name, options
        self._cable = place if isinstance(place, Cable) else None
        if isinstance(place, Cable):
            self.address, self.port = place.far, PORT
        else:
            self.address, self.port = place, free_port(place)
        self.private = mount is not None
        self.ssh_config = folder.parent / "ssh_config"
        self.tmp, self.home, self.bin = folder / "tmp", folder / "home", folder / "bin"
        self._folder, self._mount = folder, mount
        self._listener: subprocess.Popen[bytes] | None = None
        # Open files of its name spaces and its /tmp, which last as long as these.
        self._held: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address}:{self.port}>"

    def inside(self, path: Path) -> str:
        """Return how the host itself sees a path in its `home`, `tmp` or `bin`."""
        if self._mount is None:
            return str(path)
        if path.is_relative_to(self.tmp):
            return str("/tmp" / path.relative_to(self.tmp))
        return str(self._mount / path.relative_to(self._folder))

    @property
    def log(self) -> str:
        """What the server wrote to standard error, over all its starts."""
        file = self._folder / "sshd.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def run(
        self, command: str, *, timeout: float = 30, **kwargs: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command by ssh; return it with its output as text."""
        argv = ["ssh", "-F", str(self.ssh_config), self.name, command]
        kwargs.setdefault("input", "")
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, **kwargs)

    def processes(self) -> list[int]:
        """Return the pids that live on this host, without the listening ``sshd`` and zombies."""
        listener = self._listener.pid if self._listener else None
        return [pid for pid in live_pids() if pid != listener and self._owns(pid)]

    def start(self) -> None:
        """Start the server; `wait_ready` tells when it is up."""
        sshd = find_sshd()
        if sshd is None:
            raise SshdUnavailable("no sshd: install openssh-server")
        config = f"{self._mount or self._folder}/etc/sshd_config"
        argv = [*self._enter(), sshd, "-De", "-f", config]
        with (self._folder / "sshd.log").open("ab") as log:
            # A session of its own keeps Ctrl-C in the terminal away from it.
            self._listener = subprocess.Popen(
                argv, stdin=DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
            )

    def _enter(self) -> list[str]:
        """Return what runs a program inside: in new name spaces at first, in the same later."""
        if self._mount is None:
            return []
        network = [f"--net={self._cable.space}"] if self._cable else []
        if self._held:
            spaces = [f"--mount={held_path(self._held['mnt'])}"]
            spaces += [f"--uts={held_path(self._held['uts'])}"]
            return ["nsenter", *network, *spaces]
        size = self.options.tmp_size or ""
        script = [ENTER, "sh", str(self._folder), self._mount, self.name, size]
        unshare = ["unshare", "--mount", "--uts", "--propagation", "private"]
        return ["nsenter", *network, *unshare, "sh", "-c", *script]

    def wait_ready(self) -> None:
        """Wait for the server's banner.

        Raises
        ------
        SshdUnavailable
            It ended, or did not answer in time; the text ends with its log.
        """
        deadline = time.monotonic() + PATIENCE
        while not has_banner(self.address, self.port):
            if self._listener is None or self._listener.poll() is not None:
                raise SshdUnavailable(f"{self.name}: sshd did not start:\n{self.log}")
            if time.monotonic() > deadline:
                raise SshdUnavailable(f"{self.name}: no banner in {PATIENCE} s:\n{self.log}")
            time.sleep(POLL)
        if self.private and self._listener and not self._held:
            self._hold(f"/proc/{self._listener.pid}")

    def wait_idle(self) -> None:
        """Wait until there is no connection: the look at the banner was one."""
        wait_for(lambda: not self._children(), f"{self.name}: idle")

    def _hold(self, process: str) -> None:
        """Open the name spaces of the listener and, where only they show it, the /tmp."""
        for name in ("mnt", "uts"):
            self._held[name] = os.open(f"{process}/ns/{name}", os.O_RDONLY)
        if self.options.tmp_size:
            self._held["tmp"] = os.open(f"{process}/root/tmp", os.O_PATH)
            self.tmp = Path(held_path(self._held["tmp"]))

    def cut(self) -> None:
        """Cut its network: packets vanish, and nothing is closed, until `heal`.

        With `kill` after it this is a loss of power: no one is told that connections ended.
        """
        self._own_cable().cut()

    def heal(self) -> None:
        """Undo `cut`."""
        self._own_cable().heal()

    def _own_cable(self) -> Cable:
        if self._cable is None:
            raise SshdUnavailable(f"{self.name} has no cable: give HostOptions(network=True)")
        return self._cable

    def stop(self) -> None:
        """End the listener, as stopping the service does; sessions under way go on."""
        if self._listener is not None:
            end(self._listener)
            self._listener = None

    def restart(self) -> None:
        """Stop the listener and start one on the same port, with the same files."""
        self.stop()
        self.start()
        self.wait_ready()
        self.wait_idle()

    def kill(self) -> None:
        """Kill every process of this host at once, as a crash does."""
        self._kill_processes()  # while the listener still tells whose children they are
        if self._listener is not None:
            self._listener.kill()
            self._listener.wait()
            self._listener = None
        wait_for(self._kill_processes, f"{self.name}: no process")

    def close(self) -> None:
        """End all that was started here, and let go of the name spaces and so of their mounts."""
        try:
            self.kill()
        finally:
            while self._held:
                os.close(self._held.popitem()[1])

    def _kill_processes(self) -> bool:
        """Send SIGKILL to what is left; return whether nothing was."""
        pids = self.processes()
        for pid in pids:
            kill_if(pid, self._owns)
        return not pids

    def _children(self) -> list[int]:
        return descendants(self._listener.pid) if self._listener else []

    def _owns(self, pid: int) -> bool:
        """Return whether a process belongs to this host."""
        try:
            if self.private:
                space = Path(f"/proc/{pid}/ns/mnt").stat().st_ino
                return bool(self._held) and space == os.fstat(self._held["mnt"]).st_ino
            # Sessions carry the mark in their environment, wherever their parent has gone.
            if self._mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return True
        except OSError:  # it has just ended, or belongs to someone else
            return False
        return pid in self._children()

    @property
    def _mark(self) -> str:
        return f"PRIVATE_SSHD={self._folder}"

    def write_files(self) -> None:
        """Write the account, the home, the PATH directory and the configuration."""
        for folder in (self.home, self.bin, self.tmp, self._folder / "etc"):
            folder.mkdir(parents=True)
        self.tmp.chmod(0o1777)
        if self.options.python is not None:
            (self.bin / "python3").symlink_to(self.options.python)
        shell = self.options.login_shell or ("/bin/sh" if self.private else own_account().pw_shell)
        if self.options.rc:
            (self.home / rc_name(shell)).write_text(self.options.rc)
        if self.private:
            write_account(self._folder / "etc", self.inside(self.home), shell)
        etc = f"{self._mount or self._folder}/etc"
        environment = " ".join(f'"{name}={text}"' for name, text in self._environment().items())
        (self._folder / "etc/sshd_config").write_text(
            SSHD_CONFIG.format(
                extra=self.options.extra.strip(),
                address=self.address,
                port=self.port,
                etc=etc,
                environment=environment,
            )
        )

    def _environment(self) -> dict[str, str]:
        path = self.options.path or f"{self.inside(self.bin)}:/usr/bin:/bin"
        shared = {} if self.private else {"TMPDIR": str(self.tmp), "HOME": str(self.home)}
        mark, _, folder = self._mark.partition("=")
        return {"PATH": path, mark: folder, **shared, **self.options.env}


@dataclass(frozen=True)
class Hosts(Sequence[Host]):
    """The hosts of `open_hosts`, by position or by name, and the ``ssh_config`` to reach them."""

    hosts: tuple[Host, ...]
    ssh_config: Path

    @property
    def names(self) -> tuple[str, ...]:
        """Return ``("h1", "h2", ...)``."""
        return tuple(host.name for host in self.hosts)

    def __getitem__(self, key: int | str) -> Host:  # type: ignore[override]
        return self.hosts[self.names.index(key) if isinstance(key, str) else key]

    def __len__(self) -> int:
        return len(self.hosts)


@contextmanager
def open_hosts(
    count: int, root: Path, options: HostOptions | Sequence[HostOptions] = DEFAULT
) -> Iterator[Hosts]:
    """Start private ssh servers named ``h1``, ``h2``, ... and end them with the block.

    Parameters
    ----------
    count
        How many.
    root
        An empty or new directory for keys, configuration, homes and logs. It stays.
    options
        For all hosts, or one per host.

    Raises
    ------
    SshdUnavailable
        OpenSSH is missing, or cannot do here what `options` ask.
    """
    check_programs()
    each = [options] * count if isinstance(options, HostOptions) else list(options)
    mount = find_mount_point(each)
    check_private(each, mount)
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    with ExitStack() as stack:
        hosts = tuple(
            Host(f"h{i}", open_place(one, i, stack), root / f"h{i}", one, mount)
            for i, one in enumerate(each, 1)
        )
        write_keys(root, hosts)
        for host in hosts:
            stack.callback(host.close)
            host.start()
        for host in hosts:
            host.wait_ready()
            host.wait_idle()
        yield Hosts(hosts, root / "ssh_config")


# -- what this machine has -------------------------------------------------------------------


def find_sshd() -> str | None:
    """Return the path of ``sshd``, which must be absolute, or ``None``."""
    folders = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/sbin"]
    return shutil.which("sshd", path=os.pathsep.join(folders))


def check_programs() -> None:
    """Raise `SshdUnavailable` unless there is all that any host needs."""
    if not Path("/proc/self/ns").is_dir():
        raise SshdUnavailable("private ssh servers need Linux with /proc")
    if find_sshd() is None:
        raise SshdUnavailable("no sshd: install openssh-server")
    if not (shutil.which("ssh") and shutil.which("ssh-keygen")):
        raise SshdUnavailable("no ssh or no ssh-keygen: install openssh-client")
    if os.geteuid() == 0:
        # Compiled into sshd, which insists on it as root; it does not outlive a reboot.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)


def check_private(each: Sequence[HostOptions], mount: str | None) -> None:
    """Raise `SshdUnavailable` if there is no place to mount what private hosts need."""
    if mount is not None:
        return
    if any(one.has_network for one in each):
        raise no_network("mounts of one's own are not allowed")
    if any(one.login_shell or one.tmp_size for one in each):
        raise NotPrivate("a login shell or a /tmp of its own needs root, and unshare that may")


def open_place(options: HostOptions, number: int, stack: ExitStack) -> Cable | str:
    """Return a cable, which `stack` keeps, or else an address on loopback."""
    if not options.has_network:
        return f"127.0.0.{number + 1}"
    try:
        return stack.enter_context(open_cable(options.delay))
    except CableUnavailable as exc:
        raise no_network(str(exc)) from exc


def no_network(reason: str) -> SshdUnavailable:
    """Return the error for a host that can have no network of its own.

    Whoever may administer networks is not refused name spaces by chance: that is no `NotPrivate`.
    """
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    kind = SshdUnavailable if capabilities >> CAP_NET_ADMIN & 1 else NotPrivate
    return kind(
        f"no network of its own: {reason}; it needs root with CAP_SYS_ADMIN and CAP_NET_ADMIN, "
        "the program ip (iproute2) and /dev/net/tun; "
        "a container has them with: docker run --privileged --device /dev/net/tun"
    )


def find_mount_point(each: Sequence[HostOptions]) -> str | None:
    """Return where hosts can mount their directory, or ``None`` if they cannot be private."""
    programs = [Path(one.python) for one in each if one.python]
    hidden = any(program.is_relative_to(place) for program in programs for place in HIDDEN)
    if os.geteuid() != 0 or hidden or not can_unshare():
        return None
    for point in MOUNT_POINTS:
        if Path(point).is_dir() and not any(p.is_relative_to(point) for p in programs):
            return point
    return None


@functools.cache
def can_unshare() -> bool:
    """Return whether mounts and a host name of one's own are allowed (in most containers not)."""
    if not all(map(shutil.which, ("unshare", "nsenter", "hostname"))):
        return False
    probe = "mount --bind /tmp /tmp && hostname probe"
    argv = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", probe]
    return subprocess.run(argv, stdin=DEVNULL, capture_output=True).returncode == 0


def free_port(address: str) -> int:
    """Return a port that nobody listens on."""
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])


def has_banner(address: str, port: int) -> bool:
    """Return whether an ssh server answers there."""
    try:
        with socket.create_connection((address, port), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


# -- files -----------------------------------------------------------------------------------


def write_keys(root: Path, hosts: Sequence[Host]) -> None:
    """Write the keys, the client's files, and each host's directory."""
    for key in ("user_key", "host_key"):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(root / key)]
        subprocess.run(argv, check=True, stdin=DEVNULL, stdout=DEVNULL)
    public = (root / "host_key.pub").read_text()
    known = "".join(f"[{host.address}]:{host.port} {public}" for host in hosts)
    (root / "known_hosts").write_text(known)
    sections = [
        SSH_CONFIG_HOST.format(name=host.name, address=host.address, port=host.port)
        for host in hosts
    ]
    sections.append(SSH_CONFIG_ALL.format(user=own_account().pw_name, root=root))
    (root / "ssh_config").write_text("".join(sections))
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    for host in hosts:
        host.write_files()
        etc = root / host.name / "etc"
        shutil.copy(root / "host_key", etc)  # with its mode, which sshd checks
        shutil.copy(root / "user_key.pub", etc / "authorized_keys")
        own = Path("/etc/hosts")
        (etc / "hosts").write_text((own.read_text() if own.exists() else "") + "\n" + names)


def own_account() -> pwd.struct_passwd:
    """Return the account of the user who runs this."""
    return pwd.getpwuid(os.geteuid())


def rc_name(shell: str) -> str:
    """Return the name of the start-up file that `shell` reads in the home."""
    return {"bash": ".bashrc", "tcsh": ".cshrc", "csh": ".cshrc"}.get(Path(shell).name, ".profile")


def write_account(etc: Path, home: str, shell: str) -> None:
    """Write ``passwd`` and ``shadow`` where the user has another home and another shell."""
    own = own_account()
    entry = f"{own.pw_name}:x:{own.pw_uid}:{own.pw_gid}:{own.pw_gecos}:{home}:{shell}\n"
    # No password, but not locked either: sshd refuses a locked account whatever its keys.
    replace_line(etc / "passwd", Path("/etc/passwd"), f"{own.pw_name}:", entry)
    replace_line(
        etc / "shadow", Path("/etc/shadow"), f"{own.pw_name}:", f"{own.pw_name}:*:19000::::::\n"
    )
    (etc / "shadow").chmod(0o600)


def replace_line(target: Path, source: Path, start: str, line: str) -> None:
    """Copy a file of accounts, with `line` in place of the line that begins with `start`."""
    lines = source.read_text().splitlines(keepends=True) if source.exists() else []
    target.write_text("".join([line, *(old for old in lines if not old.startswith(start))]))


def held_path(descriptor: int) -> str:
    """Return a path by which any process may open what this one has open."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


# -- processes -------------------------------------------------------------------------------


def wait_for(predicate: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait until `predicate` holds; raise `TimeoutError` naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {seconds} s: {what}")
        time.sleep(POLL)


def live_pids() -> list[int]:
    """Return the pids of all processes but zombies."""
    names = (entry.name for entry in Path("/proc").iterdir())
    return [pid for pid in map(int, filter(str.isdigit, names)) if stat_of(pid)]


def stat_of(pid: int) -> tuple[int, str] | None:
    """Return a process' parent and command line, or ``None`` if it ended (or is a zombie)."""
    try:
        # The second field is the program's name in brackets, and may hold anything.
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return None
    # A zombie is gone: some machines reap orphans seconds late.
    return None if state in "ZX" else (int(parent), command.decode(errors="replace").strip())


def describe(pid: int) -> str:
    """Return a pid with its command line, for messages."""
    found = stat_of(pid)
    return f"{pid} {found[1]}" if found else f"{pid} (ended)"


def descendants(root: int) -> list[int]:
    """Return the pids below `root`, zombies excluded."""
    children: dict[int, list[int]] = {}
    for pid in live_pids():
        found = stat_of(pid)
        if found:
            children.setdefault(found[0], []).append(pid)
    below = children.pop(root, [])
    for pid in below:  # grows while it is walked
        below.extend(children.pop(pid, []))
    return below


def end(process: subprocess.Popen[bytes]) -> None:
    """End a child: ask, wait, kill."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def kill_if(pid: int, belongs: Callable[[int], bool]) -> None:
    """Kill a process, unless `pid` has passed on to one that does not belong."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if belongs(pid):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
