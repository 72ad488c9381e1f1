"""Keywords as Ostap takes them: in any case, under several names, and never wrong."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

from ostap_parallel.logs import logger_of
from ostap_parallel.machine.cpus import usable_cpus

logger = logger_of(__name__)

# What a manager takes for its workers and hosts.
_HOSTS = (
    *("environment", "script", "profile", "secret", "timeout", "python", "user", "port", "tmpdir"),
    *("ssh_options", "ssh_config", "python_mismatch", "keepalive", "ncpus_per_host", "config"),
    *("patience", "sync", "tasks_per_worker", "environment_more", "start_timeout", "nice"),
    *("requires", "preload", "start", "way"),
)
# What a run takes. Given to a manager they hold for all its runs.
_RUN = (
    *("merger", "collector", "init", "imports", "description", "progress", "silent", "ordered"),
    *("hyper_block_size", "on_error", "retries", "lost_retries", "shared", "seed", "checkpoint"),
)
_TOTAL = "njobs", "max_value", "max_jobs", "total_jobs"
_CHUNK = "chunk_size", "batch_size"
_WINDOW = "block_size", "buffer_size", "max_outstanding", "pre_dispatch"
_DUMP = "dump_dbase", "dump_jobs", "dump_freq"
_SERVERS = "ppservers", "servers"
_UNUSED = "pp", "parallel"  # there is one kind of pool here

_ALIASES = {
    **dict.fromkeys(_TOTAL, "total"),
    **dict.fromkeys(_CHUNK, "chunk_size"),
    **dict.fromkeys(_WINDOW, "window"),
    **dict.fromkeys(_SERVERS, "servers"),
    **dict.fromkeys(_UNUSED, ""),
}


def _fold(name: str) -> str:
    """Return what two spellings of a name have in common."""
    return name.casefold().translate({ord(char): None for char in " _-"})


def _table(*names: str) -> dict[str, str]:
    return {_fold(name): _ALIASES.get(name, name) for name in names}


_OF_RUN = _table(*_RUN, *_TOTAL, *_CHUNK, *_WINDOW, *_UNUSED)
_OF_RUNS_ONLY = {**_OF_RUN, "timeout": "timeout"}  # of an item; a manager's is that of servers
_OF_MANAGER = {**_OF_RUN, **_table(*_DUMP, *_HOSTS, *_SERVERS)}
_NAMES = {_fold(n): n for n in (*_RUN, *_TOTAL, *_CHUNK, *_WINDOW, *_HOSTS, *_DUMP, *_SERVERS)}


def manager_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keywords of a manager: those for its workers and hosts, and the others.

    What is not known is told, once, with the name that it is most like, and left out.
    """
    found = dict(_named(given, _OF_MANAGER))
    hosts = {name: found.pop(name) for name in (*_HOSTS, "servers") if name in found}
    return hosts, found


def run_options(given: Mapping[str, Any], of_manager: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a run, those of its manager among them; as `manager_options` does."""
    return {**of_manager, **dict(_named(given, _OF_RUNS_ONLY))}


def _named(given: Mapping[str, Any], known: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        folded = _fold(name)
        if folded not in known:
            nearest = difflib.get_close_matches(folded, known, n=1)
            tell_unknown(name, _NAMES.get(nearest[0], nearest[0]) if nearest else "")
        elif known[folded] and value is not None:  # ``None``, as with Ostap, is not given
            yield known[folded], value


@functools.cache
def tell_unknown(name: str, nearest: str) -> None:
    """Warn of a keyword, once for each."""
    hint = f": did you mean {nearest!r}?" if nearest else ""
    logger.warning("there is no keyword %r%s; it has no effect", name, hint)


def positive(value: object) -> int | None:
    """Return a number from 1 on; ``None``, which leaves the choice to us, for anything else."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and isinstance(value, int) and value >= 1 else None


def count_cpus(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of CPUs of this process, and no more than ``OSTAP_NCPUS`` tells."""
    limit = environ.get("OSTAP_NCPUS", "").strip()
    count = usable_cpus()
    return min(count, int(limit)) if limit.isdecimal() and int(limit) else count


def executor_of(ncpus: int, environ: Mapping[str, str] = os.environ) -> Executor | None:
    """Return the executor that ``OSTAP_PARALLEL`` asks for; ``None`` for workers of ours."""
    name = environ.get("OSTAP_PARALLEL", "").strip().upper()
    if name not in _EXECUTORS:
        return None
    try:
        return _EXECUTORS[name](ncpus)
    except ImportError as exc:
        logger.warning("OSTAP_PARALLEL=%s cannot be had: %s", name, exc)
        return None


@functools.cache
def _processes(ncpus: int) -> Executor:
    return ProcessPoolExecutor(ncpus)


def _loky(ncpus: int) -> Executor:
    loky = importlib.import_module("joblib.externals.loky")
    executor: Executor = loky.get_reusable_executor(max_workers=ncpus)
    return executor


@functools.cache
def _ipyparallel(ncpus: int) -> Executor:
    executor: Executor = importlib.import_module("ipyparallel").Client().executor()
    return executor


_EXECUTORS: dict[str, Callable[[int], Executor]] = {
    "FUTURES": _processes,
    "JOBLIB": _loky,
    "IPYPARALLEL": _ipyparallel,
}
