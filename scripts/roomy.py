"""Where tests keep their temporary files."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
WANTED = 4 << 30  # bytes


@functools.cache
def temporary_root() -> Path:
    """Return a directory in memory, if there is room and programs may run there, else the usual.

    Tests make and remove some hundred thousand files. On a disk this is a third of the time that
    the system spends for them, as ext4 searches what has just been removed for each new one.
    """
    usual = Path(tempfile.gettempdir())
    if usual == Path("/tmp") and MEMORY.is_dir() and os.access(MEMORY, os.W_OK):
        place = os.statvfs(MEMORY)
        free = min(place.f_bavail * place.f_frsize, _available())
        if free >= WANTED and not place.f_flag & os.ST_NOEXEC:
            return MEMORY
    return usual


def _available() -> int:
    """Return how much memory there is, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return 1024 * int(kib)
