"""What several test files share."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sshd import Host, Hosts, descendants, describe

from ostap_parallel import WorkManager

T = TypeVar("T")

GONE = 5.0  # seconds that hosts have to get rid of everything


def wait_until(predicate: Callable[[], T], seconds: float, what: str) -> T:
    """Look every 20 ms until `predicate` returns something true, and return that.

    Parameters
    ----------
    seconds
        How long at most, but half a minute at least: machines may be slow for a while.

    Raises
    ------
    AssertionError
        It did not within `seconds`; the text holds `what` and what was returned last.
    """
    seconds = max(seconds, 30.0)
    deadline = time.monotonic() + seconds
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what} (last: {value!r})"
        time.sleep(0.02)
    return value


def processes_of(run: Path) -> list[int]:
    """Return the processes here that do jobs of the run in a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if entry.name.isdigit() and os.fsencode(run / "start.py") in words:
                found.append(int(entry.name))
    return sorted(found)


def open_manager(hosts: Hosts, servers: str = "h1*1 h2*1", ncpus: int = 0, **given: Any):
    """Return a manager of private hosts that says nothing."""
    settings = {"ssh_config": hosts.ssh_config, "config": (), "silent": True, **given}
    return WorkManager(ncpus, servers, **settings)


def matching(host: Host, text: str) -> list[int]:
    """Return the pids of a host's processes whose command line holds `text`."""
    return [pid for pid in host.processes() if text in describe(pid)]


def server_of(manager: WorkManager, name: str) -> int:
    """Return the pid of the server on a host."""
    (status,) = [one for one in manager.executor.hosts if one.name == name]
    return status.about["pid"]


def workers_of(manager: WorkManager, name: str) -> list[int]:
    """Return the pids of a host's workers."""
    return list(filter(is_worker, descendants(server_of(manager, name))))


def is_worker(pid: int) -> bool:
    """Return whether a process is a worker of ours, and not what starts them."""
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "ppworker\n"
    except OSError:
        return False


def core_of(manager: WorkManager) -> Any:
    """Return what is behind a manager's engine."""
    return manager.executor.backend._core


def ssh_of(name: str) -> int:
    """Return the pid of this process' ssh to a host."""
    (pid,) = [pid for pid in descendants(os.getpid()) if f" -- {name} exec bash" in describe(pid)]
    return pid


def kill(pids: Iterable[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes, of which there must be some; one may take others along."""
    pids = list(pids)
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def state_of(host: Host) -> list[str]:
    """Describe what runs on a host and what is in its /tmp."""
    return [describe(pid) for pid in host.processes()] + os.listdir(host.tmp)  # noqa: PTH208


def wait_clean(hosts: Iterable[Host], seconds: float = GONE) -> None:
    """Wait until nothing runs on the hosts, and their /tmp is empty."""
    deadline = time.monotonic() + seconds
    while left := {host.name: state_of(host) for host in hosts if state_of(host)}:
        if time.monotonic() > deadline:
            sweep(hosts)  # so that the next test does not find it
            pytest.fail(f"left on hosts: {left}")
        time.sleep(0.02)


def sweep(hosts: Iterable[Host]) -> None:
    """Remove by force what a test has left."""
    for host in hosts:
        for pid in host.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path in host.tmp.iterdir():
            shutil.rmtree(path, ignore_errors=True)


def importable(hosts: Iterable[Host]) -> str:
    """Put the functions of the tests on hosts; return the environment in which they are found.

    The checkout may be where a host does not see it.
    """
    for host in hosts:
        library = host.home / "library"
        library.mkdir(exist_ok=True)
        for name in "faults.py", "functions.py", "mergers.py", "sharers.py":
            shutil.copy(Path(__file__).with_name(name), library)
    return 'export PYTHONPATH="$HOME/library"'


def place_for(request: pytest.FixtureRequest, on_host: object, folder: Path) -> tuple[Path, str]:
    """Return a folder as it is called here, and as workers call it: here, or on `one_host`."""
    if not on_host:
        return folder, str(folder)
    host = request.getfixturevalue("one_host")["h1"]
    folder = Path(tempfile.mkdtemp(dir=host.home))
    return folder, host.inside(folder)


def crash(host: Host) -> None:
    """Have a host crash, and remove what that leaves and nobody else can remove."""
    host.kill()
    for path in host.tmp.iterdir():
        shutil.rmtree(path, ignore_errors=True)


def processes_with(folder):
    """Return the processes for whose files there is a folder, here and in jobs."""
    needle = f"TMPDIR={folder}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if needle in (entry / "environ").read_bytes():
                found.append((int(entry.name), (entry / "cmdline").read_bytes()[:200]))
    return found
