"""What a batch system is to the rest: a handful of verbs, as text in and text out."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ostap_parallel.schedulers.quantities import parse_memory, parse_walltime


@dataclass(frozen=True)
class Done:
    """A command that has ended; `status` is its exit status."""

    status: int
    output: str
    errors: str

    @property
    def words(self) -> str:
        """What it said, best of all on standard error."""
        return (self.errors.strip() or self.output.strip()) or f"exit status {self.status}"


class Runner(Protocol):
    """Runs a command where the scheduler's are: here, or on a login host.

    Raises
    ------
    SchedulerUnavailable
        It has not ended within `timeout` seconds, or could not be begun: whether it has done
        anything is not known.
    """

    def __call__(self, argv: Sequence[str], data: str = "", timeout: float = 60.0) -> Done: ...


class Phase(enum.Enum):
    """Where a job is, as its scheduler says."""

    QUEUED = "queued"
    STUCK = "stuck"  # it will never start by itself: held, or what it asks for is refused
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"  # the scheduler knows of no such job, or no longer


class End(enum.Enum):
    """How a job has ended, as its scheduler says; what it has done, only its own files say."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    WALLTIME = "wall time"
    MEMORY = "out of memory"
    NODE = "node failure"
    PREEMPTED = "preempted"


@dataclass(frozen=True)
class JobState:
    """The state of a job, or of one element of an array.

    Attributes
    ----------
    words
        The scheduler's own, e.g. ``"PENDING (Resources)"``.
    reason
        Why it waits or is stuck, in the scheduler's words.
    host
        Where it runs or ran, if that is told.
    start
        When it is expected to start, as text, if that is told.
    left
        Seconds that it may still run, if that is told.
    number
        By which srun knows it; SLURM has another one for elements of arrays.
    is_suspended
        It has begun, and does not go on by itself.
    """

    phase: Phase
    words: str = ""
    end: End | None = None
    reason: str = ""
    host: str = ""
    start: str = ""
    left: int | None = None
    number: str = ""
    is_suspended: bool = False


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What to ask for.

    Attributes
    ----------
    name
        Of the job; by this it is found again if the answer to its submission is lost.
    body
        The lines of the script below the directives.
    cpus
        Cores on one host.
    memory
        Of the whole job, e.g. ``"4G"``; empty: no directive.
    walltime
        E.g. ``"4:00:00"``, ``"90m"``, or seconds; empty: no directive.
    elements
        Of an array; 0: a single job.
    limit
        Elements that may run at the same time; 0: all.
    output
        File for what the job prints; each element of an array has one, with its index behind a
        dot.
    directory
        Where it starts; empty: where it is submitted.
    warn
        Seconds before the end by which the script is signalled; 0: it is not.
    warn_steps
        The signal is for the steps of the job, not for its script; SLURM only.
    requeue
        Have the scheduler begin the job anew after the loss of a node; ``None``: as the site does.
    options
        Directives as the site's manual has them; they win over ours.
    skip
        Directives of ours to be left out, e.g. ``("--mem",)`` or ``("-pe", "h_rt")``.
    """

    name: str
    body: str
    cpus: int = 1
    memory: str = ""
    walltime: str | int = ""
    elements: int = 0
    limit: int = 0
    output: str = "/dev/null"
    directory: str = ""
    warn: int = 0
    warn_steps: bool = False
    requeue: bool | None = None
    options: str = ""
    skip: Collection[str] = ()

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"a job's name has letters, digits, - and _, not {self.name!r}")
        if self.cpus < 1:
            raise ValueError(f"cpus must be at least 1, not {self.cpus!r}")
        for what in ("options", "directory", "output"):
            if "\n" in (text := getattr(self, what)):  # the next line would be the script's
                raise ValueError(f"{what} must be one line, not {text!r}")
        parse_memory(self.memory)
        parse_walltime(self.walltime)

    @property
    def has_outputs(self) -> bool:
        """Whether each element of an array has a file of its own for what it prints."""
        return self.elements > 0 and self.output != "/dev/null"


class Scheduler(Protocol):
    """A batch system.

    Each verb is one command, or a few; where one has failed, nothing is known.

    Raises
    ------
    SchedulerUnavailable
        The scheduler did not answer, or could not do it now: ask again later. What was known
        before still holds.

    Attributes
    ----------
    name
        ``"slurm"`` or ``"sge"``.
    index, first
        The variable that has the number of an array's element, and the number of the first.
    job
        The variable that has the id.
    naming
        The options that give a job its name, with blanks.
    """

    name: str
    index: str
    first: int
    job: str
    naming: str

    def script(self, spec: JobSpec) -> str:
        """Return what would be submitted."""

    def submit(self, script: str, timeout: float = 60.0) -> str:
        """Submit a script; return the id.

        Raises
        ------
        JobRefused
            It can never run so; with the scheduler's words.
        QueueFull
            There are too many jobs for now.
        SchedulerUnavailable
            Whether it was submitted is not known: see `find`.
        """

    def find(self, name: str) -> list[str]:
        """Return the ids of the user's jobs of a name."""

    def states(self, ids: Collection[str], *, ended: bool = True) -> Mapping[str, JobState]:
        """Return the states of all jobs of these ids.

        Elements of arrays are named ``ID_INDEX``, those of an array that is asked for by its id,
        too. One of which nothing is known is `Phase.UNKNOWN`.

        Parameters
        ----------
        ended
            Ask the accounts, too, for what the queue has forgotten.
        """

    def gives_way(self, job: str) -> bool:
        """Return whether a job that runs is about to be ended for another one."""

    def cancel(self, ids: Collection[str]) -> None:
        """Cancel jobs, or elements ``ID_INDEX``; that one has ended is no error."""

    def check(self, script: str) -> str:
        """Return what the scheduler says to a script that is not submitted.

        Raises
        ------
        JobRefused
            It can never run so.
        """

    def largest_array(self) -> int:
        """Return how many elements an array may have."""

    def cores(self, options: str) -> int:
        """Return how many cores there are for jobs with such options; 0: nobody tells."""
