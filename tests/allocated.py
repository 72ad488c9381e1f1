"""What tests of allocations have done on nodes."""

from __future__ import annotations

import os
import time
import uuid


def where(number: int) -> tuple[int, str | None, str | None]:
    """Return the square of a number, the job, and how many cores it has."""
    time.sleep(0.01)
    environ = os.environ
    return number * number, environ.get("SLURM_JOB_ID"), environ.get("SLURM_CPUS_PER_TASK")


def seen(number: int) -> str | None:
    """Return what the environment of the node says."""
    return os.environ.get("SEEN")


def slow(seconds: float) -> str:
    """Take some time; return what no other call does."""
    time.sleep(seconds)
    return uuid.uuid4().hex
