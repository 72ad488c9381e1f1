"""Lists of hosts as batch systems and the hostfiles of MPI and SCOOP write them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ostap_parallel.errors import ConfigError

MAX_HOSTS = 1 << 16

Share = tuple[str, int | None]
"""A host, and how many workers it has; ``None``: as many as it grants CPUs."""

_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_REPEATED = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


def granted_hosts(environ: Mapping[str, str]) -> list[Share]:
    """Return what SLURM, PBS, SGE or LSF has granted the job that this is; nothing outside of one.

    Raises
    ------
    ConfigError
        What it says cannot be read.
    """
    for variable, read in _READERS.items():
        if environ.get(variable):
            return merge_shares(read(variable, environ))
    return []


def granted_cpus(environ: Mapping[str, str]) -> dict[str, int]:
    """Return how many CPUs a SLURM job has on each of its nodes, where it is told."""
    names = expand_hosts(environ.get("SLURM_JOB_NODELIST", ""), "SLURM_JOB_NODELIST")
    name = "SLURM_JOB_CPUS_PER_NODE"
    counts = list(_expand_counts(environ[name], name)) if environ.get(name) else []
    return dict(zip(names, counts, strict=False))


def read_hostfile(file: Path | str, where: str = "") -> list[Share]:
    """Return the hosts of a file: one a line, with the first number behind it as its workers.

    A name may hold ranges as SLURM writes them. A host that is named on several lines has as many
    workers as they say together, where a line without a number says 1.

    Raises
    ------
    ConfigError
        It cannot be read, or names no host.
    """
    where = where or str(file)
    try:
        lines = Path(file).expanduser().read_text().splitlines()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{where}: {file} cannot be read: {exc}") from exc
    shares = []
    for number, line in enumerate(lines, start=1):
        name, *rest = line.partition("#")[0].replace("*", " ").split() or [""]
        found = re.search("[0-9]+", " ".join(rest))
        for host in expand_hosts(name, f"{where}, line {number}"):
            shares.append((host, int(found[0]) or None if found else None))
    if not shares:
        raise ConfigError(f"{where}: {file} names no host")
    return merge_shares(shares)


def merge_shares(shares: Iterable[Share]) -> list[Share]:
    """Return each host once, in order; to be named again, or without a number then, counts 1."""
    merged: dict[str, int | None] = {}
    for host, count in shares:
        merged[host] = (merged[host] or 1) + (count or 1) if host in merged else count
    return list(merged.items())


def expand_hosts(text: str, where: str) -> list[str]:
    """Return the names in a list as SLURM writes it: ``n[01-04,7],rack[1-2]-[1-3]``.

    `where` names the list in errors.
    """
    names: list[str] = []
    for word in re.split(r",(?![^[]*\])", text):  # commas outside of brackets
        parts = re.split(r"\[([^][]*)\]", word)
        literals, ranges = parts[::2], parts[1::2]
        if set("[]") & set("".join(literals)):
            raise ConfigError(f"{where}: brackets that do not match: {text!r}")
        choices = [list(_expand_ranges(part, f"{where}: {text!r}")) for part in ranges]
        for numbers in itertools.product(*choices):
            pairs = zip(literals, (*numbers, ""), strict=True)
            names.append("".join(itertools.chain.from_iterable(pairs)))
            if len(names) > MAX_HOSTS:
                raise ConfigError(f"{where}: more than {MAX_HOSTS} hosts: {text!r}")
    return [name for name in names if name]


def _expand_ranges(text: str, where: str) -> Iterator[str]:
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not match or not first <= last < first + MAX_HOSTS:
            raise ConfigError(f"{where}: not a range of numbers: {part!r}")
        yield from (str(number).zfill(len(match[1])) for number in range(first, last + 1))


def _read_slurm(variable: str, environ: Mapping[str, str]) -> list[Share]:
    """Give each node a worker for each CPU that was asked for: by tasks, and by CPUs per task."""
    hosts = expand_hosts(environ[variable], variable)
    for name in "SLURM_TASKS_PER_NODE", "SLURM_JOB_CPUS_PER_NODE":
        if text := environ.get(name):
            each = int(environ.get("SLURM_CPUS_PER_TASK") or 1) if "TASKS" in name else 1
            counts = [each * count for count in _expand_counts(text, name)]
            if len(counts) != len(hosts):
                raise ConfigError(f"{name}: {text!r} is not for {len(hosts)} nodes")
            return list(zip(hosts, counts, strict=True))
    return [(host, None) for host in hosts]


def _expand_counts(text: str, where: str) -> Iterator[int]:
    """Yield the numbers in ``2(x3),1``."""
    for part in text.split(","):
        match = _REPEATED.fullmatch(part.strip())
        if not match or int(match[2] or 1) > MAX_HOSTS:
            raise ConfigError(f"{where}: not a list of numbers: {text!r}")
        yield from [int(match[1])] * int(match[2] or 1)


def _read_pbs(variable: str, environ: Mapping[str, str]) -> list[Share]:
    shares = read_hostfile(environ[variable], variable)
    cpus = environ.get("NCPUS", "")
    if cpus.isdecimal() and not any(count for _, count in shares):
        return [
            (host, int(cpus)) for host, _ in shares
        ]  # a node is named once, whatever it grants
    return [(host, count or 1) for host, count in shares]


def _read_lsf(variable: str, environ: Mapping[str, str]) -> list[Share]:
    words = environ[variable].split()
    if variable == "LSB_HOSTS":
        return [(host, 1) for host in words]
    if len(words) % 2 or not all(count.isdecimal() for count in words[1::2]):
        raise ConfigError(f"{variable}: not hosts and numbers by turns: {environ[variable]!r}")
    return [(host, int(count)) for host, count in zip(words[::2], words[1::2], strict=True)]


_READERS = {
    "SLURM_JOB_NODELIST": _read_slurm,
    "SLURM_NODELIST": _read_slurm,
    "PBS_NODEFILE": _read_pbs,
    "PE_HOSTFILE": lambda variable, environ: read_hostfile(environ[variable], variable),
    "LSB_MCPU_HOSTS": _read_lsf,
    "LSB_HOSTS": _read_lsf,
}
