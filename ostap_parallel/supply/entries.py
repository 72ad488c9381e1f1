"""Entries of server lists that are jobs of a batch system, as objects."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ostap_parallel.config.files import KEYS, LISTS, convert
from ostap_parallel.config.host import HostConfig
from ostap_parallel.config.load import load_settings
from ostap_parallel.config.requests import Allocation
from ostap_parallel.errors import ConfigError
from ostap_parallel.supply.allocations import holder, job_spec
from ostap_parallel.supply.site import Here
from ostap_parallel.supply.sources import scheduler_of, site_of

_KNOWN = KEYS - LISTS - {"batch", "ncpus", "user", "port", "sync"} | {"ssh_config"}


class _Jobs(Allocation):
    def __init__(self, workers: int | None = None, *, name: str = "", **settings: Any) -> None:
        where = type(self).__name__
        values = {}
        for key, value in settings.items():
            if key not in KEYS - LISTS - {"batch", "ncpus", "user", "port", "sync"} | {
                "ssh_config"
            }:
                near = difflib.get_close_matches(key, KEYS, n=1)
                hint = f": did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{where}: there is no setting {key!r}{hint}")
            if value is not None:
                values[key] = convert(key, value, where, Path.cwd())
        super().__init__(name or self.batch, workers, values)

    def _config(self) -> HostConfig:
        (host,) = load_settings([self], config=()).hosts
        return host

    def script(self) -> str:
        """Return what is submitted for one job; more of them are an array of such."""
        host = self._config()
        assert host.batch is not None
        scheduler = scheduler_of(self.batch, Here().run)  # which is not asked
        return scheduler.script(job_spec(host.name, host.batch, holder()))

    def check(self) -> str:
        """Return what the batch system says to `script`, which is not submitted.

        Raises
        ------
        JobRefused
            It can never run so.
        SchedulerUnavailable, HostError
            It does not answer, or the login host cannot be reached.
        """
        site = site_of(self._config())
        try:
            return scheduler_of(self.batch, site.run).check(self.script())
        finally:
            site.close()


class Slurm(_Jobs):
    """Jobs of SLURM, as an entry of `servers`.

    Parameters
    ----------
    workers
        So many in all; without it those of one job, or of `jobs`.
    name
        By which the jobs are called: ``name/1``, ``name/2`` ...
    settings
        The keys of a section with ``batch = slurm``.

    Raises
    ------
    ConfigError
        One of them is wrong.
    """

    batch = "slurm"


class Sge(_Jobs):
    """Jobs of SGE, as an entry of `servers`; see `Slurm`."""

    batch = "sge"
