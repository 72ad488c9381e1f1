"""What is to be known about executors of somebody else's."""

from __future__ import annotations

import os
from concurrent.futures import Executor


def count_workers(executor: Executor) -> int:
    """Return how many calls an executor runs at the same time, as far as it tells.

    One that has no worker at the moment may start some when there is work.
    """
    threads = getattr(getattr(executor, "_client", None), "nthreads", None)
    if threads is not None:  # dask's; its workers may come and go
        return sum(threads().values()) or 1
    return getattr(executor, "_max_workers", None) or os.cpu_count() or 1
