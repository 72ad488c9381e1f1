"""How many CPUs this process may use, which may be fewer than the machine has."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# How many threads a library takes; by itself as many as the machine has cores, in each process.
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


def thread_limits(environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables by which libraries of a worker take one thread, but for what is set.

    ``OMP_NUM_THREADS`` holds for all of them, as it does for most by themselves.
    """
    count = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip() or "1"
    return {name: count for name in _THREADS if name not in environ}


def usable_cpus(root: Path = Path("/")) -> int:
    """Return the number of CPUs that affinity and control groups grant, at least 1.

    `root` is where ``proc`` and ``sys`` are mounted.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU limits of the control groups, versions 1 and 2, that hold this process.

    See "CPU Interface Files" in the kernel's cgroup-v2 documentation and
    Documentation/scheduler/sched-bwc.rst for version 1.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct") if controllers else ()
        for mount in mounts or ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
            group = root / mount / path.lstrip("/")
            # A limit of any group above holds too; in a container the path may not exist.
            for directory in (group, *group.parents):
                yield from _quota(directory)
                if directory == root / mount:
                    break


def _quota(group: Path) -> Iterator[float]:
    for names in ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if int(quota) > 0:  # -1 is no limit
                yield int(quota) / int(period)
