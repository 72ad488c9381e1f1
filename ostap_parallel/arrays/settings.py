"""What a run asks of its batch system, kept with the run so that another process can go on."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ostap_parallel
from ostap_parallel.engine.retries import LOST_RETRIES
from ostap_parallel.schedulers.directives import joined, name_in
from ostap_parallel.schedulers.quantities import parse_memory, parse_walltime
from ostap_parallel.schedulers.scheduler import JobSpec, Scheduler
from ostap_parallel.schedulers.sge import Sge
from ostap_parallel.schedulers.slurm import Slurm
from ostap_parallel.supply.here import run_here

SCHEDULERS: dict[str, Callable[..., Scheduler]] = {"slurm": Slurm, "sge": Sge}

# How often what no item is to blame for is submitted again.
RETRIES = 3

# Seconds before its end by which a job learns of that, if it may take far longer.
WARNING = 60

# What SGE does not hand on by itself, and a program may not even start without. Nothing else: what
# is in a script may be read by others, and an environment has secrets.
_CARRIED = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "ROOTSYS")
_CARRIED_TOO = ("LANG", "LC_ALL", "TZ")

START = """\
import sys
here = {version!r} == sys.version_info[:2]
sys.path[:] = [*{path!r}, *(p for p in sys.path[1:] if p not in {path!r})]
if not here:  # what was compiled for another Python is of no use
    sys.path[:] = [p for p in sys.path if {other!r} not in p]
sys.argv[0] = "ostap_parallel-job"
from ostap_parallel.arrays.job import main
main()
"""

Amount = str | int | timedelta | Callable[[int], str | int | timedelta]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked for.

    Attributes
    ----------
    kind, commands
        ``"slurm"`` or ``"sge"``, and the parameters of that class.
    cpus, options, skip, environment
        As of `schedulers.scheduler.JobSpec`; the last are lines for the script.
    memory, walltime
        For the first attempt, the second one and so on.
    limit
        Jobs at the same time; 0: as many as the batch system allows.
    processes
        Items at the same time in a job.
    retries
        How often items are submitted again that were not to blame.
    lost_retries
        How often a job begins an item again that has ended its worker.
    python
        What runs the items.
    name
        Begins the names of the jobs.
    function
        What is done, in words.
    total, size
        Items, and how many there are in a chunk.
    submit_timeout
        Seconds that a submission may take before its job is looked for.
    """

    kind: str
    commands: dict[str, str] = field(default_factory=dict)
    cpus: int = 1
    processes: int = 1
    memory: list[str]
    walltime: list[str | int]
    options: str = ""
    skip: list[str] = field(default_factory=list)
    environment: str = ""
    limit: int = 0
    retries: int = RETRIES
    lost_retries: int = LOST_RETRIES
    python: str = sys.executable
    name: str = field(default_factory=lambda: f"op-{secrets.token_hex(4)}")
    directory: str = field(default_factory=os.getcwd)
    function: str = ""
    total: int = 0
    size: int = 1
    submit_timeout: float = 30.0

    def scheduler(self) -> Scheduler:
        """Return the batch system, with its commands on this machine."""
        return SCHEDULERS[self.kind](run_here, **self.commands)

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return asdict(self)

    @property
    def chunks(self) -> int:
        """Number of chunks that there are at first."""
        return -(-self.total // self.size)

    def job_name(self, array: int) -> str:
        """Return the name of the jobs of an array, which no others have."""
        given = name_in(self.options, self.scheduler().naming.split())
        return f"{given}-{self.name}-{array}".lstrip("-")

    def spec(self, root: Path, array: int, elements: int, attempt: int, limit: int) -> JobSpec:
        """Return what to ask for an array of chunks that are begun for the n-th time."""
        scheduler = self.scheduler()
        place = min(attempt, len(self.memory)) - 1
        walltime = self.walltime[min(attempt, len(self.walltime)) - 1]
        arguments = shlex.join([self.python, str(root / "start.py"), str(root), str(array)])
        element = f"$(({scheduler.index} - {scheduler.first}))"
        lines = [_exports() if self.kind == "sge" else "", self.environment]
        body = "\n".join([*filter(None, lines), f"exec {arguments} {element}", ""])
        return JobSpec(
            name=self.job_name(array),
            body=body,
            cpus=self.cpus,
            memory=self.memory[place],
            walltime=walltime,
            elements=elements,
            limit=limit,
            output=str(root / "logs" / str(array)),
            directory=self.directory,
            warn=_warning(walltime),
            options=self.options,
            skip=self.skip,
        )


def renamed(settings: Settings) -> Settings:
    """Return settings for another run, whose jobs are not to be taken for those of others."""
    return replace(settings, name=f"op-{secrets.token_hex(4)}")


def _warning(walltime: str | int) -> int:
    """Return by how many seconds to warn: of a short time a warning must leave the most."""
    seconds = parse_walltime(walltime)
    return min(WARNING, seconds // 4) if seconds else WARNING


def _exports() -> str:
    names = [name for name in (*_CARRIED, *_CARRIED_TOO) if name in os.environ]
    return "\n".join(f"export {name}={shlex.quote(os.environ[name])}" for name in names)


def start_file() -> str:
    """Return the program of a job: what it imports is what this process would."""
    package = str(Path(ostap_parallel.__file__).parents[1])
    path = [entry or str(Path.cwd()) for entry in sys.path]
    if package not in path:
        path.append(package)
    version = sys.version_info[:2]
    return START.format(version=version, path=path, other="python{}.{}".format(*version))


def amounts(value: Amount, retries: int, check: Callable[[Any], int], name: str) -> list[Any]:
    """Return what is asked for in each attempt; a function gets its number, from 1 on.

    Raises ValueError or TypeError.
    """
    if not callable(value):
        check(value)
        return [_plain(value)]
    found = [value(attempt) for attempt in range(1, retries + 2)]
    for attempt, one in enumerate(found, 1):
        try:
            check(one)
        except ValueError as exc:
            raise ValueError(f"{name} for attempt {attempt}: {exc}") from None
    return list(map(_plain, found))


def _plain(value: Any) -> Any:
    """Return what JSON knows."""
    return int(value.total_seconds()) if isinstance(value, timedelta) else value


def make(
    kind: str,
    *,
    cpus: int = 1,
    memory: Amount = "",
    walltime: Amount = "",
    processes: int | None = None,
    limit: int | None = None,
    retries: int = RETRIES,
    options: str | Collection[str] = "",
    environment: str | Collection[str] = "",
    skip: str | Collection[str] = (),
    commands: Mapping[str, str] = {},
    root: Path = Path("/directory"),
    **rest: Any,
) -> Settings:
    """Return settings that have been checked, also for runs in a directory.

    Raises
    ------
    ValueError, TypeError
        One of them is wrong; nothing has been submitted.
    """
    for name, number, least in (
        ("cpus", cpus, 1),
        ("limit", limit, 1),
        ("processes", processes, 1),
        ("retries", retries, 0),
    ):
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, not {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")
    settings = Settings(
        kind=kind,
        cpus=cpus,
        processes=processes or cpus,
        memory=amounts(memory, retries, parse_memory, "memory"),
        walltime=amounts(walltime, retries, parse_walltime, "walltime"),
        limit=limit or 0,
        retries=retries,
        options=joined("options", options, " "),
        environment=joined("environment", environment, "\n"),
        skip=skip.split() if isinstance(skip, str) else list(skip),
        commands=dict(commands),
        **rest,
    )
    settings.scheduler().script(settings.spec(root, 0, 1, 1, 0))  # which checks the rest
    return settings
