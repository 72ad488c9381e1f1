"""A run while a monkey kills what it runs on: workers, servers, connections, whole machines.

    python -m benchmarks.chaos --items 20000 --seed 1

Two local workers and three real ssh hosts on loopback with two workers each do many short tasks:
first undisturbed, then while about twice a second something of theirs gets SIGKILL, a connection
breaks, a machine crashes or stands still for some seconds, as a seeded generator chooses. In the
end the sum must be exact, each item be merged once, no item have failed, and nothing be left, here
or on the hosts. The exit status is 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import itertools
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from sshd import Host, Hosts, descendants, describe, kill_if, open_hosts

from ostap_parallel import WorkManager
from ostap_parallel.runs.report import Report
from ostap_parallel.supply import supervisor

PERIOD = 0.5  # mean number of seconds between two kills
KEEPALIVE = 3  # seconds of silence after which a host is lost
PATIENCE = 10.0  # seconds until nothing may be left
PAUSE = 1.0  # longest seconds until a lost host is started again: the monkey needs its prey
HANG = 300  # seconds after which a run shows where it stands

# The monkey does not ask what a worker is at: an item may lose many and be to blame for none. An
# item of some milliseconds does not lose this many in a row.
LOST_RETRIES = 50

Found = Callable[[WorkManager, Host], list[int]]
Attack = Callable[[WorkManager, Host, random.Random], bool]


# -- what the monkey does --------------------------------------------------------------------


def matching(pids: Iterable[int], text: str) -> list[int]:
    """Return the processes whose command line holds `text`."""
    return sorted(pid for pid in pids if text in describe(pid))


def kill(manager: WorkManager, host: Host, choose: random.Random, *, found: Found) -> bool:
    """Kill one of the processes that `found` finds; return whether there were any."""
    pids = found(manager, host)
    if pids:
        kill_if(choose.choice(pids), lambda pid: pid in found(manager, host))
    return bool(pids)


def break_connection(manager: WorkManager, host: Host, choose: random.Random) -> bool:
    """Shut down one of this process' connections to a host's server."""
    peers = {("127.0.0.1", one.port) for one in manager.executor.hosts if one.name == host.name}
    descriptors = list(Path("/proc/self/fd").iterdir())
    choose.shuffle(descriptors)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # closed meanwhile
            if descriptor.readlink().name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                    if connection.getpeername() in peers:  # that of another kind is a text
                        connection.shutdown(socket.SHUT_RDWR)
                        return True
    return False


def crash(manager: WorkManager, host: Host, choose: random.Random) -> bool:
    """Crash a machine and boot it; its /tmp is empty then."""
    host.kill()
    for path in host.tmp.iterdir():
        shutil.rmtree(path)
    host.start()
    host.wait_ready()
    return True


def freeze(manager: WorkManager, host: Host, choose: random.Random) -> bool:
    """Stop all sessions of a host, for so short that nobody minds or for so long that it is lost.

    One that was lost comes back to life when another server runs there already.
    """
    pids = host.processes()
    try:
        signal_all(pids, signal.SIGSTOP)
        time.sleep(choose.uniform(0.2, 2) * KEEPALIVE)
    finally:
        signal_all(pids, signal.SIGCONT)
    return bool(pids)


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


ATTACKS: dict[str, Attack] = {
    name: functools.partial(kill, found=found)
    for name, found in {
        "local worker": lambda manager, host: manager.executor.backend.pids(),
        "host's worker": lambda manager, host: matching(host.processes(), "worker.process import"),
        "host's server": lambda manager, host: matching(host.processes(), "/ppserver refuse"),
        "ssh session": lambda manager, host: matching(host.processes(), "@notty"),
        "ssh client": lambda manager, host: matching(
            descendants(os.getpid()), f" -- {host.name} exec bash"
        ),
        "lifeline": lambda manager, host: matching(descendants(os.getpid()), "/lifeline.bash"),
    }.items()
} | {"connection": break_connection, "machine": crash, "freezing": freeze}


class Monkey:
    """Attacks what a run depends on, in a thread, for as long as the body of ``with`` runs.

    Attributes
    ----------
    kills
        How many of each of `ATTACKS` it has done.
    """

    def __init__(self, manager: WorkManager, hosts: Hosts, seed: int) -> None:
        self.kills = Counter(dict.fromkeys(sorted(ATTACKS), 0))
        self._manager, self._hosts = manager, hosts
        self._choose = random.Random(seed)
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Monkey:
        self._running = self._thread.submit(self._run)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.shutdown()
        self._running.result()  # its own error

    def goes_on(self, kills: int) -> bool:
        """Return whether it has done fewer, and has not failed."""
        return sum(self.kills.values()) < kills and not self._running.done()

    def _run(self) -> None:
        """Do all kinds once, in any order and to any host where there is such a thing; repeat."""
        while True:
            for kind in self._choose.sample(sorted(ATTACKS), len(ATTACKS)):
                if self._stop.wait(self._choose.uniform(0.5, 1.5) * PERIOD):
                    return
                self.kills[kind] += any(
                    ATTACKS[kind](self._manager, host, self._choose)
                    for host in self._choose.sample(self._hosts, len(self._hosts))
                )


# -- a run, and what became of it ------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Attributes
    ----------
    merged
        How often each item was merged, with its result and the size of its ballast.
    kills
        What the monkey did.
    left
        Processes, files, threads and descriptors that were not there before, but are afterwards.
    """

    merged: Counter[tuple[int, int, int]]
    report: Report
    kills: Counter[str]
    left: list[str]

    @property
    def problems(self) -> list[str]:
        """Everything that is not as it must be."""
        wanted = Counter((n, n * n, ballast(n)) for n in range(self.report.submitted))
        found = [f"not merged: {pair}" for pair in wanted - self.merged]
        found += [f"merged more than once, or wrong: {pair}" for pair in self.merged - wanted]
        found += map(str, self.report.failures)
        if not self.report.complete:
            found.append(f"not complete: {self.report}")
        return found + [f"left: {line}" for line in self.left]

    def __str__(self) -> str:
        total = sum(result * count for (_, result, _), count in self.merged.items())
        lost = sum(host.lost for host in self.report.hosts)
        regained = sum(host.lost - (host.state != "up") for host in self.report.hosts)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted((+self.kills).items()))
        return (
            f"{self.report.merged} of {self.report.submitted} items merged, sum {total}, "
            f"in {self.report.wall:.1f} s\n"
            f"  kills: {sum(self.kills.values())} ({kinds or 'none'})\n"
            f"  items run again: {self.report.retried}; hosts lost: {lost}, regained: {regained}"
        )


def play(
    hosts: Hosts, items: int, seed: int | None = None, *, ncpus: int = 2, kills: int = 0
) -> Result:
    """Do many short tasks on local workers and on the hosts.

    With a seed they are disturbed, and go on until there were so many kills.
    """

    def work(item: tuple[int, bytes]) -> tuple[int, bytes]:  # not imported, but sent to the hosts
        n, ballast = item
        time.sleep((2 + n % 9) / 1000)
        return n * n, ballast

    def collect(
        merged: Counter[tuple[int, int, int]] | None, result: tuple[int, bytes], n: int
    ) -> object:
        merged = Counter() if merged is None else merged
        merged[n, result[0], len(result[1])] += 1
        return merged

    before = inventory(hosts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(supervisor, "LONGEST_PAUSE", PAUSE))
        servers = [f"{name}*2" for name in hosts.names]
        given = {"keepalive": KEEPALIVE, "ssh_config": hosts.ssh_config, "config": ()}
        manager = stack.enter_context(WorkManager(ncpus, servers, silent=True, **given))
        manager.wait_for_hosts()
        monkey = Monkey(manager, hosts, seed or 0)
        if seed is not None:
            stack.enter_context(monkey)
        stack.callback(manager.close)  # while the monkey goes on
        numbers = itertools.takewhile(
            lambda n: n < items or monkey.goes_on(kills), itertools.count()
        )
        merged = manager.process(
            work,
            ((n, bytes(ballast(n))) for n in numbers),
            collector=collect,
            on_error="collect",
            lost_retries=LOST_RETRIES,
        )
    return Result(merged, manager.report, monkey.kills, leftovers(hosts, before))


def ballast(n: int) -> int:
    """Return how many bytes item `n` carries there and back: some are killed on their way."""
    return 1 << 20 if n % 100 == 0 else 0


def leftovers(hosts: Hosts, before: Counter[str]) -> list[str]:
    """Return what a run has left behind, once that is nothing or the time is up."""
    deadline = time.monotonic() + PATIENCE
    while (left := inventory(hosts) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return sorted(left.elements())


def inventory(hosts: Hosts) -> Counter[str]:
    """Count the processes, files, threads and descriptors of a run, here and on the hosts."""
    found = [f"{host.name}: {describe(pid)}" for host in hosts for pid in host.processes()]
    found += [f"{host.name}: {path.name}" for host in hosts for path in host.tmp.iterdir()]
    here = map(describe, descendants(os.getpid()))
    found += [line for line in here if "sshd" not in line]  # those are not of the run
    found += map(str, Path(tempfile.gettempdir()).glob(f"ostap-parallel-{os.getpid()}-*"))
    # the thread that tells of runs is the process's
    found += [str(thread) for thread in threading.enumerate() if thread.name != "live"]
    found += ["an open descriptor" for _ in Path("/proc/self/fd").iterdir()]
    return Counter(found)


def main() -> int:
    """Play rounds until the time is up; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--items", type=int, default=20000, help="tasks per round")
    parser.add_argument("--minutes", type=float, default=0, help="play rounds for so long")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--ncpus", type=int, default=2, help="local workers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # lost hosts are what this is about
    end = time.monotonic() + 60 * args.minutes
    status, seed = 0, None
    with tempfile.TemporaryDirectory() as root, open_hosts(3, Path(root)) as hosts:
        while seed is None or seed == args.seed or time.monotonic() < end:
            faulthandler.dump_traceback_later(HANG, repeat=True)
            result = play(hosts, args.items, seed, ncpus=args.ncpus)
            faulthandler.cancel_dump_traceback_later()
            name = "undisturbed" if seed is None else f"disturbed, seed {seed}"
            print("\n  ".join([f"{name}: {result}", *result.problems[:20]]), flush=True)
            status |= bool(result.problems)
            seed = args.seed if seed is None else seed + 1
    return status


if __name__ == "__main__":
    sys.exit(main())
