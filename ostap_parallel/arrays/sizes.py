"""How many items a job does, if nobody tells.

A job costs a second or so before its first item, and a scheduler begins a few in a second: too
many jobs take longer than brief items. Too few leave cores idle at the end, when the last ones go
on alone. As for `multiprocessing.Pool`, there are four for each that may run at the same time.
"""

from __future__ import annotations

import logging

from ostap_parallel.arrays.settings import Settings
from ostap_parallel.errors import JobRefused, SchedulerUnavailable

logger = logging.getLogger(__name__)

# Jobs of a run: for each that may run at the same time, and altogether. That is what most sites
# let an array have, and nobody gets more than a few hundred at a time.
PER_SLOT = 4
MOST = 1000


def chunk_size(total: int, settings: Settings, chunks: int | None = None) -> int:
    """Return how many items a job does, for a number of jobs that is given or near the best.

    A job has at least one item for each of the processes that it has cores for.
    """
    if chunks:
        return max(1, -(-total // chunks))
    least = settings.processes
    if total <= least:
        return max(1, total)
    slots = settings.limit or _jobs_at_a_time(settings)
    most = min(MOST, PER_SLOT * slots) if slots else MOST
    return max(least, -(-total // most))


def _jobs_at_a_time(settings: Settings) -> int:
    """Return how many jobs the batch system has cores for, were there no others; 0: nobody tells.

    What one user may have of them only the site knows: that is what a limit is for.
    """
    try:
        cores = settings.scheduler().cores(settings.options)
    except (SchedulerUnavailable, JobRefused) as exc:
        logger.debug("nobody tells how many cores there are: %s", exc)
        return 0
    return cores // settings.cpus
