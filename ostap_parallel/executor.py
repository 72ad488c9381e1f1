"""Executor: a `concurrent.futures.Executor` on local cores and on hosts reached by ssh."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from ostap_parallel.config import HostConfig, find_secret, load_settings
from ostap_parallel.config.load import HostArguments
from ostap_parallel.errors import ConfigError
from ostap_parallel.executors.parallel import PATIENCE, ParallelExecutor
from ostap_parallel.report import relay

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Settings(HostArguments, total=False):
    """What `Executor` takes by name for its workers and hosts; other faces pass it on."""

    config: Iterable[Path | str] | Path | str | None
    secret: str | None
    timeout: float
    patience: float


class Executor(ParallelExecutor):
    """Local workers and hosts reached by ssh, made from arguments and configuration.

    Parameters
    ----------
    ncpus, servers
        Local workers and hosts, as of `WorkManager`, and so are all others.

    Raises
    ------
    ConfigError
        A setting is missing or malformed; no host has been contacted.
    """

    def __init__(
        self,
        ncpus: int | str = "autodetect",
        servers: str | int | Iterable[str | int] = (),
        *,
        config: Iterable[Path | str] | Path | str | None = None,
        secret: str | None = None,
        timeout: float = 7200,
        patience: float = PATIENCE,
        **settings: Unpack[HostArguments],
    ) -> None:
        if unknown := sorted(settings.keys() - HostArguments.__annotations__.keys()):
            raise TypeError(f"{type(self).__name__}: there is no setting {', '.join(unknown)}")
        _check(ncpus, timeout, patience)
        hosts: tuple[HostConfig, ...] = ()
        if servers != ():  # else the configuration, right or wrong, does not matter
            hosts = load_settings(servers, config=config, **settings).hosts
        super().__init__(
            ncpus,
            hosts,
            secret=secret if secret is not None else find_secret(hosts),
            timeout=timeout,
            patience=patience,
            on_event=relay,
        )


def _check(ncpus: int | str, timeout: float, patience: float) -> None:
    is_number = isinstance(ncpus, Integral) and not isinstance(ncpus, bool) and ncpus >= 0
    if ncpus != "autodetect" and not is_number:
        raise ConfigError(f"ncpus must be 'autodetect' or a number from 0 on, not {ncpus!r}")
    if not isinstance(timeout, Real) or not timeout > 0:
        raise ConfigError(f"timeout must be a positive number of seconds, not {timeout!r}")
    if not isinstance(patience, Real) or not patience >= 0:
        raise ConfigError(f"patience must be a number of seconds from 0 on, not {patience!r}")
