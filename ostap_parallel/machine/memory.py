"""How often the system has ended processes of our control group as memory ran out."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

LATELY = 2.0  # seconds

_ROOT = Path("/sys/fs/cgroup")


class MemoryWatch:
    """Remembers how often that was."""

    def __init__(self) -> None:
        self._folder = _own_group()
        self._kills, self._since = self._count(), -LATELY

    def look(self) -> str:
        """Return that memory has run out since the last look, and the limit; or nothing."""
        before, self._kills = self._kills, self._count()
        now = time.monotonic()
        if self._kills > before:
            self._since = now
        if (
            now - self._since > LATELY
        ):  # others may have been ended with the one that was asked for
            return ""
        limit = self._limit()
        return f"out of memory, limit {limit >> 20}M" if limit else "out of memory"

    def _count(self) -> int:
        for folder in self._folders():
            for name in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    found = re.search(r"^oom_kill (\d+)", (folder / name).read_text(), re.M)
                    if found:
                        return int(found[1])
        return 0

    def _limit(self) -> int:
        """Return the least limit of the group and of those that it is in, in bytes; 0: none."""
        limits = []
        for folder in self._folders():
            for name in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((folder / name).read_text()))
        return min((limit for limit in limits if limit < 1 << 60), default=0)

    def _folders(self) -> list[Path]:
        folder = self._folder
        parents = [] if folder is None else [folder, *folder.parents]
        return [one for one in parents if one.is_relative_to(_ROOT)]


def _own_group() -> Path | None:
    """Return the folder of our control group of memory, of either version."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, kinds, path = line.split(":", 2)
            if "memory" in kinds.split(","):
                return _ROOT / "memory" / path.lstrip("/")
            if number == "0" and not kinds and (_ROOT / "cgroup.controllers").exists():
                return _ROOT / path.lstrip("/")
    return None
