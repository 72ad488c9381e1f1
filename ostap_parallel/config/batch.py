"""What is asked of a batch system: the keys that make a section, or an object, allocations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ostap_parallel.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """What to ask a batch system for.

    Attributes
    ----------
    batch
        Which kind it is.
    login
        ``[user@]host[:port]`` where its commands are; ``None``: here.
    cpus
        Of each job; so many workers it has.
    walltime, memory
        Of each job; empty: no directive.
    options
        Directives as the site's manual has them; they win over ours.
    skip
        Directives of ours to leave out.
    jobs
        How many there may be at the same time; ``None``: as many as the workers need.
    adapt
        How many workers there are at least, and at most as work waits; ``None``: always the same.
    """

    batch: Literal["slurm", "sge"]
    login: str | None = None
    cpus: int = 1
    walltime: str = ""
    memory: str = ""
    options: str = ""
    skip: tuple[str, ...] = ()
    jobs: int | None = None
    adapt: tuple[int, int] | None = None

    def shares(self, name: str, workers: int | None) -> list[int]:
        """Return how many workers each job has; raises ConfigError if that takes too many."""
        if self.adapt is not None:
            if workers is not None:
                raise ConfigError(f"{name}*{workers}: adapt says how many workers there are")
            workers = self.adapt[1]
        if workers is None:
            return [self.cpus] * (self.jobs or 1)
        full, rest = divmod(workers, self.cpus)
        count = full + bool(rest)
        if self.jobs is not None and count > self.jobs:
            raise ConfigError(
                f"{name}*{workers}: with cpus = {self.cpus} that takes {count} jobs, but jobs = "
                f"{self.jobs} is the most that there may be"
            )
        return [self.cpus] * full + [rest] * bool(rest)

    def least(self) -> int | None:
        """Return how many jobs are always there; ``None``: all."""
        return None if self.adapt is None else -(-self.adapt[0] // self.cpus)


BATCH_KEYS = frozenset(field.name for field in fields(BatchConfig))
