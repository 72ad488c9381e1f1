"""A network cable that can be cut.

It joins this machine to a new network name space, which has a loopback of its own and nothing
else. While it is cut packets vanish and nothing is closed, so neither end can tell::

    with open_cable(delay=0.010) as cable:
        server = Popen(["nsenter", f"--net={cable.space}", "sshd", "-D", "-p", "2222"])
        run(["ssh", "-p", "2222", cable.far, "true"])
        cable.cut()

The cable is a process that carries packets between two tun devices. With it go the devices, their
addresses, and whatever still runs in the name space; it ends with the process that opened it,
however that ends. Needs Linux, root, ``ip`` and ``/dev/net/tun``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from subprocess import PIPE

# For tests of networks (RFC 2544), so not in use elsewhere; but some VPNs take its other half.
ADDRESSES = IPv4Network("198.19.0.0/16")

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
PACKET = 65536  # bytes, more than any packet has
BURST = 64  # packets taken from a device before the other gets its turn


class CableUnavailable(RuntimeError):
    """No cable can be had here; the text says why."""


@dataclass(frozen=True)
class Cable:
    """One end of it here, the other in a name space. Made by `open_cable`.

    Attributes
    ----------
    device
        The end here, for ``tcpdump`` or ``tc``; the other is ``eth0``.
    near, far
        The addresses of the two ends.
    """

    device: str
    near: str
    far: str
    _process: subprocess.Popen[str]

    @property
    def space(self) -> str:
        """Return the file of the name space, for ``nsenter --net=``."""
        return f"/proc/{self._process.pid}/ns/net"

    def cut(self) -> None:
        """Let all packets vanish from now on, those under way too."""
        self._tell("cut")

    def heal(self) -> None:
        """Carry packets again; those sent in the meantime are lost."""
        self._tell("heal")

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != f"{word}\n":
            raise CableUnavailable(f"the cable to {self.far} is gone")


@contextmanager
def open_cable(delay: float = 0.0) -> Iterator[Cable]:
    """Lay a cable for the block.

    Parameters
    ----------
    delay
        Seconds that each packet takes, in both directions.

    Raises
    ------
    CableUnavailable
        The rights, ``ip`` or ``/dev/net/tun`` are missing.
    """
    argv = [sys.executable, "-IS", __file__, str(delay)]
    # A session of its own keeps Ctrl-C in the terminal away from it.
    with subprocess.Popen(
        argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ends = process.stdout.readline().split()
        if not ends:
            raise CableUnavailable(process.stderr.read().strip())
        try:
            device, near, far = ends
            yield Cable(device, near, far, process)
        finally:
            process.communicate()  # closes its standard input, and waits


# -- the process -----------------------------------------------------------------------------


def main(delay: float) -> None:
    """Be the cable until standard input ends; its lines are ``cut`` and ``heal``."""
    here, number = claim()
    device, near, far = f"cable{number}", *addresses(number)
    run_ip(f"address add {near} peer {far} dev {device}", f"link set {device} up")
    unshare_network()
    there = open_tun()
    attach(there, "eth0")
    run_ip("link set lo up", f"address add {far} peer {near} dev eth0", "link set eth0 up")
    print(device, near, far, flush=True)
    carry(here, there, delay)
    kill_inhabitants()


def claim() -> tuple[int, int]:
    """Return a new device and the number in its name, which claims the addresses too.

    The kernel gives a name only once.
    """
    tun = open_tun()
    for number in range(ADDRESSES.num_addresses // 4):
        try:
            attach(tun, f"cable{number}")
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
        else:
            return tun, number
    raise OSError(errno.EADDRINUSE, f"no free address in {ADDRESSES}")


def addresses(number: int) -> tuple[str, str]:
    """Return the near and the far address of a cable."""
    return str(ADDRESSES[4 * number + 1]), str(ADDRESSES[4 * number + 2])


def open_tun() -> int:
    """Open a tun device that has no name yet."""
    return os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)


def attach(tun: int, name: str) -> None:
    """Name a device, in the name space in which this process is now."""
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))


def unshare_network() -> None:
    """Move this process into a new name space. Devices that it has open stay in theirs."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.unshare came with Python 3.12
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a network name space of its own is not allowed")


def run_ip(*lines: str) -> None:
    """Run commands of ``ip``."""
    text = "".join(f"{line}\n" for line in lines)
    subprocess.run(["ip", "-batch", "-"], input=text, text=True, check=True)


def carry(here: int, there: int, delay: float) -> None:
    """Carry packets both ways, each `delay` seconds late, until standard input ends."""
    other = {here: there, there: here}
    under_way: deque[tuple[float, int, bytes]] = deque()  # when due, where to, what
    whole = True
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([0, here, there], [], [], wait)
        if 0 in ready:
            line = os.read(0, PACKET)
            if not line:
                return
            whole = line == b"heal\n"
            under_way.clear()
            os.write(1, line)
        for device in other.keys() & ready:
            packets = read_some(device)
            due = time.monotonic() + delay
            if whole:
                under_way.extend((due, other[device], packet) for packet in packets)
        while under_way and under_way[0][0] <= time.monotonic():
            _, device, packet = under_way.popleft()
            os.write(device, packet)


def read_some(device: int) -> list[bytes]:
    """Return the packets that wait in a device, up to `BURST`."""
    packets: list[bytes] = []
    with suppress(BlockingIOError):
        while len(packets) < BURST:
            packets.append(os.read(device, PACKET))
    return packets


def kill_inhabitants() -> None:
    """Kill what runs in this process' name space, for whom nobody is left to end it."""
    space = Path("/proc/self/ns/net").readlink()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if (entry / "ns/net").readlink() == space and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)


if __name__ == "__main__":
    try:
        main(float(sys.argv[1]))
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
