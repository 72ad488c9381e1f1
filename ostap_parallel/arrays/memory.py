"""What a process has in use at most, and whether the kernel has killed for want of memory."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def forget_peak(pid: int) -> None:
    """Have the peak of a process begin anew."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> int:
    """Return the bytes that a process had in use at most; 0 if that is not known."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
        return int(found[1]) << 10 if found else 0
    return 0


def count_kills() -> int:
    """Return how often the kernel has killed in the control groups of this process, as it told.

    A group of the job's, above that of this process, counts too.
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        return sum(_kills_of(line) for line in lines)
    return 0


def _kills_of(line: str) -> int:
    number, controllers, path = line.split(":", 2)
    if "memory" in controllers.split(","):
        root, name = _GROUPS / "memory", "memory.oom_control"
    elif number == "0" and not controllers:
        root, name = _GROUPS, "memory.events"
    else:
        return 0
    group, kills = root / path.lstrip("/"), 0
    while group != root:
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)", (group / name).read_text(), re.MULTILINE)
            kills += int(found[1]) if found else 0
        group = group.parent
    return kills
