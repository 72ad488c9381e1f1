"""What a worker does just now, and what it and its machine use, for who asks."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple


class Doing(NamedTuple):
    """What a worker does.

    Attributes
    ----------
    item
        Index of the one that runs, or -1.
    pid
        The process, or 0.
    memory
        Bytes that it has in memory; 0: that is not known.
    load
        Processes of its machine that ran or wanted to, in the mean of the last minute.
    """

    item: int
    pid: int
    memory: int
    load: float


def doing(item: int, pid: int) -> Doing:
    """Return what a worker of this machine does."""
    load = 0.0
    with contextlib.suppress(OSError):  # not to be had
        load = os.getloadavg()[0]
    return Doing(item, pid, _memory_of(pid), load)


def _memory_of(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0
