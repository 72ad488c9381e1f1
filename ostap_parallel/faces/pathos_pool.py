"""ParallelPool: the interface of pathos' pool of that name on every core within reach."""

from __future__ import annotations

import functools
import multiprocessing.pool
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import pathos  # noqa: F401 - all of it first: another thread may be importing it
from multiprocess import TimeoutError as MultiprocessTimeoutError
from pathos.parallel import ParallelPool as PathosParallelPool

from ostap_parallel.config import check_servers
from ostap_parallel.engine.engine import Engine
from ostap_parallel.faces.executor import Executor
from ostap_parallel.faces.pool import AsyncResult, Pool
from ostap_parallel.runs.report import StatMerger
from ostap_parallel.runs.tally import Tally
from ostap_parallel.worker import standin
from ostap_parallel.worker.calls import spread

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ostap_parallel.faces.executor import Settings

Function = Callable[..., Any]
Nodes = int | Literal["*", "autodetect"] | None


class Result:
    """The outcome of `ParallelPool.apipe` or `ParallelPool.amap`, now or later."""

    def __init__(self, result: multiprocessing.pool.AsyncResult[Any] | AsyncResult) -> None:
        self._result = result
        self.ready, self.successful, self.wait = result.ready, result.successful, result.wait

    def get(self, timeout: float | None = None) -> Any:
        """Return the value, or raise what the function raised.

        Raises
        ------
        multiprocess.TimeoutError
            It is not ready after `timeout` seconds.
        """
        try:
            return self._result.get(timeout)
        except multiprocessing.TimeoutError:
            raise MultiprocessTimeoutError from None

    __call__ = get


class _Service(NamedTuple):
    """What the pools of one id share."""

    pool: Pool
    options: dict[str, Any]


class ParallelPool(PathosParallelPool):  # type: ignore[misc]
    """pathos' ParallelPool, on local cores and on hosts reached by ssh.

    Pools of the same `id` share their workers and their state, as those of pathos do. They end
    with `clear`, or with the interpreter; leaving ``with`` does not end them.

    Parameters
    ----------
    nodes, ncpus
        Local workers, by either name: as many as CPU affinity and control groups grant by
        default; 0: none.
    servers
        Hosts, and `settings` for them, as of `WorkManager`.
    id
        Made of all these by default.
    executor
        Of a `WorkManager` or an `Executor`: computes in place of one of its own. It is not shut
        down.
    """

    __state__: ClassVar[dict[str, _Service]] = {}

    def __init__(
        self,
        nodes: Nodes = None,
        *,
        ncpus: Nodes = None,
        servers: str | int | Iterable[str | int] | None = None,
        id: str | None = None,
        executor: Executor | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        if nodes is not None and ncpus is not None:
            raise TypeError("got multiple values for keyword argument 'ncpus'")
        self.__nodes = _number(ncpus if nodes is None else nodes)
        if executor is not None and self.__nodes is None:
            self.__nodes = executor.backend.ncpus
        self._servers = _entries(servers)
        self._settings: dict[str, Any] = dict(settings)
        self._executor = executor
        self._services = self.__state__ if executor is None else {}
        given = "".join(f" {name}={value}" for name, value in sorted(settings.items()))
        self._id = id or f"{self.nodes}@{'+'.join(sorted(map(str, self._servers)))}{given}"
        self._serve()

    def __repr__(self) -> str:
        return f"<pool {type(self).__name__}(ncpus={self.ncpus}, servers={self.servers})>"

    @property
    def nodes(self) -> int | str:
        """Number of local workers, or ``"*"``; it can be set."""
        return "*" if self.__nodes is None else self.__nodes

    @nodes.setter
    def nodes(self, nodes: Nodes) -> None:
        self.__nodes = _number(nodes)
        self._serve()

    ncpus = nodes

    @property
    def servers(self) -> tuple[str | int, ...] | None:
        """The hosts, or ``None``; they can be set."""
        return self._servers or None

    @servers.setter
    def servers(self, servers: str | int | Iterable[str | int] | None) -> None:
        self._servers = _entries(servers)
        self._serve()

    def map(self, f: Function, *args: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """Return the results, in order."""
        return self._serve().map(*_one_by_one(f, args), _size(chunksize))

    def imap(
        self, f: Function, *args: Iterable[Any], chunksize: int | None = None
    ) -> Iterator[Any]:
        """Return an iterator over the results, in order."""
        return self._serve().imap(*_one_by_one(f, args), _size(chunksize))

    def uimap(
        self, f: Function, *args: Iterable[Any], chunksize: int | None = None
    ) -> Iterator[Any]:
        """Return an iterator over the results, as they come."""
        return self._serve().imap_unordered(*_one_by_one(f, args), _size(chunksize))

    def amap(self, f: Function, *args: Iterable[Any], chunksize: int | None = None) -> Result:
        """Return at once; `Result.get` gives the list of results."""
        return Result(self._serve().map_async(*_one_by_one(f, args), _size(chunksize)))

    def pipe(self, f: Function, /, *args: Any, **kwds: Any) -> Any:
        """Return the result of one call."""
        return self.apipe(f, *args, **kwds).get()

    def apipe(self, f: Function, /, *args: Any, **kwds: Any) -> Result:
        """Return at once; `Result.get` gives the result of the call."""
        return Result(self._serve().apply_async(f, args, kwds))

    def close(self) -> None:
        """Take no more work; what is under way goes on."""
        self._act("close")

    def join(self) -> None:
        """Wait until all is done and the workers have ended, after `close` or `terminate`."""
        self._act("join")

    def terminate(self) -> None:
        """Stop all work and end the workers."""
        self._act("terminate")
        self._act("join")

    def clear(self) -> None:
        """Stop all work and end the workers; the next call starts new ones."""
        self.terminate()
        self._services.pop(self._id, None)

    _clear = clear  # as older programs have it

    def restart(self, force: bool = False) -> None:
        """Start a pool that was closed again, or with `force` any.

        Raises
        ------
        AssertionError
            It is running, as by pathos.
        """
        service = self._services.get(self._id)
        if service is None:
            return
        if service.pool._state == multiprocessing.pool.RUN and not force:
            raise AssertionError("Pool is still running")
        self.clear()
        self._serve()

    def _act(self, name: str) -> None:
        service = self._services.get(self._id)
        if service is not None:
            getattr(service.pool, name)()

    def _serve(self) -> Pool:
        """Return the pool of this id, with the workers that this object is to have."""
        options = {"servers": self._servers, **self._settings}
        service = self._services.get(self._id)
        if service is None or service.options != options:
            if service is not None:
                service.pool.close()  # what is under way goes on
            if self._executor is None:
                pool = Pool(self.__nodes, **options)
            else:
                pool = Pool(executor=self._executor)
            pool.tally = Tally()
            service = _Service(pool, options)
            self._services[self._id] = service
        engine = cast(Engine, service.pool.backend)
        if self.__nodes is not None and self.__nodes != engine.ncpus:
            engine.set_ncpus(self.__nodes)
        return service.pool


standin.register(ParallelPool)


def stats(pool: ParallelPool | None = None) -> str:
    """Return how much each host has done for a pool, or for all, as `pathos.parallel.stats`."""
    services = list(ParallelPool.__state__.values())
    if pool is not None:
        service = pool._services.get(pool._id)
        services = [service] if service is not None else []
    tallies = [one.pool.tally for one in services if one.pool.tally is not None]
    merged = StatMerger()
    for tally in tallies:
        merged += tally.stats
    lines = [
        "Job execution statistics:",
        " job count | % of all jobs | job time sum | time per job | job server",
    ]
    for host, stat in sorted(merged):
        share, each = 100 * stat.njobs / merged.njobs, stat.time / stat.njobs
        lines.append(
            f"{stat.njobs:10} | {share:13.2f} | {stat.time:12.4f} | {each:12.6f} | {host}"
        )
    elapsed = max((time.monotonic() - tally.begun for tally in tallies), default=0.0)
    active = sum(len(one.pool._under_way) for one in services)
    cores = sum(sum(one.pool.backend.workers.values()) for one in services)
    lines += [f"Time elapsed since server creation {elapsed}"]
    return "\n".join([*lines, f"{active} active tasks, {cores} cores", "", ""])


def _number(nodes: Nodes) -> int | None:
    return None if nodes in (None, "*", "autodetect") else int(nodes)


def _entries(servers: str | int | Iterable[str | int] | None) -> tuple[str | int, ...]:
    if servers is None:
        return ()
    check_servers(servers)
    return (servers,) if isinstance(servers, (str, int)) else tuple(servers)


def _size(chunksize: int | None) -> int | None:
    """Return a size of chunks; pathos takes any number, and ParallelPool makes nothing of it."""
    return chunksize or None


def _one_by_one(f: Function, args: tuple[Iterable[Any], ...]) -> tuple[Function, Iterable[Any]]:
    """Return a function of one item, and the items, for a function and its sequences."""
    if not args:
        raise TypeError("a map needs a function and at least one sequence")
    if len(args) == 1:
        return f, args[0]
    return functools.partial(spread, f), zip(*args, strict=False)
