"""Intermediate results in a data base of the user's, as Ostap keeps them."""

from __future__ import annotations

import dbm
import os
from collections.abc import Callable, MutableMapping
from numbers import Integral
from pathlib import Path
from typing import Any

from ostap_parallel.errors import ConfigError
from ostap_parallel.runs.checkpoint import pack_value

Database = str | os.PathLike[str] | MutableMapping[str, Any]


class Dump:
    """Writes results of runs into a data base.

    Parameters
    ----------
    dbase
        A file, which `shelve.open` then reads; or an open data base: any mapping, which is not
        closed.
    jobs
        How many results to write, in the order of arrival; all of them if it is negative.
    freq
        Write what is merged after each `freq` results, and at the end; 0: never.

    Raises
    ------
    ConfigError
        There is something to write and no data base for it, or it cannot be used.
    """

    def __init__(self, dbase: Database | None, jobs: int, freq: int) -> None:
        for name, value in ("dump_jobs", jobs), ("dump_freq", freq):
            if not isinstance(value, Integral):
                raise ConfigError(f"{name} must be a number, not {value!r}")
        if freq < 0:
            raise ConfigError(f"dump_freq must be 0 or more, not {freq}")
        if dbase is None and (jobs or freq):
            raise ConfigError("dump_jobs and dump_freq need dump_dbase: a file, or a data base")
        is_path = isinstance(dbase, str | os.PathLike | None)
        if not is_path and not hasattr(dbase, "__setitem__"):
            raise ConfigError(f"dump_dbase must be a file or an open data base, not {dbase!r}")
        self._dbase, self._jobs, self._freq = dbase, jobs, freq
        if jobs or freq:
            self._write({})  # it must not turn out after hours that this is impossible

    def __bool__(self) -> bool:
        return bool(self._jobs or self._freq)

    def every(self, freq: int | None) -> Dump:
        """Return one that writes what is merged after each `freq` results, or this one."""
        return self if freq is None else Dump(self._dbase, self._jobs, freq)

    def write_result(self, count: int, jobid: int, result: Any) -> None:
        """Write a result that is about to be merged after `count` others."""
        if self._jobs < 0 or count < self._jobs:
            self._write({f"results_{count}": (jobid, result)})

    def write_merged(self, count: int, results: Callable[[], Any]) -> None:
        """Write what `count` results are merged to, if it is time to."""
        if self._freq and count % self._freq == 0:
            self._write({"merged": (count, results())})

    def write_final(self, count: int, results: Any) -> None:
        """Write what the run ends with."""
        if self._freq:
            final = {"merged": (count, results), "TOTAL_jobs": count, "FINAL_results": results}
            self._write(final)

    def _write(self, entries: dict[str, Any]) -> None:
        if not isinstance(self._dbase, str | os.PathLike):
            assert self._dbase is not None
            for key, value in entries.items():
                self._dbase[key] = value
            return
        try:
            # Open for a moment only: others may look, and what is written survives a crash.
            with dbm.open(os.fspath(Path(self._dbase).expanduser()), "c") as file:
                for key, value in entries.items():
                    file[key.encode()] = pack_value(value, key)
        except (OSError, *dbm.error) as exc:
            raise ConfigError(f"dump_dbase: {self._dbase} cannot be used: {exc}") from exc
