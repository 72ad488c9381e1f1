"""Chunks to arrays of jobs: each is submitted once, also if the answer comes late or never."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Container, Sequence
from concurrent.futures import CancelledError

from ostap_parallel.arrays.layout import Layout
from ostap_parallel.arrays.settings import Settings
from ostap_parallel.errors import JobRefused, QueueFull, SchedulerUnavailable
from ostap_parallel.schedulers.scheduler import Phase

logger = logging.getLogger(__name__)

# Seconds during which an array is looked for whose submission has not been answered: it may show
# later. Each look comes later than the one before.
SETTLING = 12.0
FIRST_LOOK = 0.2

# Seconds during which it is tried to submit what the scheduler does not answer to.
PATIENCE = 600.0

# Seconds until the next try where there is no room, at first and at most.
FIRST_REST, LAST_REST = 2.0, 30.0

# What sbatch says, and waits, where there is no room.
_NO_ROOM = "temporarily unable to accept job"


class Submitter:
    """Submits chunks of one run.

    Attributes
    ----------
    waiting
        Chunks that there was no room for, with what attempt it is for them.
    stopping
        Is set when nothing more is to be submitted.
    ids
        Of the arrays that this process has submitted, or looks after.
    """

    def __init__(self, layout: Layout, settings: Settings) -> None:
        self._layout, self._settings = layout, settings
        self.stopping = threading.Event()
        self._scheduler = settings.scheduler()
        self._largest = 0
        self.waiting: list[tuple[int, int]] = []
        self.ids: list[str] = []
        self._rest, self._not_before = 0.0, 0.0

    def submit(
        self, chunks: Sequence[tuple[int, int]], made: list[int] | None = None
    ) -> list[int]:
        """Submit chunks, each with its attempt; return the numbers of the arrays.

        Parameters
        ----------
        made
            Gets these, too, one by one: some may have been submitted where this raises.

        Raises
        ------
        JobRefused
            They can never run so; those of arrays before have been submitted.
        SchedulerUnavailable
            It has not answered for `PATIENCE` seconds.
        concurrent.futures.CancelledError
            It was told to stop meanwhile.
        """
        self._largest = self._largest or self._scheduler.largest_array()
        made = [] if made is None else made
        by_attempt: dict[int, list[int]] = {}
        for number, attempt in chunks:
            by_attempt.setdefault(attempt, []).append(number)
        for attempt, numbers in sorted(by_attempt.items()):
            self._submit_alike(numbers, attempt, made)
        return made

    def submit_waiting(self, made: list[int] | None = None) -> list[int]:
        """Submit what there was no room for, as far as there is now; see `submit`."""
        if not self.waiting or time.monotonic() < self._not_before:
            return []
        waiting, self.waiting = self.waiting, []
        return self.submit(waiting, made)

    def drop(self, numbers: Container[int]) -> None:
        """Submit these no more, of those that wait."""
        self.waiting = [one for one in self.waiting if one[0] not in numbers]

    def _submit_alike(self, numbers: list[int], attempt: int, made: list[int]) -> None:
        count = -(-len(numbers) // self._largest)  # arrays, of about the same size
        limit = max(1, self._settings.limit // count) if self._settings.limit else 0
        size = -(-len(numbers) // count)
        while numbers:
            if self.stopping.is_set():
                raise CancelledError("the run was cancelled")
            taken, rest = numbers[:size], numbers[size:]
            array = self._prepare(taken, attempt, min(limit, len(taken)))
            try:
                self._submit_one(array)
            except QueueFull as exc:
                self._forget(array)
                if size == 1:
                    self._wait_with([(number, attempt) for number in numbers], exc)
                    return
                size = -(-size // 2)
            except (JobRefused, SchedulerUnavailable):
                self._forget(array)
                raise
            else:  # if anything else cuts it off, it may be there: it is looked for by its name
                made.append(array)
                numbers = rest
                self._rest = 0.0

    def _wait_with(self, chunks: list[tuple[int, int]], exc: QueueFull) -> None:
        """Keep chunks for later, and wait longer each time: each try is a few commands."""
        self.waiting += chunks
        level = logging.DEBUG if self._rest else logging.WARNING
        text = "%d jobs are to be submitted later, as the queue is full: %s"
        logger.log(level, text, len(chunks), exc.reason)
        self._rest = min(2 * self._rest or FIRST_REST, LAST_REST)
        self._not_before = time.monotonic() + self._rest

    def _prepare(self, numbers: list[int], attempt: int, limit: int) -> int:
        """Write what an array is; return its number."""
        array = max(self._layout.arrays(), default=-1) + 1
        self._layout.make_shards(numbers)
        root = self._layout.root
        spec = self._settings.spec(root, array, len(numbers), attempt, limit)
        self._layout.write(f"jobs/{array}.sh", self._scheduler.script(spec).encode())
        self._layout.write(f"jobs/{array}.list", "\n".join(map(str, numbers)).encode())
        return array

    def _forget(self, array: int) -> None:
        for suffix in ("list", "sh"):
            (self._layout.root / f"jobs/{array}.{suffix}").unlink(missing_ok=True)

    def _submit_one(self, array: int) -> str:
        """Submit an array and return its id.

        If there is no answer, whether it is there is asked for by its name.
        """
        script = self._layout.read(f"jobs/{array}.sh").decode()
        end = time.monotonic() + PATIENCE
        while True:
            try:
                job = self._scheduler.submit(script, self._settings.submit_timeout)
            except QueueFull:
                raise
            except SchedulerUnavailable as exc:
                job = self.find(array, SETTLING)
                if not job and _NO_ROOM in exc.reason:
                    raise QueueFull(exc.command, exc.reason) from None
                if not job and (self.stopping.is_set() or time.monotonic() > end):
                    raise
                if not job:
                    logger.warning("trying again to submit: %s", exc)
            if job:
                self.ids.append(job)
                self._layout.write(f"jobs/{array}.id", job.encode())
                return job

    def find(self, array: int, seconds: float = 0.0, patience: float = PATIENCE) -> str:
        """Return the id of an array that may have been submitted; look for so many seconds.

        Where the scheduler does not answer, `patience` is for how long more. Of several, which
        there should not be, the first is it; the others do nothing.
        """
        pause, end = FIRST_LOOK, time.monotonic() + seconds
        while True:
            try:
                if found := self._scheduler.find(self._settings.job_name(array)):
                    return min(found, key=int)
                is_sure = time.monotonic() > end
            except SchedulerUnavailable:
                is_sure = time.monotonic() > end + patience
            if is_sure:
                return ""
            time.sleep(pause)
            pause = min(2 * pause, 3.0)

    def cancel(self) -> None:
        """Cancel all arrays, also those of which it is not known whether they were submitted.

        Raises
        ------
        SchedulerUnavailable
            Jobs may still be there: they end, when they begin, without doing anything.
        """
        ids = dict.fromkeys(self.ids)
        try:
            self._layout.write("cancelled", b"")
            arrays = self._layout.arrays()
        except OSError as exc:  # the disk is full, or somebody has removed it
            level = logging.DEBUG if isinstance(exc, FileNotFoundError) else logging.WARNING
            logger.log(level, "only jobs that were submitted here are cancelled: %s", exc)
            arrays = []
        for array in arrays:
            ids[self._layout.job_id(array) or self.find(array, patience=0.0)] = None
        self._scheduler.cancel([job for job in ids if job])

    def clear(self) -> None:
        """Cancel what is left in the queue of arrays whose chunks have all ended.

        The scheduler may have begun jobs anew, and held or suspended others. What runs is just
        about to end.

        Raises
        ------
        SchedulerUnavailable
            As for `cancel`.
        """
        ids = [job for job in map(self._layout.job_id, self._layout.arrays()) if job]
        states = self._scheduler.states(ids, ended=False)
        waits = Phase.QUEUED, Phase.STUCK
        self._scheduler.cancel(
            [job for job, state in states.items() if state.phase in waits or state.is_suspended]
        )

    def recover(self) -> list[int]:
        """Find the ids of arrays whose submission was cut off; submit those that are not there.

        Returns the numbers of all arrays.
        """
        for array in self._layout.arrays():
            if not self._layout.job_id(array):
                if job := self.find(array):
                    self._layout.write(f"jobs/{array}.id", job.encode())
                else:
                    self._submit_one(array)
        self.ids += map(self._layout.job_id, self._layout.arrays())
        return self._layout.arrays()
