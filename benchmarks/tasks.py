"""What the benchmarks have computed; it imports what it needs, as pathos sends source text."""

from __future__ import annotations

from typing import Any


def square(x: int) -> int:
    return x * x


def nap(seconds: float) -> int:
    import time

    time.sleep(seconds)
    return 1


def burn(loops: int) -> float:
    """Use the processor; return the seconds that it took."""
    import time

    begin = time.perf_counter()
    for _ in range(loops):
        pass
    return time.perf_counter() - begin


def burn_unevenly(loops: int) -> float:
    """Use the processor, on the host h2 four times as long; return the seconds per loop."""
    import socket

    from benchmarks.tasks import burn

    factor = 4 if socket.gethostname() == "h2" else 1
    return burn(factor * loops) / factor


def make_bytes(size: int) -> bytes:
    return bytes(size)


def who_and_where(seconds: float) -> tuple[str, int]:
    """Sleep; return the host's name and the worker's process."""
    import os
    import socket
    import time

    time.sleep(seconds)
    return socket.gethostname(), os.getpid()


def look_up(index: int, table: Any) -> tuple[float, int]:
    """Add up a thousandth of an array that all share, from all over it; return who has done so."""
    import os

    return float(table[index::1000].sum()), os.getpid()


def burn_for(microseconds: int) -> int:
    """Use the processor for so long."""
    import time

    if microseconds:
        end = time.perf_counter() + microseconds * 1e-6
        while time.perf_counter() < end:
            pass
    return microseconds


def kill_once(path: str) -> tuple[float, float]:
    """End this process the first time; return when that was, and when this runs again."""
    import os
    import signal
    import time

    if not os.path.exists(path):  # noqa: PTH110
        with open(f"{path}.part", "w") as file:  # noqa: PTH123
            file.write(repr(time.monotonic()))
        os.rename(f"{path}.part", path)  # noqa: PTH104
        os.kill(os.getpid(), signal.SIGKILL)
    now = time.monotonic()
    with open(path) as file:  # noqa: PTH123
        return float(file.read()), now


_kept: list[bytes] = []


def keep(data: bytes) -> None:
    """Keep what an initializer is given."""
    from benchmarks import tasks

    tasks._kept[:] = [data]


def kept_size(_: int) -> tuple[int, int]:
    """Return the size of what is kept, and the memory of this process in KiB."""
    from benchmarks import tasks

    with open("/proc/self/statm") as file:  # noqa: PTH123
        return len(tasks._kept[0]), 4 * int(file.read().split()[1])


def first_row(array: Any, number: int) -> int:
    return number + int(array[0])


def stall(item: tuple[float, float]) -> float:
    """Sleep; on a host that stalls, from some time on, far longer. Return the time wanted."""
    import os
    import time

    seconds, begin = item
    time.sleep(STALL if "STALLS" in os.environ and time.time() > begin else seconds)
    return seconds


# Seconds for which a host that stalls does.
STALL = 15.0


def end_worker(_: int) -> None:
    """End this process, as if it had crashed."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
