"""Executor: a `concurrent.futures.Executor` on local cores and on hosts reached by ssh."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostap_parallel.config import Settings as HostSettings
from ostap_parallel.config import find_secret, load_settings
from ostap_parallel.config.load import HostArguments
from ostap_parallel.errors import ConfigError, InitializerError
from ostap_parallel.executors.parallel import PATIENCE, ParallelExecutor
from ostap_parallel.executors.syncing import Sync, find_sources
from ostap_parallel.report import relay

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Settings(HostArguments, total=False):
    """What `Executor` takes by name for its workers and hosts; other faces pass it on."""

    config: Iterable[Path | str] | Path | str | None
    secret: str | None
    timeout: float
    patience: float
    sync: Sync | Iterable[Sync] | None
    tasks_per_worker: int | None


class Executor(ParallelExecutor):
    """Local workers and hosts reached by ssh, made from arguments and configuration.

    Parameters
    ----------
    ncpus, servers
        Local workers and hosts, as of `WorkManager`, and so are the other settings.
    initializer, initargs
        ``initializer(*initargs)`` is called in each worker process before its first task.

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
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        config: Iterable[Path | str] | Path | str | None = None,
        secret: str | None = None,
        timeout: float = 7200,
        patience: float = PATIENCE,
        sync: Sync | Iterable[Sync] | None = None,
        tasks_per_worker: int | None = None,
        **settings: Unpack[HostArguments],
    ) -> None:
        if unknown := sorted(settings.keys() - HostArguments.__annotations__.keys()):
            raise TypeError(f"{type(self).__name__}: there is no setting {', '.join(unknown)}")
        _check(ncpus, timeout, patience)
        found = HostSettings()
        if servers != ():  # else the configuration, right or wrong, does not matter
            found = load_settings(servers, config=config, **settings)
        self._broken: InitializerError | None = None
        super().__init__(
            ncpus,
            found.hosts,
            secret=secret if secret is not None else find_secret(found.hosts),
            timeout=timeout,
            patience=patience,
            tasks_per_worker=tasks_per_worker,
            on_event=relay,
            initializer=initializer,
            initargs=initargs,
            sync=find_sources(found.sync if sync is None else sync),
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call on any worker.

        Raises
        ------
        SerializeError
            The function or an argument cannot be sent.
        BrokenExecutor
            No worker is left and none is about to come; or the initializer has failed.
        RuntimeError
            The executor has been shut down.
        """
        self.check()
        future = super().submit(fn, *args, **kwargs)
        if self.initializer is not None:
            future.add_done_callback(self._notice)
        return future

    def check(self) -> None:
        """Raise what `submit` would raise for any call."""
        super().check()
        if self._broken is not None:
            raise self._broken

    def _notice(self, future: Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, InitializerError):
            self._broken = error


def _check(ncpus: int | str, timeout: float, patience: float) -> None:
    is_number = isinstance(ncpus, Integral) and not isinstance(ncpus, bool) and ncpus >= 0
    if ncpus != "autodetect" and not is_number:
        raise ConfigError(f"ncpus must be 'autodetect' or a number from 0 on, not {ncpus!r}")
    if not isinstance(timeout, Real) or not timeout > 0:
        raise ConfigError(f"timeout must be a positive number of seconds, not {timeout!r}")
    if not isinstance(patience, Real) or not patience >= 0:
        raise ConfigError(f"patience must be a number of seconds from 0 on, not {patience!r}")
